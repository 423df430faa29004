"""The models: MiniLM that reads an image's tokens before the question, and two frozen encoders that MMoLRE fuses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from polyrank.methods import MMoLRE

from .alignment import Start
from .data import ANSWERS

TEXT, IMAGE = 0, 1
IMAGE_POSITION = 128  # image tokens stand behind every question in MiniLM's table of positions


@dataclass(frozen=True)
class Batch:
    features: Tensor
    """(B, K, 384) tokens of the image, standardised"""
    places: Tensor
    """(B, K) where in the picture each one is, 0 to 63"""
    words: Tensor
    """(B, L) token ids of the question"""
    mask: Tensor
    """(B, L) 1 at its tokens"""
    task_ids: Tensor
    """(B,)"""
    answers: Tensor
    """(B,)"""


class Projection(nn.Module):
    """Image tokens as inputs of MiniLM: linear, LayerNorm, and a vector that says what kind they are."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        width, in_features = start.weight.shape
        self.linear, self.norm = nn.Linear(in_features, width), nn.LayerNorm(width)
        self.kind = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.linear.weight.copy_(start.weight / start.scale)  # the norm does not mind, and AdamW's steps then fit
            self.linear.bias.copy_(start.bias / start.scale)
            self.norm.weight.fill_(2 * start.scale)  # louder than the vector of its position

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features)) + self.kind


class Heads(nn.Module):
    """A linear head of each task on standardised vectors; logits beyond a task's answers are -inf."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(answers)) for answers in ANSWERS.values())
        self.most = max(len(answers) for answers in ANSWERS.values())
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, vectors: Tensor, task_ids: Tensor) -> Tensor:
        vectors = (vectors - self.mean) / self.deviation
        logits = [F.pad(head(vectors), (0, self.most - head.out_features), value=-torch.inf) for head in self.heads]
        return torch.stack(logits)[task_ids, torch.arange(len(task_ids))]  # (B, answers)

    def fit(self, vectors: Tensor, task_ids: Tensor, answers: Tensor) -> None:
        """Start as the regularised logistic regression on vectors of the model as it is."""
        self.mean.copy_(vectors.mean(0))
        self.deviation.copy_(vectors.std(0) + 1e-6)
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=60)

        def closure() -> Tensor:
            optimizer.zero_grad()
            size = sum(head.weight.square().sum() for head in self.heads)
            loss = F.cross_entropy(self(vectors, task_ids), answers) + 0.3 * size
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()


class Reader(nn.Module):
    """MiniLM over [image tokens; question]. Its vector is the mean of the question's positions."""

    def __init__(self, bert: BertModel, projection: Projection, sees: bool) -> None:
        super().__init__()
        self.bert, self.projection, self.sees = bert, projection, sees

    def forward(self, batch: Batch) -> Tensor:
        text = self.bert.embeddings.word_embeddings(batch.words)
        length = text.shape[1]
        inputs, mask, places = text, batch.mask, torch.arange(length).expand(len(text), length)
        modality = torch.full_like(batch.mask, TEXT)
        if self.sees:  # tokens that are masked in every row change nothing, so text alone leaves them out
            shown = torch.ones_like(batch.places)
            inputs = torch.cat([self.projection(batch.features), inputs], 1)
            mask = torch.cat([shown, mask], 1)
            places = torch.cat([IMAGE_POSITION + batch.places, places], 1)
            modality = torch.cat([IMAGE * shown, modality], 1)
        routes = dict(task_ids=batch.task_ids, modality_ids=modality)
        states = self.bert(inputs_embeds=inputs, attention_mask=mask, position_ids=places, **routes).last_hidden_state
        weights = batch.mask[..., None].to(states.dtype)
        return (states[:, -length:] * weights).sum(1) / weights.sum(1)


class Fusion(nn.Module):
    """Frozen MiniLM reads the question; MMoLRE fuses its states with the image tokens."""

    def __init__(self, bert: BertModel, projection: Projection, sees: bool) -> None:
        super().__init__()
        self.bert, self.projection, self.sees = bert.requires_grad_(False), projection, sees
        width = bert.config.hidden_size
        self.mmolre = MMoLRE({"text": width, "image": width}, list(ANSWERS), out_features=width)

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            text = self.bert(input_ids=batch.words, attention_mask=batch.mask).last_hidden_state
        image = F.layer_norm(self.projection(batch.features), text.shape[-1:])
        masks = {"text": batch.mask, "image": torch.full_like(batch.places, int(self.sees))}
        return self.mmolre({"text": text, "image": image}, masks, batch.task_ids)
