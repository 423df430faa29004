"""The baselines an adapter has to beat: the trivial answer, and a converged linear head on the frozen model.

    min over W, b of  mean_i loss(W x_i + b, y_i) + (l2 / 2) |W|^2        x: standardised features

The losses are the tasks' own (cross-entropies, squared errors) and the problem is convex, so "converged" is a number:
the norm of the gradient, reported with every result. The strength l2 is the one with the smallest loss on held-out
training examples (accuracy on a hundred of them is a coarse judge), then the head is fitted again on all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from polyrank.models import HeadModel
from polyrank.tasks import Examples, HeadTask, Row, Task

SOFTENING = 0.3  # of a converged head, where training starts from it
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # from strong to weak: each fit starts from the one before


class Features:
    """Features of a frozen model's texts, fp32; a text is computed once and kept in memory."""

    def __init__(self, model: HeadModel, *, batch_size: int = 64) -> None:
        self.model, self.batch_size = model.eval(), batch_size
        self.known: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], *, progress: bool = False) -> Tensor:
        """One line (D) for each row, or one for each of its marked words."""
        new = {_key(row): row for row in rows if _key(row) not in self.known}
        order = sorted(new, key=lambda key: -len(key[0]))
        batches = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        for keys in track(batches, "frozen model", transient=True, disable=not progress):
            inputs = {k: x.to(self.model.device) for k, x in self.model.reader.collate([new[k] for k in keys]).items()}
            hidden, pooled = self.model.hidden(inputs, None)
            for i, key in enumerate(keys):
                marks = new[key].marks
                found = hidden[i, marks] if marks else pooled[i : i + 1]
                self.known[key] = found.cpu().clone()
        width = self.model.backbone.config.hidden_size
        return torch.cat([torch.empty(0, width), *(self.known[_key(row)] for row in rows)])


def _key(row: Row) -> tuple[tuple[int, ...], ...]:
    return tuple(row.ids), tuple(row.types), tuple(row.marks)


@dataclass(frozen=True)
class Head:
    """A linear head on plain (not standardised) features: weight (C, D), bias (C,), fp64."""

    weight: Tensor
    bias: Tensor
    gradient_norm: float

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, D) -> logits (n, C)."""
        return F.linear(x.double(), self.weight, self.bias)


@dataclass(frozen=True)
class Probe:
    """The frozen model on one task. `head` saw all training examples, `selection_head` none of the held-out ones."""

    majority: float | None
    score: float | None
    strength: float
    gradient_norm: float
    head: Head
    selection_head: Head


def fit(task: HeadTask, x: Tensor, y: Tensor, strengths: Sequence[float]) -> list[Head]:
    """Converged heads for a falling list of strengths: x (n, D), y (n, ...) the task's labels."""
    x, y = x.double(), y.double() if y.is_floating_point() else y
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-8)
    x = (x - mean) / std
    weight, bias = x.new_zeros(task.outputs, x.shape[1]), x.new_zeros(task.outputs)
    heads: list[Head] = []
    for strength in strengths:
        weight, bias, norm = _minimise(task, x, y, weight, bias, strength)
        plain = weight / std
        heads.append(Head(plain, bias - plain @ mean, norm))
    return heads


def _minimise(
    task: HeadTask, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor, float]:
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
        loss = task.loss_sum(F.linear(z, v, b), y) / len(y) + strength / 2 * (v @ inverse).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (v @ inverse).detach().requires_grad_(), b.detach().requires_grad_()
    loss = task.loss_sum(F.linear(x, weight, bias), y) / len(y) + strength / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    return weight.detach(), bias.detach(), float(torch.cat([g.reshape(-1) for g in gradients]).norm())


def probe(task: HeadTask, kept: Examples, held: Examples, features: Features, *, progress: bool = False) -> Probe:
    """Fit and score the frozen model on one task; `kept` and `held` are the two parts of its training examples.

    Raises:
        ValueError: no labelled training example.
    """
    (x, y, _), (x_held, y_held, _), (x_all, y_all, _), (x_test, _, rows) = (
        _matrix(task, part, features, progress) for part in (kept, held, task.train, task.test)
    )
    if not len(y):
        raise ValueError(f"task {task.name!r} has no labelled training example: nothing to fit")
    heads = fit(task, x, y, STRENGTHS)
    losses = [float(task.loss_sum(head(x_held), y_held)) for head in heads]
    # without held-out examples there is nothing to choose by: the middle of the grid
    best = losses.index(min(losses)) if len(y_held) else len(STRENGTHS) // 2
    head = fit(task, x_all, y_all, [STRENGTHS[best]])[0]
    labels = [label for label in task.test.labels if label is not None]
    score = task.score(task.read(head(x_test), rows), labels) if labels else None
    return Probe(trivial_score(task), score, STRENGTHS[best], head.gradient_norm, head, heads[best])


def trivial_score(task: Task) -> float | None:
    """The score of always giving the most common answer, None where there is no such thing, or no test label."""
    answers = task.trivial()
    if answers is None:
        return None
    pairs = zip(answers, task.test.labels, strict=True)
    known = [(answer, label) for answer, label in pairs if label is not None]
    if not known:
        return None
    return task.score([answer for answer, _ in known], [label for _, label in known])


def _matrix(task: HeadTask, examples: Examples, features: Features, progress: bool) -> tuple[Tensor, Tensor, list[Row]]:
    """The labelled examples as features (n, D), labels (n, ...), and rows."""
    rows = task.rows(examples.labelled(), features.model.reader)
    return features(rows, progress=progress), task.labels(rows), rows


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
