"""Time and memory that can be compared: candidates side by side in one process, ratios of the same round.

Timings of one candidate after the other compare the hours of a machine, not the candidates. Here every round runs all
of them in random order, and what is reported is the median over the rounds of the ratio within a round. On one thread
the process's own CPU time is counted, so a neighbour on the machine hardly shows; on several threads the wall clock
is; on a GPU, the events of its stream. Bytes are counted, not sampled: they are the same in every run.
"""

import gc
import random
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One candidate's seconds in each round; those of all candidates of a comparison stand in the same order."""

    seconds: tuple[float, ...]

    @property
    def typical(self) -> float:
        return median(self.seconds)

    def over(self, other: "Timing") -> "Ratio":
        """How many times as long as ``other``, round by round."""
        every = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        return Ratio(median(every), every[len(every) // 4], every[(3 * len(every)) // 4])


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of all rounds, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def compare(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 11,
    enough: float = 20.0,
    least: float = 0.005,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Timing]:
    """Time all candidates in turn, in a new random order each round.

    Args:
        candidates: calls without arguments by name, each of which is one measured thing.
        rounds: how many, after two that are not counted.
        enough: seconds after which no further round begins, once five are counted.
        least: a candidate that takes less seconds than this is repeated within a round until it does.
        device: "cpu" or "cuda".
    """
    clock = _on_gpu if device == "cuda" else _on_cpu
    repeats = {name: _repeats(run, clock, least) for name, run in candidates.items()}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    order, dice, begin = list(candidates), random.Random(seed), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while len(found[order[0]]) < rounds and (len(found[order[0]]) < 5 or time.perf_counter() - begin < enough):
            dice.shuffle(order)
            for name in order:
                found[name].append(clock(candidates[name], repeats[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def _on_cpu(run: Candidate, repeats: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats


def _on_gpu(run: Candidate, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def _repeats(run: Candidate, clock: Callable[[Candidate, int], float], least: float) -> int:
    """Two calls that are not counted, and how many of them fill ``least``."""
    clock(run, 1)
    return max(1, min(200, round(least / max(clock(run, 1), 1e-7))))


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each piece of memory once: ``with SavedBytes(known) as saved``.

    ``known`` are tensors that live anyway (weights, inputs) and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._seen: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in self._known:
            self._seen[memory.data_ptr()] = memory.nbytes()
        self._alive.append(tensor)
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.total = sum(self._seen.values())
        self._alive.clear()


class PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at once of what operations inside the block made: ``with PeakBytes() as peak``.

    What one operation allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                key = memory._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = memory.nbytes()
                    self._now += memory.nbytes()
                    weakref.finalize(memory, self._free, key)
        self.total = max(self.total, self._now)
        return output

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
