"""The baselines an adapter has to beat: the majority class, and a converged linear head on the frozen model.

    min over W, b of  mean_i CE(W x_i + b, y_i) + (l2 / 2) |W|^2        x: standardised masked-mean features

The problem is convex, so "converged" is a number: the norm of the gradient, reported with every result. The strength l2
is the one with the smallest cross-entropy on held-out training examples (accuracy on a hundred of them is a coarse
judge), then the head is fitted again on all of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from polyrank.mixing import Corpus, tokenize
from polyrank.tasks import MISSING, Examples, Task, masked_mean, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOFTENING = 0.3  # of a converged head, where training starts from it
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # from strong to weak: each fit starts from the one before


class Features:
    """Masked-mean features of a frozen backbone, (texts, D) fp32; a text is computed once and kept in memory."""

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        *,
        batch_size: int = 64,
    ) -> None:
        self.backbone, self.tokenizer = backbone.eval(), tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        new = sorted(set(texts) - self.known.keys())
        tokens = tokenize(self.tokenizer, new, self.max_length)
        left = self.tokenizer.padding_side == "left"
        corpus = Corpus([tokens], [[MISSING] * len(new)], pad_id(self.tokenizer), left)
        device = next(self.backbone.parameters()).device
        for picks in track(corpus.by_length(self.batch_size), "frozen model", transient=True, disable=not progress):
            inputs = corpus.collate(picks).to(device).inputs
            hidden = self.backbone(**inputs).last_hidden_state
            for (_, row), feature in zip(picks, masked_mean(hidden, inputs["attention_mask"]).cpu(), strict=True):
                self.known[new[row]] = feature.clone()
        return torch.stack([self.known[text] for text in texts])


@dataclass(frozen=True)
class Head:
    """A linear head on plain (not standardised) features: weight (C, D), bias (C,), fp64."""

    weight: Tensor
    bias: Tensor
    gradient_norm: float

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """x (n, D), y (n,) -> share of right answers; 0 where there is no example."""
        right = F.linear(x.double(), self.weight, self.bias).argmax(-1) == y
        return float(right.double().mean()) if len(y) else 0.0

    def loss(self, x: Tensor, y: Tensor) -> float:
        """x (n, D), y (n,), n > 0 -> mean cross-entropy in nats."""
        return float(F.cross_entropy(F.linear(x.double(), self.weight, self.bias), y))


@dataclass(frozen=True)
class Probe:
    """The frozen model on one task. `head` saw all training examples, `selection_head` none of the held-out ones."""

    majority: float
    accuracy: float
    strength: float
    gradient_norm: float
    head: Head
    selection_head: Head


def fit(x: Tensor, y: Tensor, classes: int, strengths: Sequence[float]) -> list[Head]:
    """Converged heads for a falling list of strengths: x (n, D), y (n,) in [0, C)."""
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-8)
    x = (x - mean) / std
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    heads: list[Head] = []
    for strength in strengths:
        weight, bias, norm = _minimise(x, y, weight, bias, strength)
        plain = weight / std
        heads.append(Head(plain, bias - plain @ mean, norm))
    return heads


def _minimise(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, strength: float) -> tuple[Tensor, Tensor, float]:
    """The optimum for one strength, from a start; and the norm of the gradient there.

    With the Hessian at zero, S = X'X / (n C) + l2 = L L', the unknown is V = W L: near zero its Hessian is the
    identity, and L-BFGS needs tens of iterations where the plain problem needs thousands.
    """
    scale = x.T @ x / (len(x) * len(bias)) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    lower = torch.linalg.cholesky(scale)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=x.dtype), upper=False)
    z = x @ inverse.T  # (n, D)
    v, b = (weight @ lower).requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v, b],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(z, v, b), y) + strength / 2 * (v @ inverse).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (v @ inverse).detach().requires_grad_(), b.detach().requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight, bias), y) + strength / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    return weight.detach(), bias.detach(), float(torch.cat([g.reshape(-1) for g in gradients]).norm())


def majority(task: Task) -> float:
    """The accuracy, on the test examples, of always answering the most common training label."""
    most = Counter(label for label in task.train.labels if label is not None).most_common(1)[0][0]
    valid = [label for label in task.test.labels if label is not None]
    return sum(label == most for label in valid) / len(valid) if valid else 0.0


def probe(task: Task, kept: Examples, held: Examples, features: Features, *, progress: bool = False) -> Probe:
    """Fit and score the frozen model on one task; `kept` and `held` are the two parts of its training examples.

    Raises:
        ValueError: no labelled training example.
    """
    (x, y), (x_held, y_held), (x_all, y_all), (x_test, y_test) = (
        _matrix(task, part, features, progress) for part in (kept, held, task.train, task.test)
    )
    if not len(y):
        raise ValueError(f"task {task.name!r} has no labelled training example: nothing to fit")
    heads = fit(x, y, len(task.labels), STRENGTHS)
    losses = [head.loss(x_held, y_held) for head in heads]
    # without held-out examples there is nothing to choose by: the middle of the grid
    best = losses.index(min(losses)) if len(y_held) else len(STRENGTHS) // 2
    strength = STRENGTHS[best]
    head = fit(x_all, y_all, len(task.labels), [strength])[0]
    return Probe(majority(task), head.accuracy(x_test, y_test), strength, head.gradient_norm, head, heads[best])


def _matrix(task: Task, examples: Examples, features: Features, progress: bool) -> tuple[Tensor, Tensor]:
    """The labelled examples as (n, D) and (n,)."""
    ids = task.ids(examples)
    rows = [i for i, label in enumerate(ids) if label != MISSING]
    y = torch.tensor([ids[i] for i in rows], dtype=torch.long)
    if not rows:
        return torch.empty(0, features.backbone.config.hidden_size), y
    return features([examples.texts[i] for i in rows], progress=progress), y


def start_heads(heads: nn.ModuleDict, probes: Mapping[str, Probe]) -> None:
    """Start the heads from those of the frozen model that never saw the held-out examples, softened.

    Linear probing before fine-tuning keeps the features from being distorted by fresh heads:
    Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054. A converged head is nearly certain of the examples it was
    fitted to, so that they would teach the adapter little: scaled down, it gives the same answers and leaves a loss.
    """
    with torch.no_grad():
        for name, found in probes.items():
            heads.get_parameter(f"{name}.weight").copy_(SOFTENING * found.selection_head.weight)
            heads.get_parameter(f"{name}.bias").copy_(SOFTENING * found.selection_head.bias)
