"""How far a long piece of work is, on stderr, once it has taken a while; nothing where it is soon done."""

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0  # seconds


class Waiting:
    """A progress bar on a terminal; elsewhere (a notebook, a log) a line after 2, 4, 8 ... seconds and one at the end.

    Of several processes the first one speaks.

        with Waiting("factorising weights", len(weights)) as waiting:
            for weight in weights:
                ...
                waiting.done_one()
    """

    def __init__(self, title: str, total: int, *, after: float = PATIENCE, stream: TextIO | None = None) -> None:
        """``after``: seconds of silence. ``stream``: instead of stderr."""
        self.title, self.total, self.stream = title, total, stream or sys.stderr
        self.done, self.start, self.next_line = 0, time.perf_counter(), 2 * after
        self.bar: Progress | None = None
        self.plain = False
        # a timer, because the first part alone may take a minute
        self.timer = threading.Timer(after, self._begin)
        self.timer.daemon = True

    def __enter__(self) -> Self:
        if os.environ.get("RANK", "0") == "0":
            self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        if self.timer.ident is not None:  # it was started, and may be about to show
            self.timer.join()
        if self.bar is not None:
            self.bar.stop()
        if self.plain:
            self._line()

    def done_one(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        if self.plain and self.done < self.total and time.perf_counter() - self.start >= self.next_line:
            self.next_line *= 2
            self._line()

    def _begin(self) -> None:
        from rich.console import Console  # here, so that work that is soon done does not import it
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=self.stream, force_jupyter=False)  # rich's bar in a notebook would need ipywidgets
        if not console.is_interactive:
            self.plain = True
            self._line()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=console, transient=True)
        row = bar.add_task(self.title, total=self.total)
        self.bar = bar  # before its first look at what is done: what comes later is told to the bar
        bar.update(row, completed=self.done)
        bar.start()

    def _line(self) -> None:
        seconds = time.perf_counter() - self.start
        print(f"{self.title}: {self.done} of {self.total}, {seconds:.0f} s", file=self.stream, flush=True)
