"""The models that carry tasks: a backbone with a head for each task, or a language model that answers by itself.

Without an adapter they are the frozen model; after `adapt(model.backbone, ...)` every row is computed for its task.
Shapes: B batch, L tokens, D width of the backbone, V vocabulary, n labels of one task in the batch, T tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from polyrank.files import read_folder, write_folder
from polyrank.mixture import context_of
from polyrank.reader import CausalReader, HeadReader, LanguageReader, Reader, Seq2SeqReader, Side
from polyrank.tasks import KINDS, HeadTask, LanguageTask, Task, Text, check_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONS = "max_position_embeddings"  # in configurations, also under older names
Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Answer:
    """What the model says about one task of a mixed batch: the task's rows in it (b,), and their logits (n, ...)."""

    rows: Tensor
    logits: Tensor


class MultiTaskModel(nn.Module, ABC):
    """A backbone, the reader of its texts, the tasks, and their heads (none for a language model)."""

    def __init__(self, backbone: "PreTrainedModel", tasks: Sequence[Task]) -> None:
        super().__init__()
        check_names([task.name for task in tasks])
        self.backbone, self.tasks = backbone, tuple(tasks)
        self.heads = nn.ModuleDict()

    @property
    @abstractmethod
    def reader(self) -> Reader: ...

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def index(self, task: str) -> int:
        """The id of a task, or a ValueError that lists the tasks there are."""
        names = [known.name for known in self.tasks]
        if task not in names:
            raise ValueError(f"no task {task!r} in this model: it has {', '.join(names)}")
        return names.index(task)

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], task_ids: Tensor) -> dict[str, Answer]:
        """The answers of every task that occurs in the batch: inputs of the reader, task_ids (B,)."""

    def loss_sums(self, answers: Mapping[str, Answer], labels: Mapping[str, Tensor]) -> Tensor:
        """S_t of every task (T,): 0 with finite gradients where a task has no valid label."""
        zero = torch.zeros((), device=self.device)
        sums = [
            task.loss_sum(answers[task.name].logits, labels[task.name]) if task.name in answers else zero
            for task in self.tasks
        ]
        return torch.stack(sums)

    def counts(self, labels: Mapping[str, Tensor]) -> Tensor:
        """N_t of every task (T,); needs no forward."""
        return torch.tensor([task.count(labels[task.name]) if task.name in labels else 0 for task in self.tasks])

    def _of_tasks(self, task_ids: Tensor) -> list[tuple[Task, Tensor]]:
        """The tasks that occur, and the rows of each."""
        return [(self.tasks[i], (task_ids == i).nonzero().squeeze(1)) for i in task_ids.unique().tolist()]


