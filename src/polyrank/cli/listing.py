"""What there is: schema, methods."""

import json
import sys
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
def methods(name: Annotated[str | None, typer.Argument(help="One method, with its whole header.")] = None) -> None:
    """List the methods, their papers and their fields with defaults.

    [bold]polyrank methods moore[/]
    """
    with user_errors():
        from inspect import signature

        from rich.table import Table

        from polyrank.methods import METHODS
        from polyrank.recipe import RecipeError
        from polyrank.recipe.schema import nearest

        if name is not None and name not in METHODS:
            raise RecipeError(f"unknown method {name!r}{nearest(name, METHODS)}")
        if name is not None:
            typer.echo((sys.modules[METHODS[name].__module__].__doc__ or "").strip() + "\n")
        table = Table("method", "paper", "fields and defaults", show_lines=True)
        for key, kind in METHODS.items() if name is None else [(name, METHODS[name])]:
            title = (sys.modules[kind.__module__].__doc__ or key).strip().splitlines()[0]
            table.add_row(key, title, "\n".join(str(field) for field in signature(kind).parameters.values()))
        Console().print(table, markup=False)
