"""Labelled texts from your own ``.jsonl`` and ``.csv`` files; every error names the line, the reason and the cure."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from polyrank.tasks import Examples


def read_file(path: str | Path, text: str = "text", label: str = "label") -> Examples:
    """Read labelled texts from a ``.jsonl`` file (one JSON object per line) or a ``.csv`` file (with a header row).

    ``text`` and ``label`` name the columns. The encoding is UTF-8, with or without a byte-order mark, with any line
    ends. Labels may be strings, whole numbers or booleans and become strings; blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything wrong in the file, as ``file:line: reason. cure``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (looked in {path.absolute().parent})")
    match path.suffix.lower():
        case ".jsonl":
            rows = _jsonl_rows(path, (text, label))
        case ".csv":
            rows = _csv_rows(path, (text, label))
        case suffix:
            raise ValueError(f"{path}: cannot read {suffix or 'a file without ending'}. Convert it to .jsonl or .csv")
    try:
        pairs = [_pair(path, line, *values, names=(text, label)) for line, values in rows]
    except UnicodeDecodeError as error:
        cure = f"Convert it: iconv -f LATIN1 -t UTF-8 {path.name}"
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}). {cure}") from error
    if not pairs:
        raise ValueError(f"{path}:1: no rows. Write at least one example with {text!r} and {label!r}")
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


Row = tuple[int, tuple[object, object]]  # (line number from 1, (text, label))


def _jsonl_rows(path: Path, names: tuple[str, str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                cure = "Each line is one JSON object, and strings escape their line ends as \\n"
                raise ValueError(f"{path}:{line}: bad JSON at column {error.colno}: {error.msg}. {cure}") from error
            if not isinstance(row, dict):
                cure = f'Write {{"{names[0]}": ..., "{names[1]}": ...}}'
                raise ValueError(f"{path}:{line}: expected an object, found {type(row).__name__}. {cure}")
            for name in names:
                if name not in row:
                    raise _missing(path, line, name, list(row))
            yield line, (row[names[0]], row[names[1]])


def _csv_rows(path: Path, names: tuple[str, str]) -> Iterator[Row]:
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
                    for name in names:
                        if name not in header:
                            raise _missing(path, start, name, header)
                elif len(cells) != len(header):
                    cure = 'Quote cells that hold a comma: "like, this"'
                    raise ValueError(f"{path}:{start}: {len(cells)} cells but {len(header)} columns. {cure}")
                else:
                    yield start, (cells[header.index(names[0])], cells[header.index(names[1])])
        except csv.Error as error:
            cure = 'Close every quote and double those inside a cell (""), or use .jsonl'
            raise ValueError(f"{path}:{line}: bad CSV: {error}. {cure}") from error


def _missing(path: Path, line: int, name: str, found: list[str]) -> ValueError:
    columns = ", ".join(map(repr, found)) or "none"
    return ValueError(
        f"{path}:{line}: no column {name!r}, found {columns}. "
        f"Rename it, or name yours: read_file(..., text=..., label=...)"
    )


def _pair(path: Path, line: int, text: object, label: object, names: tuple[str, str]) -> tuple[str, str]:
    if not isinstance(text, str):
        raise ValueError(f"{path}:{line}: {names[0]!r} is {json.dumps(text)}, not a string. Put it in quotes")
    if isinstance(label, int):  # JSON numbers and booleans
        label = json.dumps(label)
    if not isinstance(label, str):
        raise ValueError(f"{path}:{line}: {names[1]!r} is {json.dumps(label)}. Labels are strings or whole numbers")
    for name, value in zip(names, (text, label), strict=True):
        if not value.strip():
            raise ValueError(f"{path}:{line}: {name!r} is empty. Fill it in, or remove the row")
    return text, label.strip()
