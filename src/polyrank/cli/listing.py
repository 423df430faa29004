"""What there is: schema, methods, combiners."""

import json
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.app import app, user_errors


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