class HeadModel(MultiTaskModel):
    """A text model that returns `last_hidden_state`, and a linear head for each task, in fp32 also under autocast."""

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        tasks: Sequence[Task],
        max_length: int = 64,
        pooling: Pooling = "mean",
        truncation: Side = "right",
    ) -> None:
        """pooling: over the tokens that are no padding; "last" for decoders, which see all of a text only there."""
        super().__init__(backbone, tasks)
        self._reader = HeadReader(tokenizer, max_length, truncation)
        self.pooling: Pooling = pooling
        width = backbone.config.hidden_size
        self.heads = nn.ModuleDict({task.name: task.head(width) for task in tasks if isinstance(task, HeadTask)})

    @property
    def reader(self) -> HeadReader:
        return self._reader

    def hidden(self, inputs: Mapping[str, Tensor], task_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last hidden state (B, L, D), and its pooled rows (B, D), both fp32 or better."""
        given = {key: value for key, value in inputs.items() if key != "words"}
        route = {"task_ids": task_ids} if task_ids is not None and context_of(self.backbone) is not None else {}
        hidden = self.backbone(**given, **route).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return hidden, pool(hidden, inputs["attention_mask"], self.pooling)

    def forward(self, inputs: Mapping[str, Tensor], task_ids: Tensor) -> dict[str, Answer]:
        hidden, pooled = self.hidden(inputs, task_ids)
        answers: dict[str, Answer] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            for task, rows in self._of_tasks(task_ids):
                assert isinstance(task, HeadTask)
                features = task.features(hidden, pooled, inputs.get("words"), rows)
                answers[task.name] = Answer(rows, self.heads[task.name](features))
        return answers


class LanguageModel(MultiTaskModel):
    """A causal or an encoder-decoder language model; its own output layer answers every task."""

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        tasks: Sequence[Task],
        max_length: int = 256,
        truncation: Side = "left",
    ) -> None:
        super().__init__(backbone, tasks)
        config = backbone.config
        if config.is_encoder_decoder:
            self._reader: LanguageReader = Seq2SeqReader(
                tokenizer, max_length, truncation, config.decoder_start_token_id
            )
        else:
            self._reader = CausalReader(tokenizer, max_length, truncation)
        self.takes = set(signature(backbone.forward).parameters)

    @property
    def reader(self) -> LanguageReader:
        return self._reader

    def forward(self, inputs: Mapping[str, Tensor], task_ids: Tensor) -> dict[str, Answer]:
        given: dict[str, Any] = {key: value for key, value in inputs.items() if key in self.takes}
        if context_of(self.backbone) is not None:
            given["task_ids"] = task_ids
            if "prompt_mask" in inputs:
                given["prompt_mask"] = inputs["prompt_mask"]
        logits = self.backbone(**given, use_cache=False).logits
        if "logits_to_keep" in inputs and "logits_to_keep" not in self.takes:
            logits = logits[:, inputs["logits_to_keep"]]
        targets = inputs["targets"]  # (B, K), where logits (B, K, V) have a label
        return {task.name: Answer(rows, logits[rows][targets[rows]]) for task, rows in self._of_tasks(task_ids)}

    def _ends(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and the model's own."""
        own = self.backbone.generation_config.eos_token_id
        return sorted({self.reader.end_id, *(own if isinstance(own, list) else [] if own is None else [own])})

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Text], task_ids: Tensor, *, max_new_tokens: int = 64, num_beams: int = 1, **options: Any
    ) -> list[str]:
        """What the model says after each prompt, by greedy or beam search unless `options` of transformers'
        `generate` say otherwise (do_sample=True, temperature=...). task_ids (B,): tasks may be mixed.

        Raises:
            ValueError: a prompt that fills the model's positions.
        """
        tasks = [self.tasks[i] for i in task_ids.tolist()]
        prompts = [
            task.prompt(text) if isinstance(task, LanguageTask) else text
            for task, text in zip(tasks, prompts, strict=True)
        ]
        rows = self.reader.rows(prompts, [None] * len(prompts), end=False)
        inputs = {key: value.to(self.device) for key, value in self.reader.collate(rows).items()}
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        config = self.backbone.config
        places = config.to_dict().get(config.attribute_map.get(POSITIONS, POSITIONS))
        if isinstance(places, int) and not config.is_encoder_decoder:
            room = places - given["input_ids"].shape[1]
            if room < 1:
                raise ValueError(f"the longest prompt leaves no place to write: the model has {places} positions")
            max_new_tokens = min(max_new_tokens, room)
        context = context_of(self.backbone)
        route = nullcontext() if context is None else context.on(task_ids.to(self.device), given["attention_mask"])
        training = self.training
        self.eval()
        with route:
            found = self.backbone.generate(  # type: ignore[operator]
                **given,
                **{"do_sample": False, **options},
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                pad_token_id=self.reader.pad_id,
                eos_token_id=self._ends(),
            )
        self.train(training)
        start = 0 if self.backbone.config.is_encoder_decoder else given["input_ids"].shape[1]
        return [text.strip() for text in self.reader.tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each row from the tokens that are no padding: (B, L, D), (B, L) -> (B, D)."""
    if pooling == "mean":
        return masked_mean(hidden, mask)
    places = torch.arange(mask.shape[1], device=mask.device)
    at = (places * mask).argmax(1) if pooling == "last" else mask.argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are no padding, in fp32 or better: (B, L, D), (B, L) -> (B, D)."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # (B, L, 1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def save_heads(model: MultiTaskModel, folder: Path) -> None:
    """Write the heads, the tasks with their label names, and how texts are read: nothing pickled."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.heads.state_dict().items()}
    reading = {"max_length": model.reader.max_length, "truncation": model.reader.truncation}
    if isinstance(model, HeadModel):
        reading["pooling"] = model.pooling
    manifest = {"polyrank": "heads", "tasks": [task.bare() for task in model.tasks], "reading": reading}
    write_folder(folder, {"heads": tensors}, manifest)


def load_heads(folder: Path) -> tuple[tuple[Task, ...], dict[str, Any], dict[str, Tensor]]:
    """The tasks, without data; how their texts are read; and the weights, for `model.heads.load_state_dict`.

    Raises:
        ValueError: the folder holds something else than heads, or was changed after it was written.
    """
    tensors, manifest = read_folder(folder)
    if manifest.get("polyrank") != "heads" or "heads" not in tensors:
        raise ValueError(f"{folder} holds no heads: give the folder 'heads' of a run")
    return tuple(_task(entry) for entry in manifest["tasks"]), manifest["reading"], tensors["heads"]


def _task(entry: Mapping[str, Any]) -> Task:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "type"}
    return KINDS[entry["type"]](**fields)
