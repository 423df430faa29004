"""Tasks with a head of their own on an encoder: classification, several labels at once, numbers, and words."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.tasks import metrics
from polyrank.tasks.base import MISSING, Prediction, Row, Task
from polyrank.tasks.examples import Examples, Label, Text

if TYPE_CHECKING:
    from polyrank.reader import HeadReader


@dataclass(frozen=True, kw_only=True)
class HeadTask(Task):
    """A linear head on the features of a row, or of each of its words."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers that the head gives for each label."""

    def head(self, width: int) -> nn.Linear:
        """A fresh linear head: (..., D) -> (..., C), small weights and zero bias."""
        head = nn.Linear(width, self.outputs)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def features(self, hidden: Tensor, pooled: Tensor, words: Tensor | None, rows: Tensor) -> Tensor:
        """What the head reads (n, D): hidden (B, L, D), pooled (B, D), words (B, W) their positions, rows (b,)."""
        return pooled[rows]

    @abstractmethod
    def target(self, label: Label) -> list[int] | list[float]:
        """What the loss compares the logits of one labelled example with."""

    def rows(self, examples: Examples, reader: "HeadReader") -> list[Row]:
        encoded = reader.encode(examples.texts)
        return [
            Row(ids, [] if label is None else self.target(label), types)
            for (ids, types), label in zip(encoded, examples.labels, strict=True)
        ]

    def check(self, text: Text, label: Label) -> None:
        if not isinstance(text, str) and (len(text) != 2 or not all(isinstance(part, str) for part in text)):
            raise ValueError(f"task {self.name!r}: {text!r:.80} is neither a text nor a pair of texts")
        if label is not None:
            self.target(label)


@dataclass(frozen=True, kw_only=True)
class OfClasses(HeadTask):
    """Each label is one class of several, whether of a text or of a word."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_label_names(self.name, self.names)
        super().__post_init__()

    @property
    def outputs(self) -> int:
        return len(self.names)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats: (n, C), (n,) -> scalar."""
        return F.cross_entropy(logits, labels, ignore_index=MISSING, reduction="sum")

    def count(self, labels: Tensor) -> int:
        return int((labels != MISSING).sum())


@dataclass(frozen=True, kw_only=True)
class Classification(OfClasses):
    """One label of several. `labels` is the sorted tuple of their names; a label id is a position in it."""

    kind: ClassVar[str] = "classification"
    METRICS: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "matthews")

    metric: str = "accuracy"

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        names = {str(label) for label in train.labels if label is not None}
        return cls(name=name, names=tuple(sorted(names)), train=train, test=test, **fields)

    def target(self, label: Label) -> list[int]:
        return [position(self.name, self.names, label)]

    def labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.target[0] if row.target else MISSING for row in rows], dtype=torch.long)

    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Prediction]:
        found = zip(logits.argmax(-1).tolist(), logits.softmax(-1).tolist(), strict=True)
        return [Prediction(self.names[best], dict(zip(self.names, shares, strict=True))) for best, shares in found]

    def score(self, answers: Sequence[Prediction], labels: Sequence[Any]) -> float:
        pairs = [(answer.answer, label) for answer, label in zip(answers, labels, strict=True)]
        return metrics.of_classes(self.metric, pairs, self.names)

    def trivial(self) -> list[Prediction]:
        most = Counter(label for label in self.train.labels if label is not None).most_common(1)
        return [Prediction(most[0][0] if most else self.names[0])] * len(self.test)


