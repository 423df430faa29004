"""From rows to examples: which columns hold what, for each type of task.

A column is named (`question`), reached inside (`choices.text`), or part of a template (`"Q: {question}\\nA:"`). Every
fault names the place, the reason and the cure.

    type                   text (default column)            label (default column)
    classification         text: a string, or two columns   label: a string, whole number or true/false
    multi_label            the same                         labels: a list ("a|b" in CSV), or columns of 0 and 1
    regression             the same                         label: a number
    token_classification   words: a list of strings         tags: a list as long
    generation             prompt, messages, or text        completion; the last turn; none (plain text)
    multiple_choice        prompt, and options: a list      answer: an option, its letter, or its index from 0
"""

import json
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyrank.data.rows import Record
from polyrank.tasks import Examples, Label, Text

Column = str | Sequence[str]
DEFAULTS: dict[str, tuple[str, str]] = {
    "classification": ("text", "label"),
    "multi_label": ("text", "labels"),
    "regression": ("text", "label"),
    "token_classification": ("words", "tags"),
    "generation": ("prompt", "completion"),
    "multiple_choice": ("prompt", "answer"),
}
LETTERS = string.ascii_uppercase


class RowError(ValueError):
    """What is wrong with one row, and the cure."""


@dataclass(frozen=True)
class Columns:
    """Where a task's texts and labels stand in a row; None: the default columns of its type.

    names: the label of each number; of multiple choice the keys of the options, or the column that holds them.
    choices: the options of multiple choice, where they are the same in every row.
    letters: show the options of multiple choice in the prompt, as "(A) text", and answer by letter.
    """

    kind: str = "classification"
    text: Column | None = None
    label: Column | None = None
    options: Column = "options"
    names: Column | None = None
    letters: bool = False
    choices: Sequence[str] | None = None

    def example(self, row: Mapping[str, Any]) -> tuple[Text, Label]:
        """The text and the label of a row.

        Raises:
            RowError: something is missing or of the wrong type.
        """
        return READERS[self.kind](self, row)

    def question(self, row: Mapping[str, Any]) -> Text:
        """The text of a row that need not have a label.

        Raises:
            RowError: something is missing or of the wrong type.
        """
        if self.kind == "generation":
            known = ("messages", "prompt", "text")
            column = next((one for one in known if one in row), "prompt") if self.text is None else _one(self.text)
            found = value(row, column)
            if isinstance(found, list):
                turns = _turns(found)
                return turns[:-1] if turns[-1][0] == "assistant" else turns
            return _text(row, column)
        labels = [self.label_column] if isinstance(self.label_column, str) else self.label_column
        return self.example({**row, **dict.fromkeys(labels)})[0]

    @property
    def text_column(self) -> Column:
        return DEFAULTS[self.kind][0] if self.text is None else self.text

    @property
    def label_column(self) -> Column:
        return DEFAULTS[self.kind][1] if self.label is None else self.label


def examples(records: Iterable[Record], columns: Columns, *, skip: bool = False) -> tuple[Examples, list[str]]:
    """The examples of some records; with `skip`, bad rows are left out, and returned as `place: reason`.

    Raises:
        ValueError: the first bad row, where they are not skipped; no row at all.
    """
    texts, labels, faults = [], [], []
    for record in records:
        fault = record.fault
        if not fault:
            try:
                text, label = columns.example(record.row)
                texts.append(text)
                labels.append(label)
            except RowError as error:
                fault = str(error)
        if fault and not skip:
            raise ValueError(f"{record.where}: {fault}")
        if fault:
            faults.append(f"{record.where}: {fault}")
    if not texts:
        raise ValueError(f"no row can be used: {faults[0]}" if faults else "no rows. Write at least one example")
    return Examples(texts, labels), faults


def value(row: Mapping[str, Any], column: str, extra: Mapping[str, str] | None = None) -> Any:
    """What a row has in a column, inside one, or put into a template."""
    if "{" in column:
        try:
            return _Template().vformat(column, (), {**row, **(extra or {})})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RowError(
                f"the template {column!r} does not fit the columns {_listed(row)} ({error}). Write {{column}}, or "
                "{column[key]} for what is inside"
            ) from error
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise RowError(f"no column {column!r}, found {_listed(row)}. Rename it, or name yours in the task")
        found = found[part]
    return found


def fields(column: str) -> list[str]:
    """The columns that a column's name or template takes, without what is inside them."""
    if "{" not in column:
        return [column]
    found = [name for _, name, _, _ in string.Formatter().parse(column) if name]
    return list(dict.fromkeys(name.split("[")[0] for name in found))


