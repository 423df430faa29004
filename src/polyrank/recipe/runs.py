"""From a recipe to a run folder, and back to a model that answers."""

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from polyrank.adapt import Adapter, adapt
from polyrank.assets import model_folder
from polyrank.checkpoint import FOLDER as CHECKPOINTS, CheckpointError, checkpoints
from polyrank.data import DATASETS, load, read_file
from polyrank.evaluate import evaluate, mean
from polyrank.files import write_text
from polyrank.history import History
from polyrank.manifest import MODELS
from polyrank.probe import Features, Probe, probe, start_heads
from polyrank.recipe.folder import check_folder, check_same, claimed, start_folder, sweep
from polyrank.recipe.reading import RecipeError, read_recipe
from polyrank.recipe.schema import Recipe, TaskSource, nearest
from polyrank.tasks import Examples, MultiTaskModel, Task, load_heads, save_heads
from polyrank.train import split, train

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # a person can do something
POOLER = r"(.*\.)?pooler(\..*)?"  # a pooler takes no part in masked-mean pooling: never adapted


@dataclass(frozen=True)
class Run:
    """A trained model and what is in its folder."""

    recipe: Recipe
    model: MultiTaskModel
    adapter: Adapter
    folder: Path
    results: dict[str, Any]


class Stopwatch:
    """Seconds of each named part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 1), now


def load_backbone(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text encoder in fp32, without dropout, and its tokenizer: a built-in name, a folder, or a name on the hub.

    Raises:
        RecipeError: nothing loadable has that name.
    """
    source = str(model_folder(name)) if name in MODELS else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        backbone = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"model {name!r} cannot be loaded{nearest(name, MODELS)}: {reason}\n"
            "Give a built-in name, a folder that has config.json, model.safetensors and the tokenizer, or a hub name"
        ) from error
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the base is frozen: noise in it costs time and repeatability
    return backbone.eval(), tokenizer


def load_examples(source: TaskSource, recipe: Recipe) -> tuple[Examples, Examples]:
    """The train and test examples of one task, at most as many as the recipe says.

    Raises:
        RecipeError: an unknown data set, or a file that cannot be used.
    """
    limits, seed = (recipe.max_train, recipe.max_test), recipe.training.seed
    try:
        if source.data is not None:
            if source.data not in DATASETS:
                raise ValueError(f"unknown data set {source.data!r}{nearest(source.data, DATASETS)}")
            splits = load(source.data, *limits, seed)
            parts = (splits.train, splits.test)
        elif source.test is not None:
            parts = (
                read_file(source.train or "", source.text, source.label),
                read_file(source.test, source.text, source.label),
            )
        else:
            parts = read_file(source.train or "", source.text, source.label).split(source.test_share)
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"task {source.name!r}: {error}") from error
    train, test = (
        Examples(part.texts, part.labels).sample(limit, f"{seed}/{source.name}")
        for part, limit in zip(parts, limits, strict=True)
    )
    return train, test


def load_tasks(recipe: Recipe) -> tuple[Task, ...]:
    try:
        return tuple(Task.from_examples(source.name, *load_examples(source, recipe)) for source in recipe.tasks)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    features: Features | None = None,
) -> Run:
    """Load everything, measure the frozen model, train, score the test examples, and write the run folder.

    `features` may be kept between runs of one model: what it has computed is not computed again. `resume` goes on from
    the newest complete checkpoint of the folder; it starts a run that has none, and only loads one that is finished.

    Raises:
        RecipeError: something that the recipe asks for is not there, or the folder is in use; nothing is written.
        CheckpointError: a checkpoint cannot be written or is of another run.
        Interrupted: a signal stopped training; its state was saved.
        Diverged: training met losses that are not finite.
    """
    if overwrite and resume:
        raise RecipeError("--overwrite and --resume contradict each other: give one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a recipe trains in one process: for several, call polyrank.train.train in a script of yours")
    folder = Path(recipe.out)
    check_folder(folder, overwrite, resume)
    with claimed(folder):
        check_folder(folder, overwrite, resume)  # a run may just have ended
        going_on = resume and (folder / "recipe.yaml").is_file()
        if resume and checkpoints(folder) and not going_on:
            raise RecipeError(f"{folder} has checkpoints but no recipe.yaml: put it back, or --overwrite")
        if going_on:
            check_same(recipe, folder)
            if (folder / "results.json").is_file():
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                return load_run(folder)
        try:
            return _run(recipe, folder, going_on, progress, features)
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise CheckpointError(
                f"{error.filename or folder} cannot be written: {error.strerror}. What was saved before is whole: make "
                "room, or write permission, then continue with --resume"
            ) from error