@dataclass(frozen=True, kw_only=True)
class MultiLabel(HeadTask):
    """Any number of labels for each text; one is given where its probability is over one half."""

    kind: ClassVar[str] = "multi_label"
    METRICS: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "exact_match")

    names: tuple[str, ...]
    metric: str = "micro_f1"

    def __post_init__(self) -> None:
        check_label_names(self.name, self.names, 1)
        super().__post_init__()

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        names = {str(one) for label in train.labels if isinstance(label, tuple) for one in label}
        return cls(name=name, names=tuple(sorted(names)), train=train, test=test, **fields)

    @property
    def outputs(self) -> int:
        return len(self.names)

    def target(self, label: Label) -> list[float]:
        if not isinstance(label, tuple):
            raise ValueError(f"task {self.name!r}: {label!r:.80} is no list of labels")
        chosen = {position(self.name, self.names, one) for one in label}
        return [float(i in chosen) for i in range(len(self.names))]

    def labels(self, rows: Sequence[Row]) -> Tensor:
        missing = [math.nan] * len(self.names)
        return torch.tensor([row.target or missing for row in rows]).view(len(rows), len(self.names))

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The binary cross-entropies in nats, their mean over the labels: (n, C), (n, C) -> scalar."""
        valid = ~labels[:, 0].isnan()
        losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num().to(logits), reduction="none")
        return (losses.mean(1) * valid).sum()

    def count(self, labels: Tensor) -> int:
        return int((~labels[:, 0].isnan()).sum())

    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Prediction]:
        found = (dict(zip(self.names, shares, strict=True)) for shares in logits.sigmoid().tolist())
        return [Prediction(tuple(name for name, p in shares.items() if p > 0.5), shares) for shares in found]

    def score(self, answers: Sequence[Prediction], labels: Sequence[Any]) -> float:
        return metrics.of_sets(self.metric, [(a.answer, y) for a, y in zip(answers, labels, strict=True)], self.names)

    def trivial(self) -> list[Prediction]:
        known = [label for label in self.train.labels if isinstance(label, tuple)]
        counts = Counter(one for label in known for one in set(label))
        return [Prediction(tuple(name for name in self.names if 2 * counts[name] > len(known)))] * len(self.test)


@dataclass(frozen=True, kw_only=True)
class Regression(HeadTask):
    """A number for each text. The head gives it in standard deviations from the mean of the training labels."""

    kind: ClassVar[str] = "regression"
    METRICS: ClassVar[tuple[str, ...]] = ("spearman", "pearson", "r2")

    mean: float
    deviation: float
    metric: str = "spearman"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise ValueError(f"task {self.name!r}: its labels must be numbers, and not all the same one")
        super().__post_init__()

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        known = torch.tensor([y for y in train.labels if isinstance(y, float | int)], dtype=torch.float64)
        same = len(known) == 0 or known.min() == known.max()  # rounding leaves a deviation where there is none
        mean, deviation = (0.0, 0.0) if same else (float(known.mean()), float(known.std(correction=0)))
        return cls(name=name, mean=mean, deviation=deviation, train=train, test=test, **fields)

    @property
    def outputs(self) -> int:
        return 1

    def target(self, label: Label) -> list[float]:
        if not isinstance(label, float | int) or not math.isfinite(label):
            raise ValueError(f"task {self.name!r}: the label {label!r:.80} is no finite number")
        return [(label - self.mean) / self.deviation]

    def labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.target[0] if row.target else math.nan for row in rows], dtype=torch.float32)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Squared errors, in variances of the training labels: (n, 1), (n,) -> scalar."""
        valid = ~labels.isnan()
        return ((logits.squeeze(-1) - labels.nan_to_num().to(logits)).square() * valid).sum()

    def count(self, labels: Tensor) -> int:
        return int((~labels.isnan()).sum())

    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Prediction]:
        return [Prediction(self.mean + self.deviation * value) for value in logits.squeeze(-1).tolist()]

    def score(self, answers: Sequence[Prediction], labels: Sequence[Any]) -> float:
        return metrics.of_numbers(self.metric, [answer.answer for answer in answers], [float(y) for y in labels])

    def trivial(self) -> list[Prediction]:
        return [Prediction(self.mean)] * len(self.test)


def check_label_names(task: str, names: Sequence[str], least: int = 2) -> None:
    if len(set(names)) < least or list(names) != sorted(set(names)):
        raise ValueError(
            f"task {task!r}: labels must be at least {least} different names in sorted order, got {list(names)[:8]}"
        )


def position(task: str, names: Sequence[str], label: object) -> int:
    if label not in names:
        raise ValueError(
            f"task {task!r}: label {label!r} is not among its {len(names)} labels {list(names)[:8]}: "
            "a label of the test data must also occur in the training data"
        )
    return names.index(str(label))
