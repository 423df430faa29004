"""A first recipe from somebody's files: what they hold is guessed, and each guess stands in the recipe as a comment."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyrank.data import read_rows
from polyrank.data.rows import ENDINGS
from polyrank.files import checked_name
from polyrank.recipe.reading import RecipeError
from polyrank.tasks import KINDS, LanguageTask

LOOKED_AT = 2000  # rows of each file
LABELS = ("label", "labels", "class", "category", "target", "y", "score", "rating", "similarity")  # usual label columns
TEXTS = ("text", "sentence")  # usual text columns
ANSWERS = ("answer", "answerkey", "label", "correct", "gold", "target")  # usual columns of the right option
PROMPTS = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("input", "output"),
    ("source", "target"), ("question", "answer"), ("document", "summary"), ("article", "highlights"),
)  # fmt: skip
MOSTLY = 0.5  # of the rows have a value in a column: it may be one of the task's
FEW = 10  # labels that a language model scores one by one
MANY = 200  # a column with more different values than this is no label

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Guess:
    """What one file holds: the fields of a task in a recipe beside its name and files, and why."""

    fields: dict[str, Any]
    why: str
    name: str = ""
    labels: tuple[str, ...] = ()
    train: Path = Path()
    test: Path | None = None

    @property
    def language(self) -> bool:
        return issubclass(KINDS[self.fields["type"]], LanguageTask)


def propose(places: Sequence[Path], folder: Path) -> tuple[str, list[str]]:
    """The text of a recipe to be written into `folder`, and what to tell the person.

    `places` are files, or folders that hold them. FILE-train and FILE-test, or FILE_dev and the like, make one task.

    Raises:
        RecipeError: no file could be understood; every file and its reason are named.
    """
    pairs, guesses, said = _pairs(_files(places)), [], []
    for name, (train, test) in pairs.items():
        try:
            rows = _rows(train)
            found = guess(rows)
        except (ValueError, OSError) as error:
            said.append(f"left out: {train}: {error}")
            continue
        size = f"{len(rows)}{'+' if len(rows) == LOOKED_AT else ''} rows"
        tests = f"tested on {test.name}" if test else "tested on a fifth of it"
        guesses.append(replace(found, name=name, train=train, test=test, why=f"{found.why}; {size}, {tests}"))
    if any(one.language for one in guesses):
        guesses, more = _all_language(guesses)
        said += more
    if not guesses:
        found = "\n".join(said) or f"no {' or '.join(ENDINGS)} file in {', '.join(map(str, places))}"
        raise RecipeError(f"no task found: {found}\nWhat files may hold: docs/tasks.md")
    said = [f"task {one.name}: {one.why}" for one in guesses] + said
    return _recipe(guesses, said, folder), said


def _all_language(guesses: Sequence[Guess]) -> tuple[list[Guess], list[str]]:
    """Where one task needs a language model all do: it chooses the label of a classification, or writes it."""
    kept: list[Guess] = []
    said: list[str] = []
    for one in guesses:
        text = one.fields.get("text")
        if one.language:
            kept.append(one)
        elif one.fields["type"] == "classification":
            parts = [text] if isinstance(text, str) else text or []
            if any(set(part) & set("{}[].:!") for part in parts):
                said.append(f"left out: {one.train}: rename its text column to plain letters, to stand in a template")
                continue
            template = "\n".join(f"{{{part}}}" for part in parts) + f"\n{one.fields['label']}:"
            fields = {"type": "multiple_choice", "text": template, "choices": one.labels, "label": one.fields["label"]}
            if len(one.labels) > FEW:
                fields = {"type": "generation", "text": template, "label": one.fields["label"]}
            kept.append(
                replace(one, fields=fields, why=f"{one.why}; written out, as another task needs a language model")
            )
        else:
            said.append(
                f"left out: {one.train}: {one.fields['type']} needs an encoder with heads and another task a language "
                "model: run polyrank init on this file alone"
            )
    return kept, said


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


def guess(rows: Rows) -> Guess:
    """What the rows hold.

    Raises:
        ValueError: nothing that is known.
    """
    present = Counter(column for row in rows for column, value in row.items() if value is not None)
    columns = [column for column, count in present.items() if count >= MOSTLY * len(rows)]
    rows = [row for row in rows if all(row.get(column) is not None for column in columns)]
    looks = [_conversations, _choices, _tagged, _several, _completions, _scores, _classes, _numbers]
    for look in looks if len(present) > 1 else [_conversations, _plain]:
        found = look(rows, columns) if rows else None
        if found is not None:
            return found
    raise ValueError(f"none of the columns {list(present)} looks like labels, answers or texts")


def _lists(rows: Rows, columns: Sequence[str]) -> list[str]:
    """The columns that hold lists of strings."""
    return [
        c for c in columns
        if all(isinstance(row[c], list) and row[c] and all(isinstance(x, str) for x in row[c]) for row in rows)
    ]  # fmt: skip


def _texts(rows: Rows, columns: Sequence[str], least: float = 0.5) -> list[str]:
    """The columns of strings of which at least a share has several words, the likeliest text first."""
    strings = [c for c in columns if all(isinstance(row[c], str) for row in rows)]
    several = {c: sum(" " in row[c].strip() for row in rows) for c in strings}
    found = {c: sum(len(row[c]) for row in rows) for c in strings if several[c] >= max(1, least * len(rows))}
    return sorted(found, key=lambda c: (c.lower() not in TEXTS, -found[c]))


def _conversations(rows: Rows, columns: Sequence[str]) -> Guess | None:
    for column in columns:
        turns = [turn for row in rows if isinstance(row[column], list) for turn in row[column]]
        if turns and all(isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in turns):
            return Guess({"type": "generation", "text": column}, f"the last turn of the conversations in {column!r}")
    return None


def _choices(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """A list of options, and a column that names the right one."""
    for options in _lists(rows, columns):
        for answer in sorted(columns, key=lambda c: c.lower() not in ANSWERS):
            kinds = {type(row[answer]) for row in rows}
            right = kinds == {int} and all(0 <= row[answer] < len(row[options]) for row in rows)
            right |= kinds == {str} and all(
                row[answer] in row[options] or (len(row[answer]) == 1 and row[answer].isalpha()) for row in rows
            )
            texts = _texts(rows, [c for c in columns if c not in (options, answer)])
            if right and texts and all(len(row[options]) > 1 for row in rows):
                fields = {"type": "multiple_choice", "text": texts[0], "options": options, "label": answer}
                return Guess(fields, f"which of {options!r} answers {texts[0]!r}; the right one is in {answer!r}")
    return None


def _tagged(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """Two lists as long as each other: the one with fewer different values has the tags."""
    lists = _lists(rows, columns)
    for words, tags in itertools.permutations(lists, 2):
        sizes = [len({x for row in rows for x in row[c]}) for c in (words, tags)]
        if all(len(row[words]) == len(row[tags]) for row in rows) and sizes[1] <= min(sizes[0], MANY):
            fields = {"type": "token_classification", "text": words, "label": tags}
            return Guess(fields, f"a tag in {tags!r}, of {sizes[1]}, for each word in {words!r}")
    return None


def _several(rows: Rows, columns: Sequence[str]) -> Guess | None:
    texts = _texts(rows, columns)
    for labels in [c for c in columns if all(isinstance(row[c], list) for row in rows)]:
        counts = Counter(str(x) for row in rows for x in row[labels])
        if texts and 2 <= len(counts) <= MANY:
            fields = {"type": "multi_label", "text": texts[0], "label": labels}
            return Guess(fields, f"any of {len(counts)} labels in {labels!r} for {texts[0]!r} ({_common(counts)})")
    return None


def _completions(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """A prompt and what follows, by the usual names, where the answers are no labels that come again and again."""
    lower = {column.lower(): column for column in columns}
    for prompt, completion in PROMPTS:
        if prompt in lower and completion in lower:
            text, label = lower[prompt], lower[completion]
            answers = [row[label] for row in rows]
            if all(isinstance(row[text], str) for row in rows) and all(isinstance(one, str) for one in answers):
                few = len(set(answers)) <= min(MANY, len(rows) / 2) and completion != "completion"
                if not few:
                    fields = {"type": "generation", "text": text, "label": label}
                    return Guess(fields, f"the text {label!r} after the prompt {text!r}")
    return None


def _numbers(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """A column of numbers that are no names of classes: with fractions, and five different ones or more."""
    texts = _texts(rows, columns)
    for column in sorted(columns, key=lambda c: c.lower() not in LABELS):
        numbers = [_number(row[column]) for row in rows]
        values = {number for number in numbers if number is not None}
        if None in numbers or not texts or all(value == int(value) for value in values) or len(values) < 5:
            continue
        pair = _pair(rows, texts)
        fields = {"type": "regression", "text": pair, "label": column}
        return Guess(fields, f"a number from {min(values):g} to {max(values):g} in {column!r} for {_written(pair)}")
    return None


def _scores(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """Numbers in a column of a usual name."""
    texts = _texts(rows, columns)
    return _numbers(rows, [*texts, *(c for c in columns if c.lower() in LABELS and c not in texts)])


def _number(found: object) -> float | None:
    try:
        number = math.nan if isinstance(found, bool | list | dict) else float(str(found))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _classes(rows: Rows, columns: Sequence[str]) -> Guess | None:
    single = [c for c in columns if all(isinstance(row[c], str | int) for row in rows)]
    values = {c: Counter(str(row[c]) for row in rows) for c in single}
    labels = [
        column
        for column, counts in values.items()
        if 2 <= len(counts) <= MANY and (len(counts) <= len(rows) / 2 or column.lower() in LABELS)
    ]
    label = min(labels, key=lambda column: (column.lower() not in LABELS, len(values[column])), default=None)
    texts = _texts(rows, [column for column in columns if column != label], least=0.01)
    if label is None or not texts:
        return None
    pair, counts = _pair(rows, texts), values[label]
    why = f"classification of {_written(pair)} into {len(counts)} values of {label!r} ({_common(counts)})"
    names = sorted({json.dumps(row[label]) if isinstance(row[label], int) else row[label].strip() for row in rows})
    return Guess({"type": "classification", "text": pair, "label": label}, why, labels=tuple(names))


def _pair(rows: Rows, texts: Sequence[str]) -> str | list[str]:
    """Two columns where both hold texts that differ from row to row, in the order of the file."""
    both = [column for column in rows[0] if column in texts[:2]]
    several = [c for c in both if sum(" " in row[c].strip() for row in rows) > len(rows) / 2]
    return both if len(texts) == 2 and len(several) == 2 else texts[0]


def _written(columns: str | Sequence[str]) -> str:
    return repr(columns) if isinstance(columns, str) else f"the pair {' and '.join(map(repr, columns))}"


def _common(counts: Counter[str]) -> str:
    return ", ".join(f"{' '.join(value.split())[:40]} {count}" for value, count in counts.most_common(3))


def _plain(rows: Rows, columns: Sequence[str]) -> Guess | None:
    """Nothing but texts."""
    texts = _texts(rows, columns)
    if len(columns) == 1 and texts:
        return Guess(
            {"type": "generation", "text": texts[0]}, f"plain text in {texts[0]!r}: every next token is learned"
        )
    return None


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """The first rows that can be read; what is wrong with others comes to light when the data is loaded."""
    records = list(itertools.islice(read_rows(path), LOOKED_AT))
    rows = [record.row for record in records if not record.fault]
    if not rows:
        raise ValueError(records[0].fault)
    return rows


def _recipe(guesses: Sequence[Guess], said: Sequence[str], folder: Path) -> str:
    def path(of: Path) -> str:
        whole = of.resolve()
        return json.dumps(str(whole.relative_to(folder.resolve()) if whole.is_relative_to(folder.resolve()) else whole))

    tasks: list[str] = []
    for one, why in zip(guesses, said, strict=False):
        tasks += [f"  # {why}", f"  - name: {one.name}", f"    train: {path(one.train)}"]
        if one.test is not None:
            tasks.append(f"    test: {path(one.test)}")
        tasks += [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in one.fields.items()]
    return (LANGUAGE if guesses[0].language else HEADS).format(tasks="\n".join(tasks))


HEADS = """\
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

LANGUAGE = """\
# Written by `polyrank init`. Next: polyrank train THIS --dry-run; then polyrank train THIS
# Every field with its default: polyrank schema
model: smollm2  # a built-in name, a folder with a transformers model, or a name on the model hub
method: {{name: more, rank: 8}}  # `polyrank methods` lists them
targets: [q_proj, v_proj]  # or all-linear, or a regular expression; other models name their layers otherwise
tasks:
{tasks}
max_train: 4000  # examples of each task, at most
max_test: 200
max_length: 128  # tokens of a prompt with its completion; longer prompts are cut
training:
  steps: 200
  batch_size: 16
  accumulation: 2  # micro-batches of a step
  lr: 2e-3
  eval_every: 50
  max_holdout: 50  # held-out examples of each task, to choose the step by
out: runs/mine
"""
