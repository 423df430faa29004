"""Tasks: the data, the loss, the metric and the head of each, and the model that carries them all.

    L = sum_t w_t S_t / N_t        S_t: sum of the losses of the valid labels of task t        N_t: how many they are

S_t and N_t are kept apart until the last moment, because a mean of means is not the mean: the training loop divides
once, by the counts of the whole accumulated step of all processes.

Shapes: B batch, L tokens, D width of the backbone, C labels of one task, T tasks.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.files import checked_name, read_folder, write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING = -100  # the label id of an example that has no label for its task


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


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, in step; a label of None is missing and takes no part in losses or scores."""

    texts: Sequence[str] = ()
    labels: Sequence[str | None] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels: give one label for each text")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> "Examples":
        rows = list(rows)
        return Examples([self.texts[i] for i in rows], [self.labels[i] for i in rows])

    def split(self, share: float) -> tuple["Examples", "Examples"]:
        """(the others, `share` of the different texts), by the SHA-256 of the text: equal texts stay together."""
        keys = [hashlib.sha256(plain(text).encode()).digest() for text in self.texts]
        ranked = sorted(set(keys))
        chosen = set(ranked[: round(share * len(ranked))])
        sides = ([i for i, key in enumerate(keys) if (key in chosen) == side] for side in (False, True))
        first, second = (self.select(rows) for rows in sides)
        return first, second

    def sample(self, size: int, seed: str) -> "Examples":
        """At most `size` of them, in their order."""
        if size >= len(self):
            return self
        return self.select(sorted(random.Random(seed).sample(range(len(self)), size)))


@dataclass(frozen=True)
class Task:
    """One classification task. `labels` is the sorted tuple of its label names; a label id is a position in it."""

    name: str
    labels: tuple[str, ...]
    train: Examples = Examples()
    test: Examples = Examples()

    def __post_init__(self) -> None:
        check_names([self.name])
        if len(set(self.labels)) < 2 or list(self.labels) != sorted(set(self.labels)):
            raise ValueError(
                f"task {self.name!r}: labels must be at least two different names in sorted order, "
                f"got {list(self.labels)[:8]}"
            )
        for split in (self.train, self.test):
            self.ids(split)

    @classmethod
    def from_examples(cls, name: str, train: Examples, test: Examples) -> "Task":
        """A task whose labels are those of its training examples.

        Raises:
            ValueError: fewer than two labels in `train`, or a label in `test` that `train` does not have.
        """
        labels = {label for label in train.labels if label is not None}
        return cls(name, tuple(sorted(labels)), train, test)

    def ids(self, examples: Examples) -> list[int]:
        """The label ids of the examples; a missing label is -100."""
        index: dict[str | None, int] = {label: i for i, label in enumerate(self.labels)} | {None: MISSING}
        unknown = sorted({str(label) for label in examples.labels if label not in index})
        if unknown:
            raise ValueError(
                f"task {self.name!r}: labels {unknown[:5]} are not among its {len(self.labels)} labels "
                f"{list(self.labels)[:8]}: a label of the test data must also occur in the training data"
            )
        return [index[label] for label in examples.labels]

    def leaked(self) -> list[str]:
        """The test texts that also stand in the training data, whatever their case and white space."""
        seen = {plain(text) for text in self.train.texts}
        return [text for text in self.test.texts if plain(text) in seen]

    def head(self, width: int) -> nn.Linear:
        """A fresh linear head: (..., D) -> (..., C), small weights and zero bias."""
        head = nn.Linear(width, len(self.labels))
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the cross-entropies of the valid labels, in nats: logits (n, C), labels (n,) -> scalar."""
        return F.cross_entropy(logits, labels, ignore_index=MISSING, reduction="sum")


def plain(text: str) -> str:
    """What two texts share that count as the same: without regard to case and white space."""
    return " ".join(text.casefold().split())


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills short rows, or a ValueError where the tokenizer has none."""
    found = tokenizer.pad_token_id
    if not isinstance(found, int):
        raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token, for example to its eos_token")
    return found


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are no padding, in fp32 or better: (B, L, D), (B, L) -> (B, D)."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # (B, L, 1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TaskLogits:
    """The answers of one task of a mixed batch: which rows of the batch are its own (n,), and their logits (n, C)."""

    rows: Tensor
    logits: Tensor


