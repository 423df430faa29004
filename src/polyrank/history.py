"""What happened in a training run: kept in memory, written to metrics.jsonl, shown as a progress bar."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polyrank.files import write_text


@dataclass
class History:
    """One entry per step and per look at the held-out examples, and which step was kept (0: before training)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_score: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0


Track = Callable[[dict[str, float], int], None]


def silent(numbers: dict[str, float], step: int) -> None:
    """No tracker."""


class Log:
    """Fills a history, writes metrics.jsonl and moves the progress bar; only the first process writes and shows."""

    def __init__(
        self, folder: Path | None, progress: bool, steps: int, main: bool, first: int = 0, track: Track = silent
    ) -> None:
        """`first`: the step that a resumed run goes on from; the lines up to it stay, later ones will come again.

        `track`: takes every line's numbers, and its step.
        """
        self.history, self.first, self.main, self.track = History(), first, main, track
        self.path = folder / "metrics.jsonl" if folder is not None and main else None
        columns = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(
            TextColumn("training"), BarColumn(), *columns, transient=True, disable=not (progress and main)
        )
        self.row = self.bar.add_task("training", total=steps, note="")
        self.start, self.held = time.perf_counter(), ""

    def __enter__(self) -> "Log":
        if self.path is not None:
            self._keep(self.path)
        self.bar.update(self.row, completed=self.first)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.history.seconds = time.perf_counter() - self.start

    def _keep(self, path: Path) -> None:
        """Cut the file after the step that training goes on from."""
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text(encoding="utf-8").splitlines() if self.first and path.is_file() else []
        kept = [line for line in old if (entry := _entry(line)) is not None and entry["step"] <= self.first]
        for line in kept:
            entry = json.loads(line)
            (self.history.steps if "loss" in entry else self.history.evaluations).append(entry)
        if kept:
            self.start -= json.loads(kept[-1])["seconds"]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def say(self, message: str) -> None:
        """A line above the progress bar; the first process speaks."""
        if self.main:
            self.bar.console.print(message, style="dim", highlight=False, markup=False)

    def step(
        self,
        step: int,
        loss: float,
        losses: dict[str, float],
        lr: float,
        norm: float,
        taken: bool,
        combined: dict[str, Any],
    ) -> None:
        """combined: weights and cosines of the tasks, where a combiner decides."""
        self.history.skipped += not taken
        self.history.skipped_in_a_row = 0 if taken else self.history.skipped_in_a_row + 1
        self.bar.update(self.row, completed=step, note=f"loss {loss:.3f}{self.held}")
        by_task = {name: _finite(value) for name, value in losses.items()}
        entry = {"step": step, "loss": _finite(loss), "losses": by_task, "lr": lr, "gradient_norm": _finite(norm)}
        self.history.steps.append(self._write({**entry, **_finite_all(combined), "skipped": not taken}))

    def evaluation(self, step: int, scores: dict[str, float], found: float) -> None:
        self.held = f"  held-out {found:.3f}"
        self.history.evaluations.append(self._write({"step": step, "held_out": scores, "held_out_mean": found}))

    def _write(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry["seconds"] = round(time.perf_counter() - self.start, 3)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")
        self.track(dict(_flat(entry)), entry["step"])
        return entry


def _flat(entry: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line by name, those inside others with a bar: losses/news."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "seconds"):
            yield f"{above}{key}", float(value)


def _entry(line: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl, or None for the torn last line of a killed run."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _finite_all(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: _finite_all(one) if isinstance(one, dict) else _finite(one) for key, one in numbers.items()}


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: null."""
    return value if math.isfinite(value) else None
