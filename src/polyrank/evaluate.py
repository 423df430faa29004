"""Scores and answers of a multi-task model: batches mix the tasks and are grouped by length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torchmetrics.classification import MulticlassAccuracy

from polyrank.mixing import Corpus
from polyrank.tasks import MISSING, Examples, MultiTaskModel


@torch.no_grad()
def score(model: MultiTaskModel, corpus: Corpus, *, batch_size: int = 64, progress: bool = False) -> dict[str, float]:
    """The accuracy of each task that has a valid label in the corpus; the model's training mode is put back after."""
    device, training = model.device, model.training
    metrics = {
        task.name: MulticlassAccuracy(
            len(task.labels), average="micro", ignore_index=MISSING, sync_on_compute=False
        ).to(device)
        for task, labels in zip(model.tasks, corpus.labels, strict=True)
        if any(label != MISSING for label in labels)
    }
    model.eval()
    batches = corpus.by_length(batch_size)
    for picks in track(batches, "evaluating", transient=True, disable=not progress):
        batch = corpus.collate(picks).to(device)
        for name, answer in model(batch.inputs, batch.task_ids).items():
            if name in metrics:
                metrics[name].update(answer.logits.argmax(-1), batch.labels[answer.rows])
    model.train(training)
    return {name: round(float(metric.compute()), 6) for name, metric in metrics.items()}


def evaluate(
    model: MultiTaskModel, examples: Mapping[str, Examples], *, batch_size: int = 64, progress: bool = True
) -> dict[str, float]:
    """The accuracy on the examples of each task: {task: share of right answers, 0 to 1}.

    Raises:
        ValueError: a task that the model does not have, or a label that the task does not have.
    """
    for name in examples:
        model.index(name)
    corpus = Corpus.of(model.tasks, examples, model.tokenizer, model.max_length)
    return score(model, corpus, batch_size=batch_size, progress=progress)


def mean(scores: Mapping[str, float]) -> float:
    """The mean over the tasks, each task counted once."""
    return sum(scores.values()) / len(scores) if scores else 0.0


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text, and the probability of each label of the task."""

    label: str
    probabilities: dict[str, float]


@torch.no_grad()
def predict(model: MultiTaskModel, texts: Sequence[str], task: str, *, batch_size: int = 64) -> list[Prediction]:
    """Answers in the order of the texts.

    Raises:
        ValueError: a task that the model does not have.
    """
    index = model.index(task)
    labels = model.tasks[index].labels
    corpus = Corpus.of(model.tasks, {task: Examples(texts, [None] * len(texts))}, model.tokenizer, model.max_length)
    training = model.training
    model.eval()
    answers: dict[int, Prediction] = {}
    for picks in corpus.by_length(batch_size):
        batch = corpus.collate(picks).to(model.device)
        logits = model(batch.inputs, batch.task_ids)[task].logits  # (B, C): every row is of this task, in order
        for (_, row), probabilities in zip(picks, logits.float().softmax(-1).tolist(), strict=True):
            best = max(range(len(labels)), key=probabilities.__getitem__)
            answers[row] = Prediction(labels[best], dict(zip(labels, probabilities, strict=True)))
    model.train(training)
    return [answers[row] for row in range(len(texts))]