class MultiTaskModel(nn.Module):
    """A text encoder, masked-mean pooling, and one linear head for each task, kept in fp32 under autocast.

    The backbone is any model of transformers that returns `last_hidden_state`; after `adapt(backbone, ...)` it takes
    the keyword `task_ids`. Without an adapter, use the backbone itself.
    """

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        tasks: Sequence[Task],
        max_length: int = 64,
    ) -> None:
        super().__init__()
        check_names([task.name for task in tasks])
        pad_id(tokenizer)
        self.backbone, self.tokenizer, self.max_length = backbone, tokenizer, max_length
        self.tasks = tuple(tasks)
        self.heads = nn.ModuleDict({task.name: task.head(backbone.config.hidden_size) for task in tasks})

    @property
    def device(self) -> torch.device:
        return next(self.heads.parameters()).device

    def index(self, task: str) -> int:
        """The id of a task, or a ValueError that lists the tasks there are."""
        names = [known.name for known in self.tasks]
        if task not in names:
            raise ValueError(f"no task {task!r} in this model: it has {', '.join(names)}")
        return names.index(task)

    def forward(self, inputs: Mapping[str, Tensor], task_ids: Tensor) -> dict[str, TaskLogits]:
        """The logits of every task that occurs in the batch: inputs (B, L) each, task_ids (B,)."""
        hidden = self.backbone(**inputs, task_ids=task_ids).last_hidden_state  # (B, L, D)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = masked_mean(hidden, inputs["attention_mask"])  # (B, D)
            answers: dict[str, TaskLogits] = {}
            for index in task_ids.unique().tolist():
                name = self.tasks[index].name
                rows = (task_ids == index).nonzero().squeeze(1)
                answers[name] = TaskLogits(rows, self.heads[name](pooled[rows]))
        return answers

    def loss_sums(self, answers: Mapping[str, TaskLogits], labels: Tensor) -> Tensor:
        """S_t of every task: labels (B,) -> (T,); 0 with finite gradients where a task has no valid label."""
        zero = next(self.heads.parameters()).new_zeros(())
        sums = [
            task.loss_sum(answers[task.name].logits, labels[answers[task.name].rows]) if task.name in answers else zero
            for task in self.tasks
        ]
        return torch.stack(sums)

    def counts(self, task_ids: Tensor, labels: Tensor) -> Tensor:
        """N_t of every task: task_ids (B,), labels (B,) -> (T,); needs no forward."""
        return torch.bincount(task_ids[labels != MISSING], minlength=len(self.tasks))


def save_heads(model: MultiTaskModel, folder: Path) -> None:
    """Write the heads and the label names of every task: safetensors and a manifest, nothing pickled."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.heads.state_dict().items()}
    tasks = [{"name": task.name, "labels": list(task.labels)} for task in model.tasks]
    write_folder(folder, {"heads": tensors}, {"polyrank": "heads", "tasks": tasks})


def load_heads(folder: Path) -> tuple[tuple[Task, ...], dict[str, Tensor]]:
    """The tasks, without data, and the weights of their heads, for `model.heads.load_state_dict`.

    Raises:
        ValueError: the folder holds something else than heads, or was changed after it was written.
    """
    tensors, manifest = read_folder(folder)
    if manifest.get("polyrank") != "heads" or "heads" not in tensors:
        raise ValueError(f"{folder} holds no heads: give the folder 'heads' of a run")
    tasks = tuple(Task(entry["name"], tuple(entry["labels"])) for entry in manifest["tasks"])
    return tasks, tensors["heads"]
