"""A tiny training run that can be cut off and gone on with; in a module of its own, for processes to import."""

from pathlib import Path

import torch
from torch import Tensor

import tiny
from polyrank import Adapter, adapt
from polyrank.files import write_folder
from polyrank.train import train
from polyrank.training import Training
from small import METHODS

KINDS = ("lora", "moore-token", "moore_topk-token", "more", "ase", "smora", "poly", "adalora", "emtal")
STEPS = Training(steps=12, batch_size=8, accumulation=2, lr=1e-2, eval_every=4, checkpoint_every=1)


def go(folder: Path, kind: str, training: Training = STEPS, resume: bool = True) -> Adapter:
    """Train the tiny model in a folder."""
    tasks = tiny.tasks()
    model = tiny.model(tasks)
    adapter = adapt(model.backbone, METHODS[kind], tasks=[t.name for t in tasks], targets=["query", "value", "dense"])
    train(model, adapter, tasks, training, folder, progress=False, resume=resume)
    adapter.heads = model.heads  # type: ignore[attr-defined]
    return adapter


def weights(adapter: Adapter) -> dict[str, Tensor]:
    heads = adapter.heads.state_dict()  # type: ignore[attr-defined]
    return {**adapter.state_dict(), **{f"head {name}": value for name, value in heads.items()}}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def worker(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    adapter = go(folder, kind)
    write_folder(folder / "final", {"weights": weights(adapter)}, {})
