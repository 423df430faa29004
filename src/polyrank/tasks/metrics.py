"""Scores of answers: from torchmetrics, but for the spans of tagged words. All are better the higher they are."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics.functional import (
    matthews_corrcoef,
    pearson_corrcoef,
    r2_score,
    spearman_corrcoef,
)
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score


def of_classes(metric: str, pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> float:
    """(answer, label) pairs -> accuracy, macro_f1 (over the classes that occur), or matthews."""
    if not pairs:
        return 0.0
    if metric == "accuracy":
        return sum(answer == label for answer, label in pairs) / len(pairs)
    index = {name: i for i, name in enumerate(names)}
    found, labels = (torch.tensor([index[pair[side]] for pair in pairs]) for side in (0, 1))
    if metric == "macro_f1":
        return float(multiclass_f1_score(found, labels, len(names), average="macro"))
    return _number(matthews_corrcoef(found, labels, task="multiclass", num_classes=len(names)))


def of_sets(metric: str, pairs: Sequence[tuple[Sequence[str], Sequence[str]]], names: Sequence[str]) -> float:
    """(labels given, labels) pairs -> micro_f1, macro_f1, or exact_match."""
    if not pairs:
        return 0.0
    if metric == "exact_match":
        return sum(set(answer) == set(labels) for answer, labels in pairs) / len(pairs)
    if metric == "micro_f1" or len(names) == 1:
        both = sum(len(set(answer) & set(labels)) for answer, labels in pairs)
        return 2 * both / max(1, sum(len(set(answer)) + len(set(labels)) for answer, labels in pairs))
    found, labels = (torch.tensor([[int(name in pair[side]) for name in names] for pair in pairs]) for side in (0, 1))
    return float(multilabel_f1_score(found, labels, len(names), average="macro"))


def of_numbers(metric: str, answers: Sequence[float], labels: Sequence[float]) -> float:
    """spearman, pearson or r2; 0 where the answers or the labels are all the same, and with fewer than two."""
    if len(labels) < 2 or len(set(labels)) == 1 or (metric != "r2" and len(set(answers)) == 1):
        return 0.0
    found, true = torch.tensor(answers, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # near-constant answers give a warning and a value that _number mends
        return _number(
            {"spearman": spearman_corrcoef, "pearson": pearson_corrcoef, "r2": r2_score}[metric](found, true)
        )


def entity_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """(tags given, tags) pairs -> micro F1 of whole entities in BIO tags, as CoNLL-2003 counts them.

    An entity is its type, its first and its last word; a B- tag, or an I- tag of another type, begins one.
    Source: Tjong Kim Sang and De Meulder, CoNLL 2003, https://aclanthology.org/W03-0419.
    """
    found = {(i, *span) for i, (answer, _) in enumerate(pairs) for span in entities(answer)}
    true = {(i, *span) for i, (_, labels) in enumerate(pairs) for span in entities(labels)}
    return 2 * len(found & true) / (len(found) + len(true)) if found or true else 0.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, last word) of every entity."""
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, here = tag.partition("-")
        goes_on = prefix == "I" and here == kind and kind != ""
        if kind and not goes_on:
            yield kind, first, i - 1
            kind = ""
        if not goes_on and prefix in ("B", "I"):
            kind, first = here, i


def _number(value: Tensor) -> float:
    """0 for a correlation that is not defined."""
    return float(value.nan_to_num(0.0))
