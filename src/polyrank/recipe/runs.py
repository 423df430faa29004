"""From a recipe to a run folder, and back to a model that answers."""

import errno
import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from polyrank.adapt import Adapter, adapt
from polyrank.checkpoint import FOLDER as CHECKPOINTS, CheckpointError, Interrupted, checkpoints
from polyrank.corpus import Batch
from polyrank.evaluate import evaluate
from polyrank.files import write_text
from polyrank.history import History
from polyrank.methods import Method
from polyrank.models import HeadModel, MultiTaskModel, load_heads, save_heads
from polyrank.probe import Features, Probe, probe, start_heads, trivial_score
from polyrank.processes import Together, join
from polyrank.recipe.folder import BANK, FORGETTING, check_folder, check_same, claimed, start_folder, sweep
from polyrank.recipe.loading import build_model, load_backbone, load_tasks, speaks_language
from polyrank.recipe.reading import RecipeError, read_recipe
from polyrank.recipe.rehearsal import forward, rehearsal
from polyrank.recipe.schema import Recipe
from polyrank.saving import method_fields
from polyrank.sequence import Forgetting
from polyrank.sharding import is_sharded
from polyrank.tasks import HeadTask, Task
from polyrank.train import combine, retain, split, train

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
    Launched as one of several processes it is one run of all of them, and the first writes.

    Raises:
        ProcessFailed: another process met one of these errors.
        ProcessLost: another process is gone, or does not answer.
        RecipeError: something that the recipe asks for is not there, or the folder is in use; nothing is written.
        CheckpointError: a checkpoint cannot be written or is of another run.
        Interrupted: a signal stopped training; its state was saved.
        Diverged: training met losses that are not finite.
    """
    if overwrite and resume:
        raise RecipeError("--overwrite and --resume contradict each other: give one of them")
    join()
    together = Together()
    folder = Path(recipe.out)
    with ExitStack() as stack:
        before = "new"
        with together.sharing_errors():
            if together.first:
                before = _enter(recipe, folder, overwrite, resume, stack)
        before = together.of_first(before)
        if before == "finished":
            return load_run(folder)
        try:
            return _run(recipe, folder, before == "unfinished", progress and together.first, features, together)
        except OSError as error:
            if error.errno not in DISK:
                raise
            raise CheckpointError(
                f"{error.filename or folder} cannot be written: {error.strerror}. What was saved before is whole: make "
                "room, or write permission, then continue with --resume"
            ) from error


def _enter(recipe: Recipe, folder: Path, overwrite: bool, resume: bool, stack: ExitStack) -> str:
    """Claim the folder for as long as the stack stands, and say what is in it: a new run, an unfinished or a finished.

    Raises:
        RecipeError: it cannot be this run's.
    """
    try:
        recipe.training.check_trackers()
    except ValueError as error:
        raise RecipeError(f"training.trackers: {error}") from error
    check_folder(folder, overwrite, resume)
    stack.enter_context(claimed(folder))
    check_folder(folder, overwrite, resume)  # a run may just have ended
    going_on = resume and (folder / "recipe.yaml").is_file()
    if resume and checkpoints(folder) and not going_on:
        raise RecipeError(f"{folder} has checkpoints but no recipe.yaml: put it back, or --overwrite")
    if not going_on:
        return "new"
    check_same(recipe, folder)
    if not (folder / "results.json").is_file():
        return "unfinished"
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return "finished"


def attach(recipe: Recipe, model: MultiTaskModel, batch: Batch) -> Adapter:
    """A fresh adapter in the model, tried with a batch.

    Raises:
        RecipeError: targets and method do not fit the model.
    """
    names = [task.name for task in model.tasks]
    try:
        adapter = adapt(model.backbone, recipe.build_method(), tasks=names, targets=recipe.targets, exclude=POOLER)
        if recipe.training.checkpointing:
            adapter.enable_checkpointing()
        combine(recipe.training, model, adapter)
        retain(recipe.training, model.tasks)
        forward(model, batch)
        return adapter
    except (ValueError, TypeError) as error:
        raise RecipeError(f"targets and method do not fit the model {recipe.model!r}: {error}") from error


def _run(
    recipe: Recipe, folder: Path, resume: bool, progress: bool, features: Features | None, together: Together
) -> Run:
    watch = Stopwatch()
    loaded = together.first_then_others(lambda: load_tasks(recipe))
    tasks = loaded.tasks
    for notice in loaded.notices if together.first else ():
        Console(stderr=True).print(f"note: {notice}", style="yellow", highlight=False, markup=False)
    watch.lap("data")
    model = load_model(recipe, tasks, together)
    watch.lap("model")
    # what one process can do alone it does once; through a sharded model all go
    at_work = together.first or is_sharded(model.backbone)
    baseline: dict[str, dict[str, Any]] = {}
    probes: dict[str, Probe] = {}
    with together.sharing_errors():
        try:
            batch = rehearsal(model)
            if at_work:
                baseline, probes = measure_frozen(recipe, model, features, progress)
        except ValueError as error:
            raise RecipeError(f"model {recipe.model!r}: {error}") from error
    watch.lap("frozen")
    if is_sharded(model.backbone):
        with together.sharing_errors():
            adapter = attach(recipe, model, batch)
    else:
        adapter = together.first_then_others(lambda: attach(recipe, model, batch))
    if recipe.heads == "probe" and at_work:  # training begins with the heads of the first
        start_heads(model.heads, probes)
    if recipe.bank is not None:
        with together.sharing_errors():
            try:
                adapter.load_bank(recipe.bank)
            except (FileNotFoundError, ValueError) as error:
                raise RecipeError(f"bank: {error}") from error
    with together.sharing_errors():
        if together.first and not resume:
            start_folder(recipe, folder)
    watch.lap("adapt")
    if recipe.bank is None and (first := adapter.method.bank()) is not None:
        places = train_bank(recipe, first, folder, progress, features, together)
        with together.sharing_errors():
            adapter.load_bank(places)
        watch.lap("bank")
    history = train(model, adapter, tasks, recipe.training, folder, progress, resume)
    watch.lap("training")
    watch.seconds["training"] = round(history.seconds, 1)  # of all its parts, where it was resumed
    results: dict[str, Any] = {}
    with together.sharing_errors():
        tests, size = {task.name: task.test for task in tasks}, recipe.training.eval_batch_size
        at_work = together.first or is_sharded(model.backbone)  # training may have sharded it
        scores = evaluate(model, tests, batch_size=size, progress=progress) if at_work else {}
        watch.lap("test")
        if together.first:
            results = summarise(baseline, scores, history, adapter, watch.seconds)
            write_run(recipe, folder, model, adapter, history, results)
    return Run(recipe, model, adapter, folder, json.loads(together.of_first(json.dumps(results))))


def load_model(recipe: Recipe, tasks: Sequence[Task], together: Together) -> MultiTaskModel:
    """The frozen model in every process; of one that is sharded only one copy at a time stands in main memory."""

    def load() -> MultiTaskModel:
        return build_model(recipe, tasks, *load_backbone(recipe, speaks_language(tasks)))

    return together.first_then_others(load) if recipe.training.sharding == "none" else together.in_turns(load)


def write_run(
    recipe: Recipe,
    folder: Path,
    model: MultiTaskModel,
    adapter: Adapter,
    history: History,
    results: Mapping[str, Any],
) -> None:
    """What a finished run leaves; its results come last."""
    adapter.save(folder / "adapter")
    save_heads(model, folder / "heads")
    if (matrix := forgetting(recipe, history)) is not None:
        write_text(folder / FORGETTING, json.dumps(matrix.as_json(), indent=1, allow_nan=False))
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    sweep(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # a finished run needs none


def forgetting(recipe: Recipe, history: History) -> Forgetting | None:
    """The held-out scores of all tasks at the end of each task's stage; None where tasks are trained together, or one
    has no held-out example."""
    names, training = [task.name for task in recipe.tasks], recipe.training
    if training.mixing.order == "together":
        return None
    seen = {entry["step"]: entry["held_out"] for entry in history.evaluations}
    rows = [seen[stage.stop] for stage in training.mixing.stages(training.steps, len(names))]
    if any(name not in row for row in rows for name in names):
        return None
    return Forgetting(tuple(names), tuple(tuple(row[name] for name in names) for row in rows))


def train_bank(
    recipe: Recipe, method: Method, folder: Path, progress: bool, features: Features | None, together: Together
) -> dict[str, Path]:
    """Train each task alone, in a run of its own in the folder; one that is finished is not run again.

    Returns the adapters' folders by task.
    """
    found: dict[str, Path] = {}
    for number, task in enumerate(recipe.tasks, start=1):
        place = folder / BANK / task.name
        found[task.name] = place / "adapter"
        if together.of_first("done" if (place / "results.json").is_file() else ""):
            continue
        if together.first:
            said = f"bank, {number} of {len(recipe.tasks)}: {task.name} alone"
            Console(stderr=True).print(said, style="dim", highlight=False, markup=False)
        training = recipe.training.model_copy(
            update={"task_weights": None, "combine": None, "quality_retaining": None, "trackers": []}
        )
        alone = {"method": method_fields(method), "tasks": [task], "training": training, "out": str(place)}
        try:
            run(recipe.model_copy(update=alone), resume=True, progress=progress, features=features)
        except Interrupted as error:
            raise Interrupted(error.signum, error.step, folder, error.folder) from error
    return found


def measure_frozen(
    recipe: Recipe, model: MultiTaskModel, features: Features | None, progress: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, Probe]]:
    """Each task's row of the results, before any adapter: a converged head on the frozen model, or its own answers."""
    tasks = model.tasks
    rows: dict[str, dict[str, Any]] = {task.name: {"metric": task.metric, "majority": None} for task in tasks}
    if isinstance(model, HeadModel):
        features = features or Features(model)
        probes = probe_all([task for task in tasks if isinstance(task, HeadTask)], recipe, features, progress)
        for name, found in probes.items():
            rows[name] |= {"majority": found.majority, "frozen": found.score}
            rows[name] |= {"frozen_l2": found.strength, "frozen_gradient_norm": found.gradient_norm}
        return rows, probes
    tests = {task.name: task.test for task in tasks}
    size = recipe.training.eval_batch_size
    for name, score in evaluate(model, tests, batch_size=size, progress=progress).items():
        rows[name]["frozen"] = score
    for task in tasks:
        rows[task.name]["majority"] = trivial_score(task)
    return rows, {}