class _Template(string.Formatter):
    """Templates reach into columns by key, never into Python objects."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if "." in field_name or field_name.startswith("_"):
            raise KeyError(f"{field_name}: write {{column[key]}}")
        found = super().get_field(field_name, args, kwargs)
        if found[0] is None or isinstance(found[0], list | dict):
            raise ValueError(f"{field_name} is {_short(found[0])}, not a text")
        return found


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _text(row: Mapping[str, Any], column: str, extra: Mapping[str, str] | None = None) -> str:
    found = value(row, column, extra)
    if not isinstance(found, str):
        raise RowError(f"{column!r} is {_short(found)}, not a string. Put it in quotes")
    if not found.strip():
        raise RowError(f"{column!r} is empty. Fill it in, or remove the row")
    return found


def _short(found: object) -> str:
    return json.dumps(found, default=str)[:80]


def _strings(row: Mapping[str, Any], column: str, separator: str | None) -> tuple[str, ...] | None:
    """A list of strings; one string is cut at `separator`. None where it is missing."""
    found = value(row, column)
    if found is None:
        return None
    if isinstance(found, str):
        found = [part.strip() for part in found.split(separator)]
        found = [part for part in found if part]
    if not isinstance(found, list | tuple) or not all(isinstance(one, str | int) for one in found):
        raise RowError(f"{column!r} is {_short(found)}, not a list of strings")
    return tuple(str(one) for one in found)


def _sentence(columns: Columns, row: Mapping[str, Any]) -> Text:
    """A text or a pair."""
    column = columns.text_column
    if isinstance(column, str):
        return _text(row, column)
    return tuple(_text(row, one) for one in column)


def _name(columns: Columns, found: Any, column: str) -> str | None:
    """A label as a name; whole numbers and booleans become strings, or the name that the task gives them."""
    if found is None:
        return None
    if isinstance(found, str) and found.strip().isdecimal() and columns.names is not None:
        found = int(found)  # CSV has no numbers
    if isinstance(found, int) and not isinstance(found, bool) and columns.names is not None:
        if not 0 <= found < len(columns.names):
            raise RowError(f"{column!r} is {found}, but the task names {len(columns.names)} labels, counted from 0")
        return columns.names[found]
    if isinstance(found, int):
        found = json.dumps(found)
    if not isinstance(found, str):
        raise RowError(f"{column!r} is {_short(found)}. Labels are strings or whole numbers")
    if not found.strip():
        raise RowError(f"{column!r} is empty. Fill it in, or write null where the label is missing")
    return found.strip()


def _digits(label: str) -> str | int:
    return int(label) if label.isdecimal() else label


def _one(column: Column) -> str:
    if not isinstance(column, str):
        raise RowError(f"label {list(column)!r}: this type of task has one column of labels")
    return column


def _classification(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    column = _one(columns.label_column)
    return _sentence(columns, row), _name(columns, value(row, column), column)


def _multi_label(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    text, column = _sentence(columns, row), columns.label_column
    if isinstance(column, str):
        found = value(row, column)
        labels = _strings(row, column, "|")
        if isinstance(found, list) and len(found) > 2 and all(isinstance(x, int) and x in (0, 1) for x in found):
            raise RowError(f"{column!r} is {_short(found)}, a mark for each label. Write the list of the labels' names")
        names = labels and [_name(columns, _digits(one), column) for one in labels]
        return text, None if labels is None else tuple(sorted({str(one) for one in names or ()}))
    found = {one: value(row, one) for one in column}
    if all(one is None for one in found.values()):
        return text, None
    if any(str(one).lower() not in ("0", "1", "true", "false") for one in found.values()):
        raise RowError(f"the label columns are {_short(found)}. Write 0 or 1 in each")
    return text, tuple(sorted(one for one, here in found.items() if str(here).lower() in ("1", "true")))


def _regression(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    text, column = _sentence(columns, row), _one(columns.label_column)
    found = value(row, column)
    if found is None:
        return text, None
    try:
        number = float(found)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(found, bool):
        raise RowError(f"{column!r} is {_short(found)}, not a finite number")
    return text, number


def _words(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    words, tags = (_strings(row, _one(column), None) for column in (columns.text_column, columns.label_column))
    if not words:
        raise RowError(f"{columns.text_column!r} has no words. Fill it in, or remove the row")
    if not all(word.strip() for word in words):
        raise RowError(f"{columns.text_column!r} has an empty word. Remove it, and its tag")
    if tags is not None:
        tags = tuple(str(_name(columns, _digits(tag), "tags")) for tag in tags)
    if tags is not None and len(tags) != len(words):
        raise RowError(f"{len(words)} words but {len(tags)} tags. Write one tag for each word")
    return words, tags


def _generation(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    """prompt and completion, or messages, or plain text."""
    if columns.text is None and columns.label is None:
        if "messages" in row:
            return _conversation(row["messages"])
        if "prompt" not in row and "text" in row:
            if len(row) > 1:
                raise RowError(
                    f"the columns are {_listed(row)}: say which hold the prompt and the completion, text and label"
                )
            return "", _text(row, "text")
    column = columns.text_column
    if columns.label is None and columns.text is not None:  # one column: a conversation or plain text
        found = value(row, _one(column))
        return _conversation(found) if isinstance(found, list) else ("", _text(row, _one(column)))
    label = _one(columns.label_column)
    said = value(row, label)
    if isinstance(said, int):
        said = _name(columns, said, label)
    prompt = value(row, _one(column))
    text = _turns(prompt) if isinstance(prompt, list) else _text(row, _one(column))
    if not isinstance(said, str | int | float | None):
        raise RowError(f"{label!r} is {_short(said)}, not a string. Write the text that is to follow the prompt")
    if said is not None and not str(said).strip():
        raise RowError(f"{label!r} is empty. Fill it in, or write null where the completion is missing")
    return text, None if said is None else str(said)


def _turns(found: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise RowError(f"messages are {_short(found)}, not a list of turns")
    for turn in found:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise RowError(f'a turn is {_short(turn)}. Write {{"role": "user", "content": "..."}}')
    return tuple((turn["role"], turn["content"]) for turn in found)


def _conversation(found: Any) -> tuple[Text, Label]:
    turns = _turns(found)
    if turns[-1][0] != "assistant":
        raise RowError("the last turn of messages is not the assistant's, and its answer is what is learned. Add it")
    if len(turns) < 2:
        raise RowError("messages hold nothing but an answer. Put the user's turn before it")
    return turns[:-1], str(turns[-1][1])


def _multiple_choice(columns: Columns, row: Mapping[str, Any]) -> tuple[Text, Label]:
    if columns.choices is not None:
        options = tuple(columns.choices)
    elif isinstance(columns.options, str):
        options = _strings(row, columns.options, "|") or ()
    else:
        options = tuple(_text(row, one) for one in columns.options)
    if len(set(options)) < len(options) or not all(option.strip() for option in options):
        raise RowError(f"the options {_short(options)} are not all different, or one is empty")
    if len(options) < 2 or len(options) > len(LETTERS):
        raise RowError(f"{len(options)} options. Give two to {len(LETTERS)}, as a list")
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    column = _one(columns.text_column)
    prompt = _text(row, column, {"options": listed})
    if columns.letters and "{options}" not in column:
        prompt = f"{prompt}\n{listed}\nAnswer:"
    label = _one(columns.label_column)
    answer = _place(columns, row, value(row, label), options, label)
    return (prompt, tuple(LETTERS[: len(options)]) if columns.letters else options), answer


def _place(columns: Columns, row: Mapping[str, Any], found: Any, options: Sequence[str], column: str) -> int | None:
    """The index of the right option."""
    if found is None:
        return None
    keys = _strings(row, columns.names, "|") if isinstance(columns.names, str) else columns.names
    text = json.dumps(found) if isinstance(found, bool | int) else str(found).strip()
    if keys is not None and text in keys:
        return list(keys).index(text)
    if keys is None and columns.choices is None and isinstance(found, int) and not isinstance(found, bool):
        text = "" if not 0 <= found < len(options) else str(found)
        if text:
            return found
    if keys is None and text in options:
        return list(options).index(text)
    if keys is None and len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return LETTERS.index(text.upper())
    if keys is None and text.isdecimal() and int(text) < len(options):
        return int(text)
    known = f"one of the names {list(keys)}" if keys is not None else "an option, its letter, or its index from 0"
    raise RowError(f"{column!r} is {_short(found)}, not {known}; the options are {list(options)}"[:300])


READERS: dict[str, Callable[[Columns, Mapping[str, Any]], tuple[Text, Label]]] = {
    "classification": _classification,
    "multi_label": _multi_label,
    "regression": _regression,
    "token_classification": _words,
    "generation": _generation,
    "multiple_choice": _multiple_choice,
}
