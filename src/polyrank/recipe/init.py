"""A first recipe from somebody's files: what they hold is guessed, and each guess stands in the recipe as a comment."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.files import checked_name
from polyrank.recipe.reading import RecipeError

ENDINGS = (".jsonl", ".csv")
LOOKED_AT = 2000  # rows of each file
USUAL = ("label", "class", "category", "target", "y")  # names of label columns
MANY = 200  # a column with more different values than this is no label


@dataclass(frozen=True)
class Guess:
    """One task, and why."""

    name: str
    train: Path
    test: Path | None
    text: str
    label: str
    why: str


def propose(places: Sequence[Path], folder: Path) -> tuple[str, list[str]]:
    """The text of a recipe to be written into `folder`, and what to tell the person.

    `places` are files, or folders that hold them. FILE-train and FILE-test, or FILE_dev and the like, make one task.

    Raises:
        RecipeError: no file could be understood; every file and its reason are named.
    """
    files = _files(places)
    pairs, guesses, said = _pairs(files), [], []
    for name, (train, test) in pairs.items():
        try:
            guesses.append(_guess(name, train, test))
        except (ValueError, OSError) as error:
            said.append(f"left out: {train}: {error}")
    if not guesses:
        found = "\n".join(said) or f"no {' or '.join(ENDINGS)} file in {', '.join(map(str, places))}"
        raise RecipeError(f"no task found: {found}\nEach file needs a column of texts and a column of labels")
    said = [f"task {guess.name}: {guess.why}" for guess in guesses] + said
    return _recipe(guesses, said, folder), said


def _files(places: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.iterdir() if path.suffix.lower() in ENDINGS)
        elif place.is_file():
            found.append(place)
        else:
            raise RecipeError(f"no such file or folder: {place}")
    return found


def _pairs(files: Sequence[Path]) -> dict[str, tuple[Path, Path | None]]:
    """Task name -> (training file, test file or None)."""
    parts: dict[Path, dict[str, Path]] = {}
    for path in files:
        match = re.fullmatch(r"(?i)(.*?)[-_. ]?(train|training|test|dev|valid|validation|eval)", path.stem)
        stem, part = (match[1] or path.resolve().parent.name, match[2].lower()) if match else (path.stem, "train")
        of_task = parts.setdefault(path.parent / stem, {})
        part = "train" if part == "training" else part
        of_task[f"{part} of {path.name}" if part in of_task else part] = path
    out: dict[str, tuple[Path, Path | None]] = {}
    for key, found in parts.items():
        tests = [found.pop(part) for part in ("test", "eval", "validation", "valid", "dev") if part in found]
        for train in list(found.values()) or [tests.pop()]:
            out[_name(key.name, {name.lower() for name in out})] = (train, tests[0] if tests else None)
    return out


def _name(stem: str, taken: set[str]) -> str:
    """A valid task name that is like the file's."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:80]
    for name in itertools.chain([plain], (f"{plain or 'task'}-{number}" for number in itertools.count(1))):
        try:
            if name.lower() not in taken:
                return checked_name(name, "task")
        except ValueError:
            continue
    raise AssertionError("unreachable")


def _guess(name: str, train: Path, test: Path | None) -> Guess:
    rows = _rows(train)
    if not rows:
        raise ValueError("no rows")
    columns = [column for column in rows[0] if all(column in row for row in rows)]
    lengths = {
        column: sum(len(row[column]) for row in rows) / len(rows)
        for column in columns
        if all(isinstance(row[column], str) for row in rows) and any(" " in row[column].strip() for row in rows)
    }
    values = {
        column: Counter(str(row[column]) for row in rows)
        for column in columns
        if all(isinstance(row[column], str | int) for row in rows)
    }
    labels = [
        column
        for column, counts in values.items()
        if 2 <= len(counts) <= MANY and (len(counts) <= len(rows) / 2 or column.lower() in USUAL)
    ]
    if not labels:
        raise ValueError(f"none of the columns {columns} looks like labels: 2 to {MANY} values that come again")
    label = min(labels, key=lambda column: (column.lower() not in USUAL, len(values[column])))
    texts = [column for column in lengths if column != label]
    if not texts:
        raise ValueError(f"none of the columns {columns} holds texts, of several words, beside the labels in {label!r}")
    text = max(texts, key=lambda column: (column.lower() in ("text", "sentence"), lengths[column]))
    common = ", ".join(f"{value} {count}" for value, count in values[label].most_common(3))
    seen = f"{len(rows)}{'+' if len(rows) == LOOKED_AT else ''}"
    tests = f"tested on {test.name}" if test else "tested on a fifth of it"
    why = f"classification of {text!r} into {len(values[label])} values of {label!r} ({common}); {seen} rows, {tests}"
    return Guess(name, train, test, text, label, why)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The first rows as they are; what is wrong with a row comes to light when the data is loaded."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return list(itertools.islice(csv.DictReader(file), LOOKED_AT))
            lines = (line for line in file if line.strip())
            rows = [json.loads(line) for line in itertools.islice(lines, LOOKED_AT)]
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object per line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not one JSON object per line")
    return rows


def _recipe(guesses: Sequence[Guess], said: Sequence[str], folder: Path) -> str:
    def path(of: Path) -> str:
        whole = of.resolve()
        return json.dumps(str(whole.relative_to(folder.resolve()) if whole.is_relative_to(folder.resolve()) else whole))

    tasks: list[str] = []
    for guess, why in zip(guesses, said, strict=False):
        tasks += [f"  # {why}", f"  - name: {guess.name}", f"    train: {path(guess.train)}"]
        if guess.test is not None:
            tasks.append(f"    test: {path(guess.test)}")
        tasks += [f"    text: {json.dumps(guess.text)}", f"    label: {json.dumps(guess.label)}"]
    return RECIPE.format(tasks="\n".join(tasks))


RECIPE = """\
# Written by `polyrank init`. Next: polyrank train THIS --dry-run; then polyrank train THIS
# Every field with its default: polyrank schema
model: minilm  # a built-in name, a folder with a transformers model, or a name on the model hub
method: {{name: moore, router_dim: 16}}  # `polyrank methods` lists them
targets: all-linear  # or a regular expression, or a list of endings
tasks:
{tasks}
max_train: 4000  # examples of each task, at most
max_test: 500
max_length: 64  # tokens; longer texts are cut
training:
  steps: 300
  batch_size: 32
  accumulation: 2  # micro-batches of a step
  lr: 5e-4
  head_lr: 1e-3
out: runs/mine
"""
