"""Where the image tokens start: which of them to keep, and a projection that makes them read like words.

A sentence encoder does not know what a patch of a picture means, and a few hundred steps do not teach it. So two ridge
regressions on the training scenes say, before any method trains, where an object is and which words describe a patch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertModel

from .data import COLOURS, OBJECTS, TOKENS, Scenes

RIDGE = 100.0


@dataclass(frozen=True)
class Start:
    """Of the projection, and the linear probe of objects."""

    weight: Tensor
    bias: Tensor
    scale: float
    """the deviation of MiniLM's word embeddings"""
    objects: Tensor
    """(385,) how much a patch looks like an object; the last is the bias"""

    def keep(self, features: Tensor, count: int) -> Tensor:
        """The places (N, count) of the tokens (N, 64, 384) that look most like objects, in their order."""
        return (features @ self.objects[:-1] + self.objects[-1]).topk(count, 1).indices.sort(1).values


def start(made: Scenes, features: Tensor, bert: BertModel, tokenizer: Any) -> Start:
    """Regressions from standardised patches (N, 64, 384) of the training scenes.

    A patch's words are its object and its colour, "left" and "right", "far" and "near" by its place. Their embeddings
    are added up without the mean of all such words, so that what tells words apart keeps its strength.
    """
    embed = bert.embeddings.word_embeddings.weight.detach()
    vocabulary = (*COLOURS, *OBJECTS, "left", "right", "far", "near")
    vectors = torch.stack([embed[tokenizer(w, add_special_tokens=False).input_ids].mean(0) for w in vocabulary])
    word = dict(zip(vocabulary, vectors - vectors.mean(0), strict=True))
    share = (torch.arange(TOKENS) + 0.5) / TOKENS
    column, row = share.repeat(TOKENS)[:, None], share.repeat_interleave(TOKENS)[:, None]
    place = (1 - column) * word["left"] + column * word["right"] + (1 - row) * word["far"] + row * word["near"]
    inside = made.owner >= 0
    scene, patch = inside.nonzero(as_tuple=True)
    things = [made.things[n][made.owner[n, i]] for n, i in zip(scene.tolist(), patch.tolist(), strict=True)]
    described = torch.stack([word[thing.name] + word[thing.colour] for thing in things]) + place[patch]
    solved = _ridge(features[inside], described, torch.ones(len(things)))
    seldom = torch.where(inside, (~inside).sum() / inside.sum(), 1.0).flatten()  # objects fill a tenth of the patches
    objects = _ridge(features.flatten(0, 1), inside.flatten()[:, None].float(), seldom)
    return Start(solved[:-1].t().contiguous(), solved[-1], float(embed.std()), objects[:, 0])


def _ridge(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """(I + 1, O), the last row the bias, of rows (N, I) and (N, O) that count as ``weights`` (N,) say."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram = x.t() @ (weights[:, None] * x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.t() @ (weights[:, None] * y.double())).float()


def standardised(features: Tensor, of: Tensor) -> Tensor:
    """Each channel with the mean and deviation that it has in ``of``."""
    return (features - of.mean((0, 1))) / of.std((0, 1))
