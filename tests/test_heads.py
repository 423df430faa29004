"""Tasks with heads: what each makes of its examples, its loss against a naive twin, its score, and its probe."""

import math

import pytest
import torch
import torch.nn.functional as F

import tiny
from polyrank import LoRA, adapt
from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate, predict
from polyrank.models import HeadModel, load_heads, save_heads
from polyrank.probe import STRENGTHS, Features, fit, probe
from polyrank.tasks import (
    MISSING,
    Classification,
    Examples,
    HeadTask,
    MultiLabel,
    Prediction,
    Regression,
    TokenClassification,
)
from polyrank.tasks.metrics import entities, entity_f1, of_classes, of_numbers, of_sets

PAIRS = Examples([("a cat", "the dog is good"), ("very bad", "bad"), "a fish"], ["no", "yes", "no"])
SETS = Examples(["cat dog", "fish", "a cat is very good"], [("cat", "dog"), (), ("cat",)])
NUMBERS = Examples(["bad", "good", "very good", "the fish"], [1.0, 3.0, 4.5, None])
WORDS = Examples([("the", "cat", "is"), ("a", "dog"), ("fish",)], [("O", "B-PET", "O"), ("O", "B-PET"), ("B-PET",)])
TASKS: tuple[HeadTask, ...] = (
    Classification.from_examples("same", PAIRS, PAIRS),
    MultiLabel.from_examples("pets", SETS, SETS),
    Regression.from_examples("stars", NUMBERS, NUMBERS),
    TokenClassification.from_examples("tags", WORDS, WORDS),
)


@pytest.fixture(params=["right", "left"])
def ready(request: pytest.FixtureRequest) -> HeadModel:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = request.param
    model = HeadModel(tiny.backbone(), tokenizer, TASKS, max_length=16)
    adapter = adapt(model.backbone, LoRA(rank=2), tasks=[task.name for task in TASKS])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        for p in model.heads.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return model


def whole_batch(model: HeadModel):
    corpus = Corpus.of(TASKS, {task.name: task.train for task in TASKS}, model.reader)
    picks = [(t, i) for t, rows in enumerate(corpus.rows) for i in range(len(rows))]
    return corpus.collate(picks)


def naive(model: HeadModel, task: HeadTask, text, label) -> torch.Tensor:
    """The loss of one example, from the text on, without batches."""
    ids = torch.tensor([model.index(task.name)])
    if isinstance(task, TokenClassification):
        found = model.reader.tokenizer([list(text)], is_split_into_words=True, return_tensors="pt")
        hidden = model.backbone(**found, task_ids=ids).last_hidden_state[0]
        owners = found.word_ids(0)
        logits = model.heads[task.name](torch.stack([hidden[owners.index(w)] for w in range(len(text))]))
        return F.cross_entropy(logits, torch.tensor([task.names.index(tag) for tag in label]), reduction="sum")
    parts = text if isinstance(text, tuple) else (text,)
    found = model.reader.tokenizer(*parts, return_tensors="pt")
    logits = model.heads[task.name](model.backbone(**found, task_ids=ids).last_hidden_state[0].mean(0))
    if isinstance(task, MultiLabel):
        target = torch.tensor([float(name in label) for name in task.names])
        return -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).mean()
    if isinstance(task, Regression):
        known = torch.tensor([y for y in NUMBERS.labels if y is not None])
        return ((label - known.mean()) / known.std(correction=0) - logits[0]) ** 2
    return -logits.log_softmax(0)[task.names.index(label)]


def test_losses_of_a_mixed_batch_equal_examples_one_by_one(ready: HeadModel):
    batch = whole_batch(ready)
    sums = ready.loss_sums(ready(batch.inputs, batch.task_ids), batch.labels)
    for t, task in enumerate(TASKS):
        known = task.train.labelled()
        alone = [naive(ready, task, text, label) for text, label in zip(known.texts, known.labels, strict=True)]
        torch.testing.assert_close(sums[t], torch.stack(alone).sum(), atol=1e-4, rtol=1e-4)
    assert ready.counts(batch.labels).tolist() == [3, 3, 3, 6]


