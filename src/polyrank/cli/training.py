"""From data to a run: quickstart, train, init."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.app import Overwrite, Settings, app, quiet_libraries, user_errors


@app.command()
def quickstart(
    method: Annotated[str, typer.Option(help="A name that `polyrank methods` lists.")] = "moore",
    seed: Annotated[int, typer.Option(min=0, help="Of the data samples, the adapter and the order.")] = 0,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Several seeds: also prints mean and deviation.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Built-in name, folder, or hub name of an encoder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: a new one in runs/.")] = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Adapt a small model to six text tasks and compare it with the frozen model.

    [bold]polyrank quickstart[/]

    [bold]polyrank quickstart --method more --set method.rank=16[/]

    [bold]polyrank quickstart --seeds 0,1,2[/]
    """
    with user_errors():
        from polyrank.processes import launched
        from polyrank.quickstart import Choices, quickstart
        from polyrank.recipe import RecipeError

        if launched() > 1:
            raise RecipeError("the quick start is made for one process: start it without a launcher")
        parts = [part.strip() for part in (seeds or str(seed)).split(",")]
        if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
            raise RecipeError(
                f"--seeds {seeds!r}: write different whole numbers with commas, for example --seeds 0,1,2"
            )
        quiet_libraries()
        choices = Choices(method, model, steps, out, tuple(settings or ()))
        quickstart(choices, [int(part) for part in parts], Console(), overwrite=overwrite)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; runs keep theirs as RUN/recipe.yaml.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: the recipe's.")] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load everything, take a few steps, say what it would cost; write nothing."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in the folder, if there is one."),
    ] = False,
) -> None:
    """Train what a recipe describes, and write a run folder.

    A recipe needs a model, a method and tasks; everything else has a default:

    [dim]model: minilm[/]
    [dim]method: {name: moore}[/]
    [dim]tasks: \\[newsgroups, {name: mood, train: mood-train.csv, test: mood-test.csv}][/]
    [dim]out: runs/mine[/]

    [bold]polyrank train recipe.yaml --set method.name=more --set training.steps=200[/]

    Another method starts from its own defaults, whatever the fields of the recipe's method; set those you want to keep.

    [bold]polyrank train recipe.yaml --dry-run[/]

    In several processes, on one machine or more:

    [bold]torchrun --nproc-per-node 2 -m polyrank train recipe.yaml[/]

    Ctrl-C saves the state and stops; after that, or a power cut:

    [bold]polyrank train recipe.yaml --resume[/]
    """
    with user_errors():
        from polyrank.processes import joined
        from polyrank.recipe import RecipeError, read_recipe, run
        from polyrank.recipe.card import show

        quiet_libraries()
        console = Console()
        with joined() as together:
            with together.sharing_errors():
                if dry_run and together.count > 1:
                    raise RecipeError("--dry-run tries a recipe in one process: start it without a launcher")
                changed = read_recipe(recipe, settings or ())
                if out is None and resume and (recipe.parent / "metrics.jsonl").is_file():
                    out = recipe.parent  # the recipe of a run folder goes on there, whatever the working directory
                if out is not None:
                    changed = changed.model_copy(update={"out": str(out)})
            if dry_run:
                from polyrank.recipe.plan import lines, plan

                console.print("\n".join(lines(plan(changed))), highlight=False, markup=False, soft_wrap=True)
                return
            finished = run(changed, overwrite=overwrite, resume=resume, progress=console.is_terminal)
            if together.first:
                show(finished, console)


@app.command()
def init(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Your .jsonl, .csv and .parquet files, or folders.")
    ],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe from your files; asks nothing, and says what it guessed.

    mood-train.jsonl and mood-test.jsonl make one task; a file alone is tested on a fifth of its texts.

    [bold]polyrank init my-data/[/]
    """
    with user_errors():
        from polyrank.recipe import RecipeError, check_recipe
        from polyrank.recipe.init import propose
        from polyrank.recipe.reading import parse_yaml

        if out.exists():
            raise RecipeError(f"{out} exists: choose another name with --out, or move it away")
        text, said = propose(files, out.parent)
        check_recipe(parse_yaml(text, str(out)), str(out), out.parent)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{out} cannot be written: {error.strerror}") from error
        for line in said:
            typer.echo(line)
        typer.echo(f"wrote {out}; next: polyrank train {out} --dry-run")
