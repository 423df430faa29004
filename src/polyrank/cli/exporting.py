"""What leaves a finished run: export."""

import json
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.app import RunFolder, app, quiet_libraries, user_errors

DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def export(
    run: RunFolder,
    task: Annotated[list[str] | None, typer.Option(help="A task of the run; may be repeated.")] = None,
    all_tasks: Annotated[bool, typer.Option("--all-tasks", help="Every task of the run, each into a folder.")] = False,
    format: Annotated[
        str, typer.Option(help='"lora": PEFT\'s files, for engines. "dense": a plain model of the task.')
    ] = "lora",
    out: Annotated[
        Path | None,
        typer.Option(help="A new folder, with a folder for each task in it; default: a new one in exports/."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Cut each layer's change to the best LoRA of rank R.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the LoRA: {', '.join(DTYPES)}.")] = "float32",
    approximate: Annotated[
        str | None,
        typer.Option(help='"mean-gate": hold gates that look at the input at their mean over training examples.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end, and the rest on stderr.")] = False,
) -> None:
    """Write a task of a run as files that others load without Polyrank.

    What is written is read again and compared with the mixture on test examples; where it differs, nothing is left.

    [bold]polyrank export runs/mine --task movies[/]  a LoRA for vLLM, SGLang, PEFT, ...

    [bold]polyrank export runs/mine --all-tasks --format dense[/]  plain models: sentence-transformers, transformers

    [bold]polyrank export runs/mine --task movies --max-rank 16[/]  the best LoRA of rank 16, and what it costs

    Methods whose gate looks at the input are no LoRA and no plain model, and are refused; --approximate mean-gate
    measures first how far the nearest one is off.
    """
    with user_errors():
        import torch

        from polyrank.recipe import RecipeError, load_run
        from polyrank.recipe.asking import chosen_tasks
        from polyrank.recipe.exporting import Wish, export_tasks, new_place

        for name, value, known in (("format", format, ("lora", "dense")), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise RecipeError(f"--{name} {value}: take one of {', '.join(known)}")
        if approximate not in (None, "mean-gate"):
            raise RecipeError(f"--approximate {approximate}: take mean-gate")
        if bool(task) == all_tasks:
            raise RecipeError("name a task, --task NAME, or take --all-tasks")
        if format == "dense" and (max_rank is not None or dtype != "float32"):
            raise RecipeError("--max-rank and --dtype are of a LoRA: leave them out, or take --format lora")
        quiet_libraries()
        loaded = load_run(run)
        chosen = chosen_tasks(loaded, None) if all_tasks else [chosen_tasks(loaded, one)[0] for one in task or []]
        folder = out or new_place(Path("exports") / f"{run.name}-{format}")
        places = {one.name: folder / one.name for one in chosen}
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        dense = format == "dense"
        wish = Wish("dense" if dense else "lora", max_rank, None if dense else kind, approximate is not None)
        found = export_tasks(loaded, chosen, places, wish, lambda line: typer.echo(line, err=as_json))
        if as_json:
            rows = {
                name: {
                    "folder": str(one.folder),
                    "rank": one.rank,
                    "max_difference": one.difference.most,
                    "max_output": one.difference.largest,
                    "truncation_error": one.predicted,
                    "lost_by_rounding": one.lost,
                    "approximate": one.approximate,
                }
                for name, one in found.items()
            }
            typer.echo(json.dumps(rows))
