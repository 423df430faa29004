"""A rehearsal: what a model cannot do with the tasks comes to light before anything is written."""

from collections.abc import Sequence

import torch

from polyrank.corpus import Batch, Corpus
from polyrank.mixing import Pick
from polyrank.models import LanguageModel, MultiTaskModel
from polyrank.step import out_of_memory
from polyrank.tasks import Row


@torch.no_grad()
def rehearsal(model: MultiTaskModel) -> Batch:
    """A batch to try a model with: of each task the text of most tokens, and max_length tokens of nothing.

    All rows are made once, so that what cannot be read is known before anything is written.

    Raises:
        ValueError: what the model or its tokenizer cannot do, and the cure.
    """
    reader, vocabulary = model.reader, len(model.backbone.get_input_embeddings().get_parameter("weight"))
    special = set(reader.tokenizer.all_special_ids)
    longest: list[list[Row]] = []
    for task in model.tasks:
        rows = [*task.rows(task.train, reader), *task.candidates(task.test, reader)]
        largest = max((max(row.ids, default=0) for row in rows), default=0)
        if largest >= vocabulary:
            raise ValueError(f"its tokenizer has the token {largest}, its embedding {vocabulary} rows: give it its own")
        if rows and all(set(row.ids) <= special for row in rows):
            raise ValueError("its tokenizer knows no word of the texts: the folder lacks tokenizer.json or vocab.txt")
        longest.append(sorted(rows, key=lambda row: -len(row.ids))[:1])
    ids = reader.tokenizer("a")["input_ids"] * reader.max_length
    longest[0].append(Row(ids[: reader.max_length]))
    corpus = Corpus(model.tasks, longest, reader)
    picks = [(t, i) for t, rows in enumerate(longest) for i in range(len(rows))]
    batch = corpus.collate(picks).to(model.device)
    forward(model, batch)
    if isinstance(model, LanguageModel):
        _check_padding(model, corpus, picks)
    return batch


@torch.no_grad()
def forward(model: MultiTaskModel, batch: Batch) -> None:
    """
    Raises:
        ValueError: the model has no place for so many tokens.
    """
    try:
        model(batch.inputs, batch.task_ids)
    except (IndexError, RuntimeError) as error:
        if "out of" not in str(error) or out_of_memory(error):
            raise
        raise ValueError(f"it cannot read {model.reader.max_length} tokens ({error}): lower max_length") from error


def _check_padding(model: LanguageModel, corpus: Corpus, picks: Sequence[Pick]) -> None:
    """A row among longer ones must say what it says alone; not so with positions that begin elsewhere."""
    pick = min(
        (pick for pick in picks if corpus.rows[pick[0]][pick[1]].target), key=lambda p: corpus.lengths[p[0]][p[1]]
    )
    task = model.tasks[pick[0]]
    row = corpus.rows[pick[0]][pick[1]]
    said = []
    for batch in (corpus.collate([pick]), corpus.collate([(0, len(corpus.rows[0]) - 1), pick])):
        batch = batch.to(model.device)
        logits = model(batch.inputs, batch.task_ids)[task.name].logits.float().log_softmax(-1)
        said.append(logits[-len(row.target) :])
    if not torch.allclose(said[0], said[1], atol=0.1):
        raise ValueError(
            f"{type(model.backbone).__name__} says something else of a text when a longer one stands beside it (its "
            "positions do not follow the attention mask): take another model"
        )