def notices(tasks: Sequence[Task]) -> list[str]:
    """What a person should know of the data before believing a score."""
    return [
        f"task {task.name!r}: {len(leaked)} of {len(task.test)} test texts also stand in its training data, "
        f"such as {leaked[0][:60]!r}: its test score will flatter"
        for task in tasks
        if (leaked := task.leaked())
    ]


def build(
    recipe: Recipe, tasks: Sequence[Task], backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[MultiTaskModel, Adapter]:
    """The model with fresh heads and a fresh adapter.

    Raises:
        RecipeError: targets and method do not fit the model.
    """
    torch.manual_seed(recipe.training.seed)
    model = MultiTaskModel(backbone, tokenizer, tasks, recipe.max_length)
    names = [task.name for task in tasks]
    try:
        adapter = adapt(backbone, recipe.build_method(), tasks=names, targets=recipe.targets, exclude=POOLER)
    except ValueError as error:
        raise RecipeError(f"targets and method do not fit the model {recipe.model!r}: {error}") from error
    return model, adapter


def _run(recipe: Recipe, folder: Path, resume: bool, progress: bool, features: Features | None) -> Run:
    watch = Stopwatch()
    tasks = load_tasks(recipe)
    for notice in notices(tasks):
        Console(stderr=True).print(f"note: {notice}", style="yellow", highlight=False, markup=False)
    watch.lap("data")
    backbone, tokenizer = load_backbone(recipe.model)
    watch.lap("model")
    features = features or Features(backbone, tokenizer, recipe.max_length)
    probes = probe_all(tasks, recipe, features, progress)
    watch.lap("frozen")
    model, adapter = build(recipe, tasks, backbone, tokenizer)
    if recipe.heads == "probe":
        start_heads(model.heads, probes)
    if not resume:
        start_folder(recipe, folder)
    watch.lap("adapt")
    history = train(model, adapter, tasks, recipe.training, folder, progress, resume)
    watch.lap("training")
    watch.seconds["training"] = round(history.seconds, 1)  # of all its parts, where it was resumed
    scores = evaluate(model, {task.name: task.test for task in tasks}, progress=progress)
    watch.lap("test")
    results = summarise(probes, scores, history, adapter, watch.seconds)
    adapter.save(folder / "adapter")
    save_heads(model, folder / "heads")
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    sweep(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # a finished run needs none
    return Run(recipe, model, adapter, folder, results)


def probe_all(tasks: Sequence[Task], recipe: Recipe, features: Features, progress: bool) -> dict[str, Probe]:
    """The frozen model on every task; all texts go through it in one sweep."""
    kept, held = split(tasks, recipe.training)
    features([text for task in tasks for part in (task.train, task.test) for text in part.texts], progress=progress)
    return {task.name: probe(task, kept[task.name], held[task.name], features) for task in tasks}


def summarise(
    probes: Mapping[str, Probe],
    scores: Mapping[str, float],
    history: History,
    adapter: Adapter,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """results.json: accuracies from 0 to 1, and how they came about."""
    table = {
        name: {
            "majority": found.majority,
            "frozen": found.accuracy,
            "adapted": scores[name],
            "frozen_l2": found.strength,
            "frozen_gradient_norm": found.gradient_norm,
        }
        for name, found in probes.items()
    }
    means = {
        column: mean({name: row[column] for name, row in table.items()}) for column in ("majority", "frozen", "adapted")
    }
    return {
        "tasks": table,
        "mean": means,
        "best_step": history.best_step,
        "held_out_mean": history.best_score,
        "skipped_steps": history.skipped,
        "adapter_parameters": sum(p.numel() for p in adapter.parameters()),
        "seconds": seconds,
        "versions": {name: version(name) for name in ("polyrank", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def load_run(folder: Path) -> Run:
    """A finished run, ready to predict, from its folder alone (and the base model).

    Raises:
        RecipeError: no finished run there, or files that do not belong together.
    """
    if not (folder / "results.json").is_file():
        raise RecipeError(f"{folder} holds no finished run: give the folder that `polyrank train` wrote")
    recipe = read_recipe(folder / "recipe.yaml")
    backbone, tokenizer = load_backbone(recipe.model)
    try:
        tasks, weights = load_heads(folder / "heads")
        adapter = Adapter.load(folder / "adapter", backbone)
        if adapter.tasks != tuple(task.name for task in tasks):
            raise ValueError(f"heads are for {[t.name for t in tasks]}, the adapter for {list(adapter.tasks)}")
        model = MultiTaskModel(backbone, tokenizer, tasks, recipe.max_length)
        model.heads.load_state_dict(weights)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise RecipeError(f"{folder} cannot be loaded: {error}") from error
    return Run(recipe, model.eval(), adapter, folder, results)
