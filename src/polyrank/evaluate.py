"""Scores and answers of a multi-task model: batches mix the tasks and are grouped by length."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import track

from polyrank.corpus import Corpus
from polyrank.models import LanguageModel, MultiTaskModel
from polyrank.tasks import Examples, Generation, Prediction, Task, Text

BATCH = 64  # rows of a batch, unless told


@torch.no_grad()
def read(
    model: MultiTaskModel, examples: Mapping[str, Examples], *, batch_size: int = BATCH, progress: bool = False
) -> dict[str, list[Any]]:
    """The answers of each task to its examples, in their order; the model's training mode is put back after."""
    corpus = Corpus.to_score(model.tasks, examples, model.reader)
    found: list[list[Any]] = [[None] * len(rows) for rows in corpus.rows]
    training = model.training
    model.eval()
    for picks in track(corpus.by_length(batch_size), "evaluating", transient=True, disable=not progress):
        batch = corpus.collate(picks).to(model.device)
        rows = corpus.of_tasks(picks)
        for name, answer in model(batch.inputs, batch.task_ids).items():
            t = model.index(name)
            places = [i for task, i in picks if task == t]
            for i, one in zip(places, model.tasks[t].read(answer.logits.float(), rows[name]), strict=True):
                found[t][i] = one
    model.train(training)
    return {
        task.name: task.answers(found[t], examples[task.name])
        for t, task in enumerate(model.tasks)
        if task.name in examples
    }


def evaluate(
    model: MultiTaskModel, examples: Mapping[str, Examples], *, batch_size: int = BATCH, progress: bool = True
) -> dict[str, float]:
    """The score of each task that has a labelled example among those given: {task: its metric}.

    Raises:
        ValueError: a task that the model does not have, or a label that the task does not have.
    """
    for name, given in examples.items():
        task = model.tasks[model.index(name)]
        for text, label in zip(given.texts, given.labels, strict=True):
            task.check(text, label)
    labelled = {name: given.labelled() for name, given in examples.items()}
    labelled = {name: given for name, given in labelled.items() if len(given)}
    answers = read(model, labelled, batch_size=batch_size, progress=progress)
    tasks: dict[str, Task] = {task.name: task for task in model.tasks}
    return {name: round(tasks[name].score(answers[name], given.labels), 6) for name, given in labelled.items()}


def mean(scores: Mapping[str, float]) -> float:
    """The mean over the tasks, each task counted once."""
    return sum(scores.values()) / len(scores) if scores else 0.0


def predict(
    model: MultiTaskModel, texts: Sequence[Text], task: str, *, batch_size: int = BATCH, max_new_tokens: int = 64
) -> list[Prediction]:
    """Answers in the order of the texts; a task of free text is answered by generating.

    Raises:
        ValueError: a task that the model does not have, or texts that are not of its kind.
    """
    index = model.index(task)
    for text in texts:
        model.tasks[index].check(text, None)
    if isinstance(model.tasks[index], Generation) and isinstance(model, LanguageModel):
        out: list[Prediction] = []
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            ids = torch.full((len(part),), index)
            out += [Prediction(text) for text in model.generate(part, ids, max_new_tokens=max_new_tokens)]
        return out
    return read(model, {task: Examples(texts, [None] * len(texts))}, batch_size=batch_size)[task]
