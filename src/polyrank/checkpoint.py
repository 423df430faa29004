"""Checkpoints of a run: whole or not there, and a resumed run equals an uninterrupted one bit for bit.

    RUN/checkpoints/step-000100/    adapter, heads, best_adapter, best_heads, optimizer .safetensors   manifest.json

What is not in the files is arithmetic: the rates, the examples and the noise of step n are functions of (seed, n).
"""

import re
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from polyrank.files import read_folder, write_folder

FOLDER = "checkpoints"
KEPT = 2  # the newest, and one before it


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or does not belong to this run. The message says what to do."""


class Interrupted(RuntimeError):
    """Training stopped on a signal, after its state was written. `signum` is the signal's number."""

    def __init__(self, signum: int, step: int, folder: Path, part: Path | None = None) -> None:
        """part: the run inside ``folder`` that was under way, where it was not the folder's own."""
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; the state is in {(part or folder) / FOLDER}")
        self.signum, self.step, self.folder = signum, step, folder


@dataclass(frozen=True)
class Checkpoint:
    """What training carries from one step to the next: tensors by file and name, and numbers for JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors "index.name": moments and step counts."""
    return {
        f"{index}.{key}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the groups and their rates stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(run: Path, new: Checkpoint) -> None:
    """Write a checkpoint and remove all but the newest two.

    Raises:
        CheckpointError: no space, no permission; the older checkpoints stand.
    """
    place = run / FOLDER / f"step-{new.step:06d}"
    try:
        # what a killed process left, and what a resumed run has passed over as damaged: a run folder has one writer
        unusable = [folder for step, folder in checkpoints(run) if step >= new.step]
        for left in (*place.parent.glob(".step-*"), *unusable):
            shutil.rmtree(left, ignore_errors=True)
        write_folder(
            place,
            {file: group for file, group in new.tensors.items() if group},
            {"polyrank": "checkpoint", "step": new.step, "numbers": new.numbers},
        )
        for _, old in checkpoints(run)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint of step {new.step} cannot be written to {place.parent}: {reason(error)}. "
            "The older ones are whole: make room, or write permission, then continue with --resume"
        ) from error


def refuse_checkpoints(run: Path) -> int:
    """0, the step that a new run begins with, where no earlier run left its state.

    Raises:
        CheckpointError: one did.
    """
    if found := checkpoints(run):
        raise CheckpointError(
            f"{run} holds the state of an earlier run at step {found[-1][0]}: go on from it with resume=True, or take "
            "another folder"
        )
    return 0


def reason(error: Exception) -> str:
    """An error of the operating system without its number, any other as it is."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what looks like a checkpoint, oldest first; what a killed process left aside does not."""
    found = [
        (int(match[1]), entry)
        for entry in (run / FOLDER).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", entry.name))
    ]
    return sorted(found)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, every byte verified, and why newer ones were passed over."""
    passed: list[str] = []
    for step, folder in reversed(checkpoints(run)):
        try:
            tensors, manifest = read_folder(folder)
            if manifest.get("polyrank") != "checkpoint" or manifest.get("step") != step:
                raise ValueError(f"{folder} is not the checkpoint of step {step}")
        except (ValueError, OSError) as error:
            passed.append(str(error))
            continue
        return Checkpoint(step, tensors, manifest["numbers"]), passed
    return None, passed


class Signals:
    """While open, Ctrl-C and SIGTERM only leave a note, for the loop to read between two steps; a second Ctrl-C stops.

    Without a place to save to, and in a thread other than the main one, where Python has no signals, it does nothing.
    """

    def __init__(self, active: bool) -> None:
        self.active, self.received = active and threading.current_thread() is threading.main_thread(), 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if self.active:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and kind is None:  # it came after the last look: not lost
            signal.raise_signal(self.received)
