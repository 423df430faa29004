"""A tag for each word of a text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from polyrank.tasks import metrics
from polyrank.tasks.base import MISSING, Prediction, Row
from polyrank.tasks.examples import Examples, Label, Text
from polyrank.tasks.heads import OfClasses, position

if TYPE_CHECKING:
    from polyrank.reader import HeadReader


@dataclass(frozen=True, kw_only=True)
class TokenClassification(OfClasses):
    """A tag for each word. A word's feature is that of its first token; words beyond `max_length` get no tag."""

    kind: ClassVar[str] = "token_classification"
    METRICS: ClassVar[tuple[str, ...]] = ("entity_f1", "accuracy")

    metric: str = "accuracy"

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        names = {str(tag) for label in train.labels if isinstance(label, tuple) for tag in label}
        spans = "O" in names and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in names)
        fields = {"metric": "entity_f1" if spans else "accuracy"} | fields
        return cls(name=name, names=tuple(sorted(names)), train=train, test=test, **fields)

    def check(self, text: Text, label: Label) -> None:
        if isinstance(text, str) or not all(isinstance(word, str) for word in text):
            raise ValueError(f"task {self.name!r}: {text!r:.80} is no list of words")
        if label is not None and (not isinstance(label, tuple) or len(label) != len(text)):
            raise ValueError(f"task {self.name!r}: {len(text)} words {text!r:.80} need as many tags, got {label!r:.80}")
        if label is not None:
            self.target(label)

    def target(self, label: Label) -> list[int]:
        return [position(self.name, self.names, tag) for tag in label] if isinstance(label, tuple) else []

    def rows(self, examples: Examples, reader: "HeadReader") -> list[Row]:
        rows = []
        for (ids, marks), label in zip(reader.encode_words(examples.texts), examples.labels, strict=True):
            rows.append(Row(ids, self.target(label)[: len(marks)], marks=marks))
        return rows

    def features(self, hidden: Tensor, pooled: Tensor, words: Tensor | None, rows: Tensor) -> Tensor:
        if words is None:
            return hidden.new_zeros(0, hidden.shape[-1])
        row, word = (words[rows] >= 0).nonzero(as_tuple=True)
        return hidden[rows][row, words[rows][row, word]]

    def labels(self, rows: Sequence[Row]) -> Tensor:
        flat = [tag for row in rows for tag in (row.target or [MISSING] * len(row.marks))]
        return torch.tensor(flat, dtype=torch.long)

    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Prediction]:
        parts = logits.argmax(-1).split([len(row.marks) for row in rows])
        return [Prediction(tuple(self.names[tag] for tag in part.tolist())) for part in parts]

    def score(self, answers: Sequence[Prediction], labels: Sequence[Any]) -> float:
        """Words that were cut off count as wrong: as tagged with nothing."""
        full = [
            (*answer.answer, *[""] * (len(y) - len(answer.answer))) for answer, y in zip(answers, labels, strict=True)
        ]
        if self.metric == "entity_f1":
            return metrics.entity_f1(list(zip(full, labels, strict=True)))
        pairs = [pair for found, y in zip(full, labels, strict=True) for pair in zip(found, y, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0

    def trivial(self) -> list[Prediction]:
        counts = Counter(tag for label in self.train.labels if isinstance(label, tuple) for tag in label)
        most = counts.most_common(1)[0][0] if counts else self.names[0]
        return [Prediction((most,) * len(words)) for words in self.test.texts]
