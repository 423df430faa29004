"""Data: sets for the quick start, and readers for your own files and data sets."""

from polyrank.data.columns import Columns, examples
from polyrank.data.rows import Record, of_dataset, read_dataset, read_rows
from polyrank.data.text import DATASETS, TextSplits, load
from polyrank.tasks import Examples

__all__ = [
    "DATASETS",
    "Columns",
    "Examples",
    "Record",
    "TextSplits",
    "examples",
    "load",
    "of_dataset",
    "read_dataset",
    "read_rows",
]
