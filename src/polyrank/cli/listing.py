"""What there is, and what it costs: schema, methods, combiners, bench."""

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.app import app, as_recipe_errors, user_errors


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check them.

    [bold]polyrank schema > recipe.schema.json[/]

    then, as the first line of a recipe:

    [dim]# yaml-language-server: $schema=recipe.schema.json[/]
    """
    from polyrank.recipe.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method, with its whole card.")] = None) -> None:
    """List the methods; or one of them with its equation, its fields, its deviations and a recipe.

    [bold]polyrank methods moore[/]
    """
    with user_errors():
        from rich.markdown import Markdown
        from rich.table import Table

        from polyrank.cards import READS, advice, card, is_reconstruction, merges, reads
        from polyrank.methods import METHODS
        from polyrank.recipe import RecipeError
        from polyrank.recipe.schema import nearest

        if name is not None and name not in METHODS:
            raise RecipeError(f"unknown method {name!r}{nearest(name, METHODS)}")
        if name is not None:
            Console().print(Markdown(card(name)))
            return
        table = Table("method", "choose it", "who is asked", "merges", show_lines=True)
        for key, kind in METHODS.items():
            mark = "*" if is_reconstruction(kind) else ""
            table.add_row(key + mark, advice(kind), READS[reads(kind)].partition(":")[0], merges(kind))
        Console().print(table, markup=False)
        typer.echo(
            "merges: into one weight for all tasks (static), one for each (per task), one for each sample, or none.\n"
            "* a reconstruction: not everything of it was published, or could be read.\n"
            "polyrank methods NAME has the paper, the equation, the fields and the deviations of one."
        )


@app.command()
def combiners(name: Annotated[str | None, typer.Argument(help="One combiner, with its whole header.")] = None) -> None:
    """List how tasks can be combined, for `training.combine` of a recipe; or one with its rule and its settings.

    [bold]polyrank combiners nash_mtl[/]

    [bold]polyrank train recipe.yaml --set training.combine=nash_mtl[/]
    """
    with user_errors():
        from rich.table import Table

        from polyrank.cards import explained, header
        from polyrank.combine import COMBINERS
        from polyrank.recipe import RecipeError
        from polyrank.recipe.schema import nearest

        if name is not None and name not in COMBINERS:
            raise RecipeError(f"unknown combiner {name!r}{nearest(name, COMBINERS)}")
        if name is not None:
            typer.echo(header(COMBINERS[name]) + "\n")
            table = Table("setting", "default", "meaning")
            for key, (default, meaning) in explained(COMBINERS[name]).items():
                table.add_row(key, default or "(needed)", meaning)
            if table.rows:
                Console().print(table, markup=False)
            return
        table = Table("combiner", "paper", "needs of a step", "settings", show_lines=True)
        for key, kind in COMBINERS.items():
            paper = " ".join(header(kind).split("\n\n")[0].split()).partition(" https")[0]
            table.add_row(key, paper, kind.needs, ", ".join(explained(kind)))
        Console().print(table, markup=False)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="Methods; some by default.")] = None,
    width: Annotated[int, typer.Option(min=8, help="Features of the frozen block; four times as many inside.")] = 768,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a step, in 8 samples.")] = 1024,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks in the batch.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="On a processor. One counts its own time: steadier.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each of two comparisons.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure what methods cost on this machine, on one frozen feed-forward block, beside each other.

    [bold]polyrank bench lora moore ase --width 2048 --dtype bfloat16[/]

    The time of each is divided by the frozen block's in the same round; the median of all rounds and the quartiles are
    shown. Methods have their defaults. The project's own suite, with its peers, is `make bench` in a checkout.
    """
    with user_errors(), as_recipe_errors():
        import torch
        from rich.table import Table

        from polyrank.bench import bench as measured
        from polyrank.methods import METHODS
        from polyrank.recipe import RecipeError
        from polyrank.recipe.schema import nearest

        chosen = names or ["lora", "task_lora", "more", "hydralora", "mola", "ase", "moore_topk", "moore"]
        for name in chosen:
            if name not in METHODS:
                raise RecipeError(f"unknown method {name!r}{nearest(name, METHODS)}")
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype)
        if dtype not in dtypes:
            raise RecipeError(f"--dtype {dtype}: one of {', '.join(dtypes)}, or short, bf16")
        if threads > (cores := os.cpu_count() or threads):
            raise RecipeError(f"--threads {threads}: this machine has {cores} cores, and more threads only wait")
        if device not in ("cpu", "cuda"):
            raise RecipeError(f"--device {device}: cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("--device cuda: torch sees no GPU here; leave it out, or install torch with CUDA")
        if out is not None and not out.absolute().parent.is_dir():
            raise RecipeError(f"--out {out}: there is no folder {out.absolute().parent}")
        if out is not None and out.is_dir():
            raise RecipeError(f"--out {out} is a folder: give the name of a file in it")
        torch.set_num_threads(threads)
        sizes = {"width": width, "tokens": tokens, "tasks": tasks}
        costs = measured(
            {name: METHODS[name]() for name in chosen}, **sizes, dtype=dtypes[dtype], device=device, seconds=seconds
        )
        table = Table()
        for head in ("method", "trained weights", "training step", "forward", "kept", "alive"):
            table.add_column(head, no_wrap=True)
        for name, cost in costs.items():
            row = f"{cost.weights:,}", str(cost.training), str(cost.forward), f"{cost.kept:.2f}", f"{cost.alive:.2f}"
            table.add_row(name, *row)
        console = Console()
        if not console.is_terminal or console.width < 110:  # figures are never cut
            console.width = max(console.width, 110)
        console.print(table)
        first = next(iter(costs.values()))
        typer.echo(
            f"{first.rounds} rounds; the frozen block's training step takes "
            f"{1e3 * first.seconds / first.training.median:.3g} ms\n"
            "in units of the frozen block: times as medians (and quartiles) of the ratios of same rounds; kept, for\n"
            "the backward pass, and alive, at most at once in a step, are bytes"
        )
        if out is not None:
            found = {name: asdict(cost) for name, cost in costs.items()}
            settings = sizes | {"dtype": dtype, "device": device, "threads": threads, "torch": torch.__version__}
            settings |= {"polyrank": version("polyrank"), "processor": platform.processor() or platform.machine()}
            out.write_text(json.dumps({"settings": settings, "costs": found}, indent=1) + "\n", encoding="utf-8")
