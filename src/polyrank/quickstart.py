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

from polyrank.evaluate import predict
from polyrank.mixing import Corpus
from polyrank.probe import Features
from polyrank.recipe import Recipe, RecipeError, Run, check_recipe, load_examples, load_run, run
from polyrank.recipe.reading import apply_setting, parse_yaml
from polyrank.recipe.runs import load_backbone
from polyrank.recipe.schema import nearest

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
    if choices.method not in shipped["methods"]:
        raise RecipeError(f"--method: unknown method {choices.method!r}{nearest(choices.method, shipped['methods'])}")
    content: dict[str, Any] = shipped["recipe"] | {"method": {"name": choices.method}, "out": str(out)}
    for key in ("training.seed", "out"):
        if any(setting.partition("=")[0].strip() == key for setting in choices.settings):
            raise RecipeError(f"--set {key}=...: use --{key.removeprefix('training.')} (every run has its own)")
    own = shipped["methods"][choices.method]
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
    frozen = Features(*load_backbone(recipes[0].model), recipes[0].max_length)
    runs: list[Run] = []
    for recipe in recipes:
        console.print(f"[bold]{recipe.method['name']}[/] on {recipe.model}, seed {recipe.training.seed}")
        finished = run(recipe, overwrite=overwrite, progress=console.is_terminal, features=frozen)
        console.print(results_table(finished.results))
        console.print(timing_line(finished.results), style="dim", highlight=False)
        runs.append(finished)
    if len(runs) > 1:
        console.print(seeds_table(runs))
    prove_reload(runs[-1], console)
    next_steps(runs[-1], console)
    return runs


def results_table(results: dict[str, Any]) -> Table:
    """Accuracies in percent: one row per task, and their mean with the difference."""
    table = Table(title="test accuracy, %", title_justify="left")
    for column in ("task", "majority class", "frozen model, converged head", "adapted model", "difference"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, row in [*results["tasks"].items(), ("mean", results["mean"])]:
        if name == "mean":
            table.add_section()
        cells = [f"{100 * row[column]:.1f}" for column in ("majority", "frozen", "adapted")]
        table.add_row(
            name, *cells, f"{100 * (row['adapted'] - row['frozen']):+.1f}", style="bold" if name == "mean" else ""
        )
    return table


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


def timing_line(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    step = f"kept step {results['best_step']}, held-out mean {100 * results['held_out_mean']:.1f}"
    return f"{step}; {results['adapter_parameters']:,} adapter weights; {sum(seconds.values()):.0f} s ({parts})"


@torch.no_grad()
def prove_reload(finished: Run, console: Console) -> None:
    """Load the run from its folder into a fresh base model, compare the outputs, and let the loaded model answer.

    Raises:
        RuntimeError: the loaded model does not give the outputs of the trained one.
    """
    loaded = load_run(finished.folder)
    sources = finished.recipe.tasks
    texts = {source.name: load_examples(source, finished.recipe)[1] for source in sources}
    splits = {name: examples.select(range(min(8, len(examples)))) for name, examples in texts.items()}
    corpus = Corpus.of(finished.model.tasks, splits, finished.model.tokenizer, finished.recipe.max_length)
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
    for source in sources[:: max(1, len(sources) // ASKED)][:ASKED]:
        text, label = splits[source.name].texts[0], splits[source.name].labels[0]
        answer = predict(loaded.model, [text], source.name)[0]
        short = text if len(text) <= 60 else f"{text[:57]}..."
        console.print(
            f"  {source.name}: {short!r} -> {answer.label} ({answer.probabilities[answer.label]:.2f}); it is {label}",
            markup=False,
        )


def next_steps(finished: Run, console: Console) -> None:
    folder = finished.folder
    console.print(f"\nThe run is in {folder}. Now try:", highlight=False)
    for line in (
        f'polyrank predict {folder} --task {finished.recipe.tasks[0].name} "your text"',
        f"polyrank eval {folder}",
        "polyrank methods",
        f"polyrank train {folder / 'recipe.yaml'} --set training.steps=400 --out runs/longer",
    ):
        console.print(f"  {line}", markup=False, highlight=False)
