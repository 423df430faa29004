"""Rows of your own data: ``.jsonl``, ``.csv`` and ``.parquet`` files, and data sets of the library ``datasets``.

A row that cannot be read is no exception but a record with its fault: whoever reads decides whether to stop there.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

ENDINGS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row, where it stands (``file:line``), and what is wrong with it, if anything."""

    where: str
    row: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


def read_rows(path: str | Path) -> Iterator[Record]:
    """The rows of a file. The encoding is UTF-8, with or without a byte-order mark; blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file as a whole cannot be read, as ``file: reason. cure``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (looked in {path.absolute().parent})")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        what = path.suffix or "a file without ending"
        raise ValueError(f"{path}: cannot read {what}. Convert it to {' or '.join(ENDINGS)}")
    found = False
    try:
        for record in readers[path.suffix.lower()](path):
            found = True
            yield record
    except UnicodeDecodeError as error:
        cure = f"Convert it: iconv -f LATIN1 -t UTF-8 {path.name}"
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}). {cure}") from error
    if not found:
        raise ValueError(f"{path}:1: no rows. Write at least one example")


def read_dataset(name: str, split: str) -> Iterator[Record]:
    """The rows of a split of a data set: ``name`` or ``name:configuration`` on the hub, or a folder on disk.

    Numbers of a column of class labels become the labels' names, and -1 becomes a missing label.

    Raises:
        ValueError: the library `datasets` is missing, or the data set, its configuration or its split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError('data sets need the library datasets: pip install "polyrank[data]"') from error
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            found = loaded if isinstance(loaded, datasets.Dataset) else loaded[split]
        else:
            place, _, config = name.partition(":")
            found = datasets.load_dataset(place, config or None, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the data set {name!r}, split {split!r}, cannot be loaded: {reason}. Check the name (owner/name, or "
            "owner/name:configuration), the split and the network, or give a folder that save_to_disk wrote"
        ) from error
    yield from of_dataset(cast(Iterable[Mapping[str, Any]], found), f"{name}/{split}")


def of_dataset(dataset: Iterable[Mapping[str, Any]], where: str = "row") -> Iterator[Record]:
    """The rows of a ``datasets.Dataset``, or of any iterable of mappings."""
    names = _class_names(dataset)
    for number, row in enumerate(dataset, start=1):
        yield Record(f"{where}:{number}", {key: _named(value, names.get(key)) for key, value in row.items()})


def _class_names(dataset: object) -> dict[str, list[str]]:
    try:
        import datasets
    except ImportError:
        return {}
    if not isinstance(dataset, datasets.Dataset):
        return {}
    found: dict[str, list[str]] = {}
    for key, feature in dataset.features.items():
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(inner, datasets.ClassLabel):
            found[key] = list(inner.names)
    return found


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            where = f"{path}:{line}"
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                cure = "Each line is one JSON object, and strings escape their line ends as \\n"
                yield Record(where, fault=f"bad JSON at column {error.colno}: {error.msg}. {cure}")
                continue
            except (RecursionError, ValueError) as error:
                yield Record(where, fault=f"bad JSON: {error}. Each line is one JSON object")
                continue
            if "\\ud" in content.lower() and _half(row):
                yield Record(where, fault="it has half a character (\\ud800 to \\udfff alone). Write it again")
                continue
            if isinstance(row, dict):
                yield Record(where, row)
            else:
                yield Record(where, fault=f'expected an object, found {type(row).__name__}. Write {{"text": ..., ...}}')


def _half(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        header: list[str] = []
        try:
            for cells in reader:
                start, line = line, reader.line_num + 1  # a quoted cell may span lines: name the first
                if not cells:
                    continue
                if not header:
                    header = cells
                    if len(set(header)) < len(header):
                        raise ValueError(f"{path}:{start}: two columns have one name, in {header}. Rename one")
                elif len(cells) != len(header):
                    cure = 'Quote cells that hold a comma: "like, this"'
                    fault = f"{len(cells)} cells but {len(header)} columns. {cure}"
                    yield Record(f"{path}:{start}", fault=fault)
                else:  # CSV has no null: an empty cell is one
                    yield Record(f"{path}:{start}", {k: v or None for k, v in zip(header, cells, strict=True)})
        except csv.Error as error:
            cure = 'Close every quote and double those inside a cell (""), or use .jsonl'
            raise ValueError(f"{path}:{line}: bad CSV: {error}. {cure}") from error


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f'{path}: Parquet needs pyarrow: pip install "polyrank[data]"') from error
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}:{number}", row)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: no readable Parquet file: {str(error).splitlines()[0]}. Write it again") from error
