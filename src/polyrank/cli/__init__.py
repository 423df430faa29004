"""The command `polyrank`. Heavy imports stand inside the commands, so that the help comes at once."""

from polyrank.cli import training, asking, exporting, listing  # noqa: F401, I001 - they register their commands, in the order of the help
from polyrank.cli.app import app as app


def main() -> None:
    """The entry point of the command."""
    app()