def test_missing_labels_give_zero_and_finite_gradients(ready: HeadModel):
    blank = {task.name: Examples(task.train.texts, [None] * len(task.train)) for task in TASKS}
    corpus = Corpus.of(TASKS, blank, ready.reader)
    batch = corpus.collate([(t, i) for t, rows in enumerate(corpus.rows) for i in range(len(rows))])
    sums = ready.loss_sums(ready(batch.inputs, batch.task_ids), batch.labels)
    assert sums.tolist() == [0.0] * 4 and ready.counts(batch.labels).tolist() == [0] * 4
    sums.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ready.parameters())
    assert evaluate(ready, blank, progress=False) == {}


def test_answers_keep_order_and_form(ready: HeadModel):
    for task in TASKS:
        answers = predict(ready, task.test.texts, task.name, batch_size=2)
        for text, answer in zip(task.test.texts, answers, strict=True):
            alone = predict(ready, [text], task.name)[0]
            if isinstance(task, Regression):
                assert answer.answer == pytest.approx(alone.answer, abs=1e-4)
            else:
                assert answer.answer == alone.answer
            if isinstance(task, TokenClassification):
                assert len(answer.answer) == len(text)
            if isinstance(task, MultiLabel):
                assert answer.answer == tuple(name for name, p in answer.probabilities.items() if p > 0.5)


