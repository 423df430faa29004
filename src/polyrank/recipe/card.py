"""What a finished run shows: its scores, what it cost, and where its files are."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from polyrank.recipe.folder import FORGETTING
from polyrank.recipe.runs import Run
from polyrank.sequence import Forgetting


def show(finished: Run, console: Console) -> None:
    """The table of scores and the card."""
    console.print(results_table(finished.results))
    if (found := finished.folder / FORGETTING).is_file():
        console.print(forgetting_table(Forgetting.from_json(json.loads(found.read_text(encoding="utf-8")))))
    console.print(card(finished), highlight=False)


def results_table(results: dict[str, Any]) -> Table:
    """Scores in percent: one row per task, and their mean with the difference."""
    metrics = {row["metric"] for row in results["tasks"].values()}
    one = len(metrics) == 1
    heads = any("frozen_l2" in row for row in results["tasks"].values())
    table = Table(title=f"test {next(iter(metrics)) if one else 'scores'}, %", title_justify="left")
    frozen = "frozen model, converged head" if heads else "frozen model"
    columns = ["task", *([] if one else ["metric"]), "trivial answer", frozen, "adapted model", "difference"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, row in [*results["tasks"].items(), ("mean", results["mean"])]:
        if name == "mean":
            table.add_section()
        cells = [_percent(row[column]) for column in ("majority", "frozen", "adapted")]
        known = row["adapted"] is not None and row["frozen"] is not None
        difference = f"{100 * (row['adapted'] - row['frozen']):+.1f}" if known else ""
        metric = [] if one else [row.get("metric", "")]
        table.add_row(name, *metric, *cells, difference, style="bold" if name == "mean" else "")
    return table


def forgetting_table(matrix: Forgetting) -> Table:
    """Held-out scores in percent: one row for each task as it was over, then what each task has lost since."""
    average, lost, transfer = (100 * one for one in (matrix.average, matrix.mean_forgetting, matrix.backward_transfer))
    title = f"held-out scores, %: average {average:.1f}, forgetting {lost:.1f}, backward transfer {transfer:+.1f}"
    table = Table(title=title, title_justify="left")
    table.add_column("after")
    for name in matrix.tasks:
        table.add_column(escape(name), justify="right")
    for name, row in zip(matrix.tasks, matrix.scores, strict=True):
        table.add_row(escape(name), *(f"{100 * score:.1f}" for score in row))
    table.add_section()
    table.add_row("forgotten", *(f"{100 * one:.1f}" for one in matrix.forgetting), "", style="bold")
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def card(finished: Run) -> Panel:
    """Cost, parameters, and files."""
    results, folder = finished.results, finished.folder
    seconds, summary = results["seconds"], finished.adapter.summary()
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    skipped = f", {results['skipped_steps']} skipped as not finite" if results["skipped_steps"] else ""
    share = summary.trainable_parameters / max(1, summary.base_parameters)
    rows = {
        "method": f"{finished.recipe.method['name']} on {finished.recipe.model}, {len(finished.adapter.tasks)} tasks",
        "parameters": f"{summary.trainable_parameters:,} trained, {share:.2%} of {summary.base_parameters:,} frozen",
        "kept": f"step {results['best_step']} of {finished.recipe.training.steps}, held-out mean "
        f"{100 * results['held_out_mean']:.1f}{skipped}",
        "time": f"{sum(seconds.values()):.0f} s ({parts})",
        "memory": f"{results['peak_bytes'] / 2**20:,.0f} MiB at most",
        "files": f"{folder}: adapter ({_size(folder / 'adapter')}), heads, recipe.yaml, metrics.jsonl, results.json"
        f"{', forgetting.json' if (folder / 'forgetting.json').is_file() else ''}",
    }
    grid = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        grid.add_row(f"[dim]{name}[/]", escape(text))
    return Panel(grid, title="run", title_align="left", expand=False)


def _size(folder: Path) -> str:
    count = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{count / 2**20:.1f} MiB"
