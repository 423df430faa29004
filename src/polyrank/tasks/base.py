"""What a task is: data, the rows it makes of them, a loss, and a score.

    L = sum_t w_t S_t / N_t        S_t: sum of the losses of the valid labels of task t        N_t: how many they are

S_t and N_t are kept apart until the last moment, because a mean of means is not the mean: the training loop divides
once, by the counts of the whole accumulated step of all processes.

Everything behind the model is flat: the logits of a task are (n, ...), one entry for each label of its rows, whether a
row has one label or one for each word or token. Shapes: B batch, L tokens, D width, C labels of one task, n labels.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from polyrank.files import checked_name
from polyrank.tasks.examples import Examples, Label, Text, plain

MISSING = -100  # the label id of what has no label


@dataclass(frozen=True)
class Row:
    """One tokenized text.

    ids (L,); target: what the loss compares with, empty where the label is missing; types: token type ids of pairs,
    where the tokenizer gives them; marks: the positions in `ids` of the words that are asked about; cut: whether some
    of the target was left out.
    """

    ids: list[int]
    target: list[int] | list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    cut: bool = False


@dataclass(frozen=True)
class Prediction:
    """An answer, the probability of each possible one where they are few, and its place among given options."""

    answer: Any
    probabilities: dict[str, float] = field(default_factory=dict)
    option: int = -1


def check_names(names: Sequence[str]) -> None:
    """Refuse task names that cannot be file names, parameter names and table columns everywhere.

    Raises:
        ValueError: no names; a name that `checked_name` refuses; two names that are equal up to their case.
    """
    if not names:
        raise ValueError("no tasks were given: give at least one")
    seen: dict[str, str] = {}
    for name in names:
        checked_name(name, "task")
        if name.lower() in seen:
            raise ValueError(f"task names {seen[name.lower()]!r} and {name!r} clash: rename one of them")
        seen[name.lower()] = name


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One task. `metric` is one of METRICS; each is better the higher it is."""

    kind: ClassVar[str]
    METRICS: ClassVar[tuple[str, ...]]

    name: str
    metric: str = ""
    train: Examples = field(default_factory=Examples)
    test: Examples = field(default_factory=Examples)

    def __post_init__(self) -> None:
        check_names([self.name])
        if self.metric not in self.METRICS:
            raise ValueError(
                f"task {self.name!r}: no metric {self.metric!r} for {self.kind}: {', '.join(self.METRICS)}"
            )
        for split in (self.train, self.test):
            for text, label in zip(split.texts, split.labels, strict=True):
                self.check(text, label)

    @classmethod
    @abstractmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        """A task whose labels and the like are those of its training examples.

        Raises:
            ValueError: examples that are not of this kind of task.
        """

    @abstractmethod
    def check(self, text: Text, label: Label) -> None:
        """Raise a ValueError where an example is not of this kind of task."""

    @abstractmethod
    def rows(self, examples: Examples, reader: Any) -> list[Row]:
        """The rows to train on, one for each example; `reader` is of the kind that the task's model has."""

    def candidates(self, examples: Examples, reader: Any) -> list[Row]:
        """The rows to score."""
        return self.rows(examples, reader)

    @abstractmethod
    def labels(self, rows: Sequence[Row]) -> Tensor:
        """The labels of some rows, (n, ...), in the order of the logits."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of the valid labels: (n, ...), (n, ...) -> scalar."""

    @abstractmethod
    def count(self, labels: Tensor) -> int:
        """How many labels are valid."""

    @abstractmethod
    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Any]:
        """What the logits of some rows say, one entry a row."""

    def answers(self, read: Sequence[Any], examples: Examples) -> list[Any]:
        """One answer for each example, from what was read of all rows to be scored."""
        return list(read)

    @abstractmethod
    def score(self, answers: Sequence[Any], labels: Sequence[Any]) -> float:
        """The metric; every label is there."""

    @abstractmethod
    def trivial(self) -> list[Any] | None:
        """The answers to the test examples of one who never reads them, or None where there is no such thing."""

    def leaked(self) -> list[Text]:
        """The test texts that also stand in the training data, whatever their case and white space."""
        seen = {plain(text) for text in self.train.texts}
        return [text for text in self.test.texts if plain(text) in seen]

    def bare(self) -> dict[str, Any]:
        """Everything but the data, for files."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("train", "test")}
        return {"type": self.kind, **own}