def test_tasks_survive_the_disk(ready: HeadModel, tmp_path):
    save_heads(ready, tmp_path / "heads")
    loaded, _, weights = load_heads(tmp_path / "heads")
    assert [(type(task), task.bare()) for task in loaded] == [(type(task), task.bare()) for task in TASKS]
    assert all(torch.equal(weights[key], value) for key, value in ready.heads.state_dict().items())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_the_probe_converges_on_every_loss(task: HeadTask):
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    kind = torch.arange(60) % task.outputs
    y = {
        "multi_label": F.one_hot(kind, task.outputs).float(),
        "regression": x[:, 0] + 0.1 * torch.randn(60),
    }.get(task.kind, kind)
    for strength, head in zip(STRENGTHS, fit(task, x, y, STRENGTHS), strict=True):
        assert head.gradient_norm < 1e-4
        if task.kind == "regression":  # it has a closed form
            z = ((x - x.mean(0)) / x.std(0, correction=0)).double()
            closed = torch.linalg.solve(z.T @ z / 60 + strength / 2 * torch.eye(6), z.T @ (y - y.mean()).double() / 60)
            torch.testing.assert_close(head.weight[0] * x.std(0, correction=0), closed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_features_are_what_the_head_reads(task: HeadTask, ready: HeadModel):
    plain = HeadModel(tiny.backbone(), ready.reader.tokenizer, TASKS, max_length=16)
    rows = task.rows(task.train, plain.reader)
    batch = Corpus(TASKS, [rows if one is task else [] for one in TASKS], plain.reader)
    whole = batch.collate([(TASKS.index(task), i) for i in range(len(rows))])
    expected = plain(whole.inputs, whole.task_ids)[task.name].logits
    torch.testing.assert_close(plain.heads[task.name](Features(plain)(rows)), expected, atol=1e-5, rtol=1e-4)
    found = probe(task, task.train, Examples(), Features(plain))
    assert found.gradient_norm < 1e-3 and found.majority is not None
    assert task.kind == "regression" or found.score >= found.majority


def test_a_long_list_of_words_is_cut_and_the_rest_counts_as_wrong():
    task = TASKS[3]
    model = HeadModel(tiny.backbone(), tiny.tokenizer(), TASKS, max_length=6)
    (row,) = task.rows(Examples([("cat",) * 9], [("B-PET",) * 9]), model.reader)
    assert len(row.marks) == len(row.target) == 4
    assert task.score([Prediction(("B-PET",) * 4)], [("B-PET",) * 9]) == pytest.approx(2 * 4 / 13)


def test_a_word_without_tokens_moves_no_tag():
    tokenizer = tiny.tokenizer()
    model = HeadModel(tiny.backbone(), tokenizer, TASKS, max_length=16)
    plain, odd = (
        TASKS[3].rows(Examples([words], [tags]), model.reader)[0]
        for words, tags in ((("a", "cat"), ("O", "B-PET")), (("a", "\u00a0", "cat"), ("O", "O", "B-PET")))
    )
    assert odd.ids == plain.ids and len(odd.marks) == len(odd.target) == 3
    assert (odd.marks[0], odd.marks[2]) == (plain.marks[0], plain.marks[1])
    (answer,) = predict(model, [("a", "\u00a0", "cat")], "tags")
    assert len(answer.answer) == 3
    assert predict(model, [("\u00a0",)], "tags")[0].answer != ()


def test_scores_against_their_definitions():
    pairs = [("a", "a"), ("b", "a"), ("b", "b"), ("b", "b")]
    assert of_classes("accuracy", pairs, ("a", "b")) == 0.75
    assert of_classes("macro_f1", pairs, ("a", "b")) == pytest.approx((2 / 3 + 0.8) / 2)
    assert of_classes("matthews", pairs, ("a", "b")) == pytest.approx((1 * 2 - 0 * 1) / math.sqrt(1 * 2 * 2 * 3))
    assert of_classes("matthews", [("a", "a"), ("a", "b")], ("a", "b")) == 0.0
    sets = [(("x", "y"), ("x",)), ((), ("y",)), (("x",), ("x",))]
    assert of_sets("micro_f1", sets, ("x", "y")) == pytest.approx(2 * 2 / (3 + 3))
    assert of_sets("exact_match", sets, ("x", "y")) == pytest.approx(1 / 3)
    assert of_numbers("pearson", [1, 2, 3], [2, 4, 6.5]) == pytest.approx(0.998, abs=1e-3)
    assert of_numbers("spearman", [1, 2, 3], [5, 9, 80]) == pytest.approx(1.0, abs=1e-4)
    assert of_numbers("r2", [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert of_numbers("spearman", [1, 1, 1], [5, 9, 80]) == 0.0 == of_numbers("pearson", [1], [2])


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("B-A B-A I-B", [("A", 0, 0), ("A", 1, 1), ("B", 2, 2)]),
        ("I-A I-A B-B O I-B", [("A", 0, 1), ("B", 2, 2), ("B", 4, 4)]),
        ("O O", []),
    ],
)
def test_entities_of_tags(tags: str, spans: list):
    assert list(entities(tags.split())) == spans
    assert entity_f1([(tags.split(), tags.split())]) == (1.0 if spans else 0.0)


def test_entity_f1_counts_whole_entities():
    assert entity_f1([(["O", "B-A", "I-A", "O"], ["O", "B-A", "O", "O"])]) == 0.0
    assert entity_f1([(["B-A", "O", "B-B"], ["B-A", "O", "B-A"])]) == 0.5


def test_wrong_examples_are_refused_by_task_and_reason():
    for kind, text, label, message in [
        (Classification, ("a", "b", "c"), "x", "neither a text nor a pair"),
        (MultiLabel, "a", "x", "no list of labels"),
        (TokenClassification, ("a", "b"), ("x",), "2 words"),
    ]:
        good = {Classification: PAIRS, MultiLabel: SETS, TokenClassification: WORDS}[kind]
        with pytest.raises(ValueError, match=message):
            kind.from_examples("t", good, Examples([text], [label]))
    with pytest.raises(ValueError, match="not all the same"):
        Regression.from_examples("t", Examples(["a", "b"], [1.0, 1.0]), Examples())
    with pytest.raises(ValueError, match="no metric 'bleu' for classification"):
        Classification.from_examples("t", PAIRS, PAIRS, metric="bleu")


def test_flat_labels_mark_what_is_missing():
    assert TASKS[0].labels(TASKS[0].rows(Examples(["a"], [None]), _reader())).tolist() == [MISSING]
    assert TASKS[3].labels(TASKS[3].rows(Examples([("a", "cat")], [None]), _reader())).tolist() == [MISSING] * 2


def _reader():
    return HeadModel(tiny.backbone(), tiny.tokenizer(), TASKS, max_length=16).reader
