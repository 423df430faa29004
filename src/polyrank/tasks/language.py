"""Tasks that a language model answers in its own words: free text, and multiple choice by likelihood."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.tasks.base import MISSING, Prediction, Row, Task
from polyrank.tasks.examples import Examples, Label, Text

if TYPE_CHECKING:
    from polyrank.reader import LanguageReader


@dataclass(frozen=True)
class Likelihood:
    """How a model takes one completion: sum of its log-probabilities in nats, tokens, tokens it would say itself, and
    whether they are all.
    """

    log_probability: float
    tokens: int
    right: int
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """The model's own output layer answers; every token of a completion is a label."""

    def prompt(self, text: Text) -> Text:
        """What is generated after for a text that somebody asks."""
        return text

    def labels(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([token for row in rows for token in row.target], dtype=torch.long)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats: (n, V), (n,) -> scalar, n tokens of completions."""
        return F.cross_entropy(logits.float(), labels, ignore_index=MISSING, reduction="sum")

    def count(self, labels: Tensor) -> int:
        return len(labels)

    def read(self, logits: Tensor, rows: Sequence[Row]) -> list[Likelihood]:
        logits, labels = logits.detach(), self.labels(rows).to(logits.device)
        taken = -F.cross_entropy(logits.float(), labels, reduction="none")  # (n,)
        right, sizes = (logits.argmax(-1) == labels).long(), [len(row.target) for row in rows]
        parts = zip(taken.split(sizes), right.split(sizes), rows, strict=True)
        return [
            Likelihood(float(logs.sum()), len(row.target), int(hits.sum()), not row.cut) for logs, hits, row in parts
        ]


@dataclass(frozen=True, kw_only=True)
class Generation(LanguageTask):
    """Text after a prompt, after the turns of a conversation, or plain text (an empty prompt).

    On a decoder the completion follows the prompt; on an encoder-decoder the prompt goes into the encoder. The loss is
    that of the completion alone. exact_match: the share of completions, end included, that greedy decoding would give
    token for token; token_accuracy: the share of tokens it would say after the right ones before. conversations:
    whether all prompts were conversations.
    """

    kind: ClassVar[str] = "generation"
    METRICS: ClassVar[tuple[str, ...]] = ("exact_match", "token_accuracy")

    metric: str = "exact_match"
    conversations: bool = False

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        if not len(train.labelled()):
            raise ValueError(f"task {name!r}: no training example has a completion")
        fields = {"metric": "exact_match" if all(train.texts) else "token_accuracy"} | fields
        fields["conversations"] = all(not isinstance(text, str) for text in train.texts)
        return cls(name=name, train=train, test=test, **fields)

    def check(self, text: Text, label: Label) -> None:
        turns = not isinstance(text, str) and all(not isinstance(turn, str) and len(turn) == 2 for turn in text)
        if not (isinstance(text, str) or turns) or not (label is None or isinstance(label, str)):
            raise ValueError(f"task {self.name!r}: {text!r:.80} -> {label!r:.80} is no prompt with a completion")

    def rows(self, examples: Examples, reader: "LanguageReader") -> list[Row]:
        completions = [label if isinstance(label, str) else None for label in examples.labels]
        return reader.rows(examples.texts, completions, end=True)

    def prompt(self, text: Text) -> Text:
        """Where conversations were learned, a plain text is a user's first turn."""
        return (("user", text),) if self.conversations and isinstance(text, str) else text

    def score(self, answers: Sequence[Likelihood], labels: Sequence[Any]) -> float:
        if self.metric == "exact_match":
            return sum(a.whole and a.right == a.tokens for a in answers) / len(answers) if answers else 0.0
        return sum(a.right for a in answers) / max(1, sum(a.tokens for a in answers))

    def trivial(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(LanguageTask):
    """Which of several options: the one whose tokens the model finds most likely after the prompt.

    Training takes the right option as the completion. A text is (prompt, (option, ...)), a label the index of the right
    one. normalise: "none" compares sums of log-probabilities, "tokens" their means, which favours no short option.
    """

    kind: ClassVar[str] = "multiple_choice"
    METRICS: ClassVar[tuple[str, ...]] = ("accuracy",)

    metric: str = "accuracy"
    normalise: str = "none"

    def __post_init__(self) -> None:
        if self.normalise not in ("none", "tokens"):
            raise ValueError(f"task {self.name!r}: normalise is 'none' or 'tokens', not {self.normalise!r}")
        super().__post_init__()

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples, **fields: Any) -> Self:
        if not len(train.labelled()):
            raise ValueError(f"task {name!r}: no training example has an answer")
        return cls(name=name, train=train, test=test, **fields)

    def check(self, text: Text, label: Label) -> None:
        if isinstance(text, str) or len(text) != 2 or isinstance(text[1], str) or len(text[1]) < 2:
            raise ValueError(f"task {self.name!r}: {text!r:.80} is no prompt with two or more options")
        if len(set(text[1])) < len(text[1]) or not all(isinstance(one, str) and one.strip() for one in text[1]):
            raise ValueError(f"task {self.name!r}: the options {text[1]!r:.80} are not all different, or one is empty")
        if label is not None and not (isinstance(label, int) and 0 <= label < len(text[1])):
            raise ValueError(f"task {self.name!r}: {label!r} is no index of the {len(text[1])} options")

    def rows(self, examples: Examples, reader: "LanguageReader") -> list[Row]:
        prompts = [text[0] for text in examples.texts]
        right = [
            str(text[1][label]) if isinstance(label, int) else None
            for text, label in zip(examples.texts, examples.labels, strict=True)
        ]
        return reader.rows(prompts, right, end=False)

    def candidates(self, examples: Examples, reader: "LanguageReader") -> list[Row]:
        """One row for each option of each example."""
        pairs = [(text[0], str(option)) for text in examples.texts for option in text[1]]
        return reader.rows([prompt for prompt, _ in pairs], [option for _, option in pairs], end=False)

    def answers(self, read: Sequence[Likelihood], examples: Examples) -> list[Prediction]:
        """The likeliest option, and the softmax over what was compared."""
        out, start = [], 0
        for text in examples.texts:
            options = text[1]
            found = read[start : start + len(options)]
            start += len(options)
            logs = torch.tensor([one.log_probability for one in found], dtype=torch.float64)
            if self.normalise == "tokens":
                logs = logs / torch.tensor([one.tokens for one in found])
            best, shares = int(logs.argmax()), logs.softmax(0).tolist()
            out.append(Prediction(str(options[best]), dict(zip(map(str, options), shares, strict=True)), best))
        return out

    def score(self, answers: Sequence[Prediction], labels: Sequence[Any]) -> float:
        return sum(a.option == y for a, y in zip(answers, labels, strict=True)) / len(answers) if answers else 0.0

    def trivial(self) -> list[Prediction]:
        most = Counter(label for label in self.train.labels if isinstance(label, int)).most_common(1)
        return [Prediction("", option=most[0][0] if most else 0)] * len(self.test)
