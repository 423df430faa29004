"""What training carries from one step to the next, and how it goes into a checkpoint and back."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyrank.checkpoint import Checkpoint, CheckpointError, load_optimizer, newest, optimizer_tensors
from polyrank.combining import Combination
from polyrank.history import History, Log
from polyrank.methods.base import Hears
from polyrank.models import MultiTaskModel
from polyrank.retaining import Retaining


class Trainable(Protocol):
    """What the loop needs of an adapter."""

    def losses(self) -> dict[str, Tensor]: ...
    @property
    def hears(self) -> Hears: ...
    @property
    def mixes_samples(self) -> bool: ...
    def unheard(self) -> AbstractContextManager[None]: ...
    def adding(self) -> AbstractContextManager[None]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def frozen_tensors(self) -> dict[str, Tensor]: ...
    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]: ...
    @property
    def settles(self) -> float: ...
    def before_step(self, done: float) -> None: ...
    def after_step(self) -> None: ...
    def after_task(self) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
    def shared_parameters(self) -> Iterator[nn.Parameter]: ...
    def enable_checkpointing(self) -> None: ...


class Best:
    """The best state on the held-out examples, kept in main memory; of equals the later, without examples the last.

    Of tasks in sequence it is the last one that was looked at.
    """

    def __init__(self, model: MultiTaskModel, adapter: Trainable) -> None:
        self.model, self.adapter, self.step, self.score = model, adapter, 0, -math.inf
        self.weights: dict[str, dict[str, Tensor]] = {}

    def beats(self, score: float) -> bool:
        """Whether no earlier weights scored more."""
        return not score < self.score

    def keep(self, step: int, score: float) -> None:
        """The present weights are the ones to put back."""
        self.step, self.score = step, score
        self.weights = {
            name: {key: value.detach().cpu().clone() for key, value in state.items()}
            for name, state in (("adapter", self.adapter.state_dict()), ("heads", self.model.heads.state_dict()))
        }

    def restore(self) -> None:
        self.adapter.load_state_dict(self.weights["adapter"])
        self.model.heads.load_state_dict(self.weights["heads"])


class Running:
    """The weights, the optimiser, the best state so far, and the counters."""

    def __init__(
        self,
        model: MultiTaskModel,
        adapter: Trainable,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        identity: str,
        combination: Combination | None = None,
        retaining: Retaining | None = None,
    ) -> None:
        """identity: what must be equal in the run that a checkpoint comes from."""
        self.identity, self.combination, self.retaining = identity, combination, retaining
        self.model, self.adapter, self.optimizer, self.accumulation = model, adapter, optimizer, accumulation
        self.best = Best(model, adapter)
        self.skipped, self.skipped_in_a_row = 0, 0
        self.messages: list[str] = []

    def checkpoint(self, step: int, history: History) -> Checkpoint:
        tensors = {
            "adapter": self.adapter.state_dict(),
            "heads": self.model.heads.state_dict(),
            "best_adapter": self.best.weights["adapter"],
            "best_heads": self.best.weights["heads"],
            "optimizer": optimizer_tensors(self.optimizer),
            "combiner": {} if self.combination is None else self.combination.state,
            "retaining": {} if self.retaining is None else self.retaining.state,
        }
        numbers = {
            "best": [self.best.step, self.best.score if math.isfinite(self.best.score) else None],
            "skipped": [history.skipped, history.skipped_in_a_row],
            "accumulation": self.accumulation,
            "identity": self.identity,
        }
        return Checkpoint(step, tensors, numbers)

    def restore(self, folder: Path) -> int:
        """Load the newest complete checkpoint of a run folder; returns its step, or 0 where there is none.

        Raises:
            CheckpointError: it belongs to another model, method or list of tasks.
        """
        found, passed_over = newest(folder)
        self.messages += [f"a checkpoint was passed over: {reason}" for reason in passed_over]
        if found is None:
            self.messages.append(f"no checkpoint in {folder}: training starts from its first step")
            return 0
        try:
            if found.numbers["identity"] != self.identity:
                raise ValueError("the settings, tasks, examples or the base model are not those it began with")
            self.adapter.load_state_dict(found.tensors["adapter"])
            self.model.heads.load_state_dict(found.tensors["heads"])
            load_optimizer(self.optimizer, found.tensors.get("optimizer", {}))
            if self.combination is not None:
                self.combination.state = found.tensors.get("combiner", {})
            if self.retaining is not None:
                self.retaining.state = found.tensors.get("retaining", {})
        except (ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint of step {found.step} in {folder} is of another run: {error}"
            ) from error
        self.best.weights = {name: found.tensors[f"best_{name}"] for name in ("adapter", "heads")}
        self.best.step, score = found.numbers["best"]
        self.best.score = -math.inf if score is None else score
        self.skipped, self.skipped_in_a_row = found.numbers["skipped"]
        self.accumulation = found.numbers["accumulation"]
        self.messages.append(f"going on from the checkpoint of step {found.step}")
        return found.step

    def start(self, log: Log) -> None:
        """Put into the log what a resumed run starts from."""
        best = self.best.score if math.isfinite(self.best.score) else 0.0
        log.history.best_step, log.history.best_score = self.best.step, best
        log.history.skipped, log.history.skipped_in_a_row = self.skipped, self.skipped_in_a_row
        for message in self.messages:
            log.say(message)
