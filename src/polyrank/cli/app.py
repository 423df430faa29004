"""The application: its options, and how errors become messages and exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="polyrank",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt one frozen pretrained model to many tasks at once with a mixture of low-rank experts.\n\n"
    "Start with [bold]polyrank quickstart[/]: six text tasks, five minutes on two CPU cores.",
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe; may be repeated. Example: --set training.steps=50",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the same folder.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's error is one message and exit code 2; training that diverged is 1, that signal n stopped 128 + n."""
    from polyrank.assets import AssetError
    from polyrank.checkpoint import CheckpointError, Interrupted
    from polyrank.processes import ProcessFailed, ProcessLost, speaks
    from polyrank.recipe import RecipeError
    from polyrank.train import Diverged

    def say(text: str) -> None:
        if speaks():  # what the others met, the first one was told
            typer.echo(text, err=True)

    try:
        yield
    except (RecipeError, AssetError, CheckpointError, ProcessFailed) as error:
        say(f"error: {error}")
        raise typer.Exit(2) from error
    except Diverged as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    except ProcessLost as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except Interrupted as stop:
        say(f"{stop}; go on with: polyrank train {stop.folder / 'recipe.yaml'} --resume")
        raise typer.Exit(128 + stop.signum) from stop
    except KeyboardInterrupt as stop:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from stop


@contextmanager
def as_recipe_errors() -> Iterator[None]:
    """What data or a question does not allow is a user's error."""
    from polyrank.recipe import RecipeError

    try:
        yield
    except ValueError as error:
        raise RecipeError(str(error)) from error


def quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"polyrank {version('polyrank')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
