"""`python -m polyrank`: the command."""

from polyrank.cli import main

main()
