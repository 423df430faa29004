"""Data: text classification sets for the quick start, and readers for your own files."""

from polyrank.data.files import read_file
from polyrank.data.text import DATASETS, TextSplits, load
from polyrank.tasks import Examples

__all__ = ["DATASETS", "Examples", "TextSplits", "load", "read_file"]
