"""The first command: six tasks on one frozen model, honest baselines, and a model that is saved, reloaded, asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from polyrank.corpus import Corpus
from polyrank.evaluate import predict
from polyrank.methods import METHODS
from polyrank.models import HeadModel
from polyrank.probe import Features
from polyrank.recipe import Recipe, RecipeError, Run, check_recipe, load_run, load_tasks, run
from polyrank.recipe.card import show
from polyrank.recipe.loading import build_model, load_backbone, speaks_language
from polyrank.recipe.reading import apply_setting, parse_yaml
from polyrank.recipe.schema import nearest
from polyrank.tasks import shown

ASKED = 3  # tasks that answer one text each at the end


@dataclass(frozen=True)
class Choices:
    """What the command line may change."""

    method: str = "moore"
    model: str | None = None
    steps: int | None = None
    out: Path | None = None
    settings: Sequence[str] = ()


def quickstart_recipe(choices: Choices, seed: int, out: Path) -> Recipe:
    """The recipe shipped with the package, with the method's own changes and the user's.

    Raises:
        RecipeError: an unknown method, or a setting that does not fit.
    """
    text = files("polyrank.recipe").joinpath("quickstart.yaml").read_text(encoding="utf-8")
    shipped = parse_yaml(text, "quickstart.yaml")
    if choices.method not in METHODS:
        raise RecipeError(f"--method: unknown method {choices.method!r}{nearest(choices.method, METHODS)}")
    content: dict[str, Any] = shipped["recipe"] | {"method": {"name": choices.method}, "out": str(out)}
    for key in ("training.seed", "out"):
        if any(setting.partition("=")[0].strip() == key for setting in choices.settings):
            raise RecipeError(f"--set {key}=...: use --{key.removeprefix('training.')} (every run has its own)")
    own = shipped["methods"].get(choices.method, {})
    if choices.model is not None:  # the shipped targets name MiniLM's layers
        content["model"] = choices.model
        own = {key: value for key, value in own.items() if key != "targets"}
    settings = [
        *(f"{key}={value}" for key, value in own.items()),
        f"training.seed={seed}",
        *([] if choices.steps is None else [f"training.steps={choices.steps}"]),
        *choices.settings,
    ]
    for setting in settings:
        apply_setting(content, setting)
    return check_recipe(content, "quickstart", Path.cwd())


def free_folder(method: str) -> Path:
    """runs/quickstart-METHOD, or the first of -2, -3, ... that is not there yet."""
    base, number = Path("runs") / f"quickstart-{method}", 1
    while (folder := base if number == 1 else base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return folder


def quickstart(choices: Choices, seeds: Sequence[int], console: Console, *, overwrite: bool = False) -> list[Run]:
    """Run the quick start once for each seed and print its tables.

    Raises:
        RecipeError: something that was asked for is not there; nothing is written.
    """
    out = choices.out or free_folder(choices.method)
    folders = [out if len(seeds) == 1 else out / f"seed-{seed}" for seed in seeds]
    recipes = [quickstart_recipe(choices, seed, folder) for seed, folder in zip(seeds, folders, strict=True)]
    frozen = frozen_features(recipes[0])
    runs: list[Run] = []
    for recipe in recipes:
        console.print(f"[bold]{recipe.method['name']}[/] on {recipe.model}, seed {recipe.training.seed}")
        finished = run(recipe, overwrite=overwrite, progress=console.is_terminal, features=frozen)
        show(finished, console)
        runs.append(finished)
    if len(runs) > 1:
        console.print(seeds_table(runs))
    prove_reload(runs[-1], console)
    next_steps(runs[-1], console)
    return runs


def frozen_features(recipe: Recipe) -> Features | None:
    """The features of the recipe's frozen model, to be kept between its runs; None for a language model."""
    tasks = load_tasks(recipe).tasks
    model = build_model(recipe, tasks, *load_backbone(recipe, speaks_language(tasks)))
    return Features(model) if isinstance(model, HeadModel) else None


def seeds_table(runs: Sequence[Run]) -> Table:
    """The mean over the tasks for each seed, and the mean and standard deviation over the seeds, in percent."""
    table = Table(
        "seed", "frozen model", "adapted model", "difference", title="mean over the tasks, %", title_justify="left"
    )
    rows = [(100 * r.results["mean"]["frozen"], 100 * r.results["mean"]["adapted"]) for r in runs]
    for finished, (frozen, adapted) in zip(runs, rows, strict=True):
        table.add_row(str(finished.recipe.training.seed), f"{frozen:.1f}", f"{adapted:.1f}", f"{adapted - frozen:+.1f}")
    table.add_section()
    columns = [[a for a, _ in rows], [b for _, b in rows], [b - a for a, b in rows]]
    table.add_row("mean ± sd", *(f"{mean(c):.1f} ± {stdev(c):.1f}" for c in columns), style="bold")
    return table


@torch.no_grad()
def prove_reload(finished: Run, console: Console) -> None:
    """Load the run from its folder into a fresh base model, compare the outputs, and let the loaded model answer.

    Raises:
        RuntimeError: the loaded model does not give the outputs of the trained one.
    """
    loaded = load_run(finished.folder)
    tasks = load_tasks(finished.recipe).tasks
    splits = {task.name: task.test.select(range(min(8, len(task.test)))) for task in tasks}
    corpus = Corpus.of(finished.model.tasks, splits, finished.model.reader)
    largest = 0.0
    for picks in corpus.by_length(64):
        batch = corpus.collate(picks)
        trained, again = (
            m(b.inputs, b.task_ids)
            for m, b in ((finished.model, batch.to(finished.model.device)), (loaded.model, batch))
        )
        for name, answer in trained.items():
            largest = max(largest, float((answer.logits.cpu() - again[name].logits).abs().max()))
    if not largest <= 1e-3:
        raise RuntimeError(
            f"the model loaded from {finished.folder} differs by {largest:.1e} in a logit: please report this"
        )
    console.print(f"saved, and loaded into a fresh base model: largest difference of a logit {largest:.1e}")
    for task in tasks[:: max(1, len(tasks) // ASKED)][:ASKED]:
        text, label = splits[task.name].texts[0], splits[task.name].labels[0]
        answer = predict(loaded.model, [text], task.name)[0]
        sure = f" ({answer.probabilities[answer.answer]:.2f})" if answer.answer in answer.probabilities else ""
        console.print(f"  {task.name}: {shown(text)!r} -> {answer.answer}{sure}; it is {label}", markup=False)


def next_steps(finished: Run, console: Console) -> None:
    folder = finished.folder
    console.print("\nNow try:", highlight=False)
    for line in (
        f'polyrank predict {folder} --task {finished.recipe.tasks[0].name} "your text"',
        f"polyrank eval {folder}",
        "polyrank methods",
        f"polyrank train {folder / 'recipe.yaml'} --set training.steps=400 --out runs/longer",
    ):
        console.print(f"  {line}", markup=False, highlight=False)
