"""What a person asks a finished run: texts of the command line, lines, or rows of a data file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyrank.data import Columns, Record, read_rows
from polyrank.data.columns import RowError, fields
from polyrank.data.rows import ENDINGS
from polyrank.recipe.reading import RecipeError
from polyrank.recipe.runs import Run
from polyrank.recipe.schema import nearest
from polyrank.tasks import Classification, MultipleChoice, Task, Text


def chosen_tasks(run: Run, task: str | None) -> list[Task]:
    """The task of that name, or all.

    Raises:
        RecipeError: the run has no such task.
    """
    tasks = {known.name: known for known in run.model.tasks}
    if task is not None and task not in tasks:
        raise RecipeError(f"--task: no task {task!r} in {run.folder}{nearest(task, tasks)}")
    return list(tasks.values()) if task is None else [tasks[task]]


def read_questions(texts: Sequence[str], file: Path | None) -> list[str] | list[Record]:
    """The texts of the command line, the lines of a file or of standard input, or the rows of a data file.

    Raises:
        RecipeError: both texts and a file, an unreadable file, or no text at all.
    """
    if texts and file is not None:
        raise RecipeError("give texts or --file, not both")
    try:
        if file is not None and file.suffix.lower() in ENDINGS:
            records = list(read_rows(file))
            faults = [f"{record.where}: {record.fault}" for record in records if record.fault]
            if faults:
                raise RecipeError(faults[0])
            return records
        if file is not None:
            texts = file.read_text(encoding="utf-8-sig").split("\n")
        elif not texts:
            texts = sys.stdin.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the texts cannot be read: {error}; give a UTF-8 file with one text per line") from error
    except ValueError as error:
        raise RecipeError(str(error)) from error
    texts = [text.rstrip("\r") for text in texts if text.strip()]
    if not texts:
        raise RecipeError(
            'no text: give one in quotes, name a --file, or pipe lines in: echo "..." | polyrank predict RUN'
        )
    return list(texts)


def as_texts(run: Run, task: Task, questions: list[str] | list[Record]) -> list[Text]:
    """The questions as the task reads them: rows by the columns of the run's recipe, and lines of text.

    A line is put into the recipe's template, if that has one column. For token classification it is cut at white space;
    a tab stands between the two texts of a pair, and between a question of multiple choice and its options.

    Raises:
        RecipeError: a question that does not fit the task.
    """
    source = next((source for source in run.recipe.tasks if source.name == task.name), None)
    columns = Columns(task.kind) if source is None else source.columns(task.kind)
    out: list[Text] = []
    for number, question in enumerate(questions, start=1):
        try:
            row = _row(task, columns, question) if isinstance(question, str) else question.row
            text = columns.question(row)
            task.check(text, None)
        except (RowError, ValueError) as error:
            where = f"text {number}" if isinstance(question, str) else question.where
            several = len(run.model.tasks) > 1
            cure = (
                f". For another task: --task {' or '.join(known.name for known in run.model.tasks)}" if several else ""
            )
            raise RecipeError(f"{where}, task {task.name!r}: {error}{cure}") from error
        out.append(text)
    return out


def _row(task: Task, columns: Columns, line: str) -> dict[str, Any]:
    """A line as a row of the task's data."""
    parts = line.split("\t")
    if isinstance(columns.text_column, str):
        names = [name for name in fields(columns.text_column) if name != "options"]
        if len(names) != 1:
            raise RowError(f"its text is made of the columns {names}: give rows in a .jsonl file, with --file")
        if not isinstance(task, MultipleChoice) or columns.choices is not None:
            return {names[0]: line}
        if len(parts) < 3:
            raise RowError("write the question and two or more options with tabs between them")
        return {names[0]: parts[0], **_options(columns, parts[1:])}
    if len(parts) != len(columns.text_column):
        raise RowError(f"it has {len(columns.text_column)} texts: write them on a line with tabs between them")
    return dict(zip(columns.text_column, parts, strict=True))


def _options(columns: Columns, options: Sequence[str]) -> dict[str, Any]:
    if not isinstance(columns.options, str):
        return dict(zip(columns.options, options, strict=False))
    first, *rest = columns.options.split(".")
    found: Any = list(options)
    for part in reversed(rest):
        found = {part: found}
    return {first: found}


def shows_probability(task: Task) -> bool:
    return isinstance(task, Classification | MultipleChoice)
