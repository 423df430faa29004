"""Small training runs in one process or in two that meet over gloo; in a module of its own, for processes to import.

A cell is one run: a method, whether texts and labels are ragged, which tasks each half of a step has, a combiner, and
how the base is kept. Half a step is what one of two processes gets, so the same run in one process sees the same steps.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import polyrank.methods.smora
import polyrank.step
import polyrank.train
import tiny
from polyrank import adapt
from polyrank.combining import Apart
from polyrank.corpus import Corpus
from polyrank.methods import CLoRAE, MoA, MoLA
from polyrank.mixing import Mixing, Pick
from polyrank.mixture import LowRankMixture
from polyrank.processes import ProcessFailed, Together, joined, launched
from polyrank.tasks import Classification, Examples
from polyrank.train import train
from polyrank.training import Training
from small import METHODS

OWN = {
    "mola": MoLA(num_experts=(4,), k=2, rank=2, alpha=4, balance=0.1),
    "moa": MoA(rank=2, alpha=4, router_loss=0.5),
    "c_lorae": CLoRAE(rank=2, task_rank=2, alpha=4, mutual_information=0.5),
}
LAYOUTS = {"mixed": ((0, 1, 2), (0, 1, 2)), "apart": ((0,), (1,)), "absent": ((0, 1), (0, 1, 2))}
HALF = 4


@dataclass(frozen=True)
class Cell:
    """One run. ``mutation``: which mend is taken away; ``event``: what happens to the second process."""

    method: str = "lora"
    tokens: str = "ragged"
    layout: str = "mixed"
    combine: str | None = None
    sharding: str = "none"
    mutation: str | None = None
    event: str | None = None
    accumulation: int = 1
    steps: int = 30

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


class Halves:
    """A sampler whose steps have the tasks of a layout in each half."""

    smallest = 2 * HALF

    def __init__(self, lengths: Sequence[Sequence[int]], layout: str) -> None:
        self.lengths, self.layout = lengths, layout

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]:
        rng = random.Random(f"{self.layout}/{step}")
        picks = []
        for tasks in LAYOUTS[self.layout]:
            own = [*tasks, *rng.choices(tasks, k=HALF - len(tasks))]
            rng.shuffle(own)
            picks += [(task, rng.randrange(len(self.lengths[task]))) for task in own]
        return picks[part * len(picks) // parts : (part + 1) * len(picks) // parts]


def tasks(ragged: bool) -> list[Classification]:
    """Three tasks; ragged: sentences of 2 to 8 words, and every third label is missing."""

    def examples(words: tuple[str, ...], seed: int) -> Examples:
        rng = random.Random(seed)
        labels = [words[i % len(words)] for i in range(18)]
        if ragged:
            texts = [tiny.sentence(label, rng) for label in labels]
            return Examples(texts, [y if (i + seed) % 3 else None for i, y in enumerate(labels)])
        return Examples([" ".join([*rng.choices(tiny.WORDS[5:], k=4), label]) for label in labels], labels)

    sources = {"mood": ("bad", "good"), "pet": ("cat", "dog", "fish"), "sea": ("cat", "fish")}
    return [
        Classification.from_examples(name, examples(words, seed), examples(words, seed + 9))
        for seed, (name, words) in enumerate(sources.items())
    ]


class Killed(RuntimeError):
    """This process is to go no further."""


@contextmanager
def without(mutation: str | None) -> Iterator[None]:
    """One of the mends is taken away."""
    total, world = polyrank.step.total, launched()
    apart = Apart.__init__

    def counts_of_here(x: Tensor, accelerator: Any) -> Tensor:
        return total(x, accelerator) if x.is_floating_point() else x * world

    def combine_here(self: Apart, *args: Any) -> None:
        apart(self, *args[:-1], SimpleNamespace(num_processes=1, is_main_process=True))

    mutations: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "global counts": (polyrank.step, "total", counts_of_here),
        "global statistics": (sys.modules["polyrank.adapt"], "global_notes", dict),
        "global loads": (polyrank.methods.smora, "global_sum", lambda x: x),
        "summed gradients": (polyrank.train, "sum_gradients", lambda parameters, accelerator: None),
        "shared start": (polyrank.train, "share_weights", lambda tensors, accelerator: None),
        "combine after the sum": (Apart, "__init__", combine_here),
        "agreed flags": (polyrank.train, "agreed", lambda flag, accelerator: flag),
    }
    if mutation is None:
        yield
        return
    with patch.object(*mutations[mutation]):
        yield


@contextmanager
def happening(event: str | None, adapter: Any, model: Any) -> Iterator[None]:
    """What befalls the second of two processes, or the only one."""
    if event is None or (launched() > 1 and os.environ["RANK"] == "0"):
        yield
        return
    calls = {"steps": 0, "forwards": 0}
    norm, sums, after = polyrank.train.gradient_norm, model.loss_sums, adapter.after_step

    def no_number(parameters: Any) -> float:
        calls["steps"] += 1
        return float("nan") if calls["steps"] == 5 else norm(parameters)

    def no_memory(*args: Any) -> Tensor:
        calls["forwards"] += 1
        if calls["forwards"] == 5:
            raise MemoryError
        return sums(*args)

    def no_more() -> None:
        calls["steps"] += 1
        if calls["steps"] == 8 and event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if calls["steps"] == 8:
            raise Killed
        after()

    where: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "nan": (polyrank.train, "gradient_norm", no_number),
        "memory": (model, "loss_sums", no_memory),
        "kill": (adapter, "after_step", no_more),
        "stop": (adapter, "after_step", no_more),
    }
    with patch.object(*where[event]):
        yield


def result(cell: Cell, folder: Path | None = None) -> dict[str, Any]:
    """What a cell's run comes to: all weights, the losses, and what the routers choose on the first task's texts."""
    of = tasks(cell.tokens == "ragged")
    model = tiny.model(of).double()
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # each process has a start of its own, until they share one
    adapter = adapt(
        model.backbone,
        (METHODS | OWN)[cell.method],
        tasks=[task.name for task in of],
        targets=["query", "intermediate.dense"],
    )
    training = Training(
        steps=cell.steps, batch_size=2 * HALF, lr=1e-2, holdout=0, eval_every=cell.steps, combine=cell.combine,
        sharding=cell.sharding, checkpoint_every=1, accumulation=cell.accumulation,
    )  # fmt: skip
    drawn = patch.object(Mixing, "sampler", lambda self, lengths, *_: Halves(lengths, cell.layout))
    with drawn, without(cell.mutation), happening(cell.event, adapter, model):
        history = train(model, adapter, of, training, folder, progress=False, resume=folder is not None)
    weights = [*(p for _, p in adapter.named_parameters()), *model.heads.parameters()]
    return {
        "weights": torch.cat([p.detach().double().reshape(-1) for p in weights]),
        "losses": torch.tensor([entry["loss"] or 0.0 for entry in history.steps], dtype=torch.float64),
        "chosen": chosen(model, adapter),
        "skipped": history.skipped,
    }


@torch.no_grad()
def chosen(model: Any, adapter: Any) -> list[list[int]]:
    """How many tokens each gate sends to each expert, in one forward of 12 texts of every task."""
    found: list[list[int]] = []
    gates = [layer.gate for layer in adapter.layers.values() if isinstance(layer, LowRankMixture) and layer.gate]
    hooks = [
        gate.register_forward_hook(lambda m, args, out: found.append((out != 0).flatten(0, -2).sum(0).tolist()))
        for gate in gates
    ]
    model.train()
    corpus = Corpus.of(model.tasks, {task.name: task.train for task in model.tasks}, model.reader)
    batch = corpus.collate([(t, i) for t in range(len(model.tasks)) for i in range(12)])
    model(batch.inputs, batch.task_ids)
    for hook in hooks:
        hook.remove()
    return found


def talk(together: Together) -> dict[str, Any]:
    """What the processes say to each other, and how the errors of one become errors of all."""
    said: dict[str, Any] = {"texts": together.texts(f"I am {together.rank}: é"), "silent": together.texts("")}
    said["of_first"] = together.of_first(f"by {together.rank}")
    for name, failing in (("none", ()), ("second", (1,)), ("both", (0, 1))):
        try:
            with together.sharing_errors():
                if together.rank in failing:
                    raise ValueError(f"no {together.rank}")
            said[name] = "fine"
        except (ValueError, ProcessFailed) as error:
            said[name] = f"{type(error).__name__}: {error}"
    for name, own in (("same", "x"), ("different", f"x{together.rank}")):
        try:
            together.check_same("an answer", own)
            said[name] = "fine"
        except ValueError as error:
            said[name] = str(error)
    seen: list[str] = []
    with patch.dict(os.environ, LOCAL_RANK=str(together.rank)):
        together.first_then_others(lambda: seen.append("worked"))
    said["worked"] = seen
    return said


def work(folder: Path, runs: Path | None) -> None:
    """One of the processes: every cell of folder/cells.json, its result in folder."""
    torch.set_num_threads(1)
    with joined() as together:
        rank = together.rank
        (folder / f"talk-{rank}.json").write_text(json.dumps(talk(together)))
        for fields in json.loads((folder / "cells.json").read_text()):
            cell = Cell(**fields)
            torch.save(result(cell, runs), folder / f"{cell.name}-{rank}.pt")


def start(folder: Path, cells: Sequence[Cell], runs: Path | None = None) -> list[subprocess.Popen[bytes]]:
    """Two processes at work on the cells; with ``runs``, that is the run folder."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *([] if runs is None else [str(runs)])]
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stderr=log))
    return processes


def in_two(folder: Path, cells: Sequence[Cell], runs: Path | None = None) -> dict[Cell, list[dict[str, Any]]]:
    """What two processes make of the cells, of each process."""
    ends = [process.wait(timeout=900) for process in start(folder, cells, runs)]
    assert ends == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return {cell: [torch.load(folder / f"{cell.name}-{rank}.pt") for rank in range(2)] for cell in cells}


def alone(cell: Cell, **changes: Any) -> dict[str, Any]:
    """The same run in one process, with nothing taken away."""
    return result(replace(cell, sharding="none", mutation=None, event=None, **changes))


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a weight."""
    return float((one["weights"] - other["weights"]).abs().max())


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