def probe_all(tasks: Sequence[HeadTask], recipe: Recipe, features: Features, progress: bool) -> dict[str, Probe]:
    """The frozen model on every task; all texts go through it in one sweep."""
    kept, held = split(tasks, recipe.training)
    reader = features.model.reader
    rows = [row for task in tasks for part in (task.train, task.test) for row in task.rows(part.labelled(), reader)]
    features(rows, progress=progress)
    return {task.name: probe(task, kept[task.name], held[task.name], features) for task in tasks}


def summarise(
    baseline: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, float],
    history: History,
    adapter: Adapter,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """results.json: scores by the tasks' metrics, and how they came about; null where there is no such score."""
    table = {name: {"frozen": None, "adapted": scores.get(name), **row} for name, row in baseline.items()}
    scored = [row for row in table.values() if row["adapted"] is not None]  # the others have no test label
    columns = {key: [row[key] for row in scored] for key in ("majority", "frozen", "adapted")}
    means = {
        key: sum(values) / len(values) if values and all(v is not None for v in values) else None
        for key, values in columns.items()
    }
    return {
        "tasks": table,
        "mean": means,
        "best_step": history.best_step,
        "held_out_mean": history.best_score,
        "skipped_steps": history.skipped,
        "adapter_parameters": sum(p.numel() for p in adapter.parameters()),
        "peak_bytes": peak_bytes(),
        "seconds": seconds,
        "versions": {name: version(name) for name in ("polyrank", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def peak_bytes() -> int:
    """The most memory that was in use so far: of the accelerator, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_run(folder: Path) -> Run:
    """A finished run, ready to predict, from its folder alone (and the base model).

    Raises:
        RecipeError: no finished run there, or files that do not belong together.
    """
    if not (folder / "results.json").is_file():
        raise RecipeError(f"{folder} holds no finished run: give the folder that `polyrank train` wrote")
    recipe = read_recipe(folder / "recipe.yaml")
    try:
        tasks, reading, weights = load_heads(folder / "heads")
        as_trained = recipe.model_copy(update=reading)
        model = build_model(as_trained, tasks, *load_backbone(as_trained, speaks_language(tasks)))
        adapter = Adapter.load(folder / "adapter", model.backbone)
        if adapter.tasks != tuple(task.name for task in tasks):
            raise ValueError(f"heads are for {[t.name for t in tasks]}, the adapter for {list(adapter.tasks)}")
        model.heads.load_state_dict(weights)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except RecipeError:
        raise
    except (ValueError, FileNotFoundError, RuntimeError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder} cannot be loaded: {error}") from error
    return Run(recipe, model.eval(), adapter, folder, results)
