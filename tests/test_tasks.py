from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny
from polyrank import LoRA, adapt
from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate, mean, predict
from polyrank.models import HeadModel, load_heads, masked_mean, save_heads
from polyrank.probe import STRENGTHS, Features, fit, probe
from polyrank.tasks import MISSING, Classification, Examples, check_names


@pytest.fixture
def ready() -> tuple[list[Classification], HeadModel]:
    tasks = tiny.tasks()
    model = tiny.model(tasks)
    adapt(model.backbone, LoRA(rank=2), tasks=[task.name for task in tasks])
    return tasks, model


def batch_of(tasks: list[Classification], model: HeadModel, size: int = 6):
    corpus = Corpus.of(tasks, {t.name: t.train for t in tasks}, model.reader)
    return corpus.collate([(i % 2, i) for i in range(size)])


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "..", "a b", "x" * 200, "-a", "con", "a\n"])
def test_bad_task_names_are_refused(name: str):
    with pytest.raises(ValueError, match="name"):
        check_names([name])


def test_names_that_differ_by_case_only_clash():
    with pytest.raises(ValueError, match="'News' and 'news' clash"):
        check_names(["News", "news"])


def test_test_labels_must_be_training_labels():
    with pytest.raises(ValueError, match="task 'pet': label 'bird' is not among"):
        Classification.from_examples("pet", Examples(["a", "b"], ["cat", "dog"]), Examples(["c"], ["bird"]))


def test_masked_mean_ignores_padding():
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(masked_mean(hidden, mask), torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]))
    assert masked_mean(hidden.bfloat16(), mask).dtype == torch.float32


def test_mixed_batch_equals_per_task_heads(ready: tuple[list[Classification], HeadModel]):
    tasks, model = ready
    batch = batch_of(tasks, model)
    answers = model(batch.inputs, batch.task_ids)
    assert answers["mood"].rows.tolist() == [0, 2, 4] and answers["pet"].rows.tolist() == [1, 3, 5]
    hidden = model.backbone(**batch.inputs, task_ids=batch.task_ids).last_hidden_state
    pooled = masked_mean(hidden, batch.inputs["attention_mask"])
    for row in range(6):
        name = tasks[row % 2].name
        torch.testing.assert_close(answers[name].logits[row // 2], model.heads[name](pooled[row]))


def test_sums_and_counts_ignore_missing_labels(ready: tuple[list[Classification], HeadModel]):
    tasks, model = ready
    batch = batch_of(tasks, model)
    labels = {name: own.clone() for name, own in batch.labels.items()}
    labels["mood"][0], labels["pet"][1] = MISSING, MISSING
    answers = model(batch.inputs, batch.task_ids)
    expected = [
        sum(F.cross_entropy(answers[t.name].logits[r], labels[t.name][r]) for r in rows)
        for t, rows in zip(tasks, ([1, 2], [0, 2]), strict=True)
    ]
    torch.testing.assert_close(model.loss_sums(answers, labels), torch.stack(expected))
    assert model.counts(labels).tolist() == [2, 2]


@pytest.mark.parametrize("missing", [["mood"], ["mood", "pet"]])
def test_a_task_without_a_label_gives_zero_and_finite_gradients(ready, missing: list[str]):
    tasks, model = ready
    batch = batch_of(tasks, model)
    labels = {k: torch.full_like(own, MISSING) if k in missing else own for k, own in batch.labels.items()}
    sums = model.loss_sums(model(batch.inputs, batch.task_ids), labels)
    assert sums[0] == 0
    sums.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    assert all(not p.grad.any() for p in model.heads["mood"].parameters())


def test_heads_stay_fp32_under_autocast(ready: tuple[list[Classification], HeadModel]):
    tasks, model = ready
    batch = batch_of(tasks, model)
    with torch.autocast("cpu", torch.bfloat16):
        answers = model(batch.inputs, batch.task_ids)
    assert all(answer.logits.dtype == torch.float32 for answer in answers.values())


def test_heads_survive_the_disk_with_their_labels(ready, tmp_path):
    tasks, model = ready
    save_heads(model, tmp_path / "heads")
    loaded, reading, weights = load_heads(tmp_path / "heads")
    assert [t.bare() for t in loaded] == [t.bare() for t in tasks]
    assert reading == {"max_length": 16, "truncation": "right", "pooling": "mean"}
    assert all(torch.equal(weights[key], value) for key, value in model.heads.state_dict().items())
    (tmp_path / "heads" / "heads.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"heads\.safetensors"):
        load_heads(tmp_path / "heads")


def test_evaluate_counts_right_answers_and_skips_missing(ready: tuple[list[Classification], HeadModel]):
    tasks, model = ready
    found = {task.name: [p.answer for p in predict(model, task.test.texts, task.name)] for task in tasks}
    scores = evaluate(model, {t.name: t.test for t in tasks}, batch_size=5, progress=False)
    for task in tasks:
        right = [a == b for a, b in zip(found[task.name], task.test.labels, strict=True)]
        assert scores[task.name] == pytest.approx(sum(right) / len(right))
    half = Examples(tasks[0].test.texts, [found["mood"][0], *[None] * 11])
    assert evaluate(model, {"mood": half}, progress=False) == {"mood": 1.0}
    assert mean({"a": 1.0, "b": 0.0}) == 0.5
    with pytest.raises(ValueError, match="no task 'x' in this model: it has mood, pet"):
        evaluate(model, {"x": half}, progress=False)


def test_predict_keeps_the_order_and_gives_probabilities(ready: tuple[list[Classification], HeadModel]):
    _, model = ready
    texts = ["cat", "the dog is very very good", "a fish", ""]
    together = predict(model, texts, "pet", batch_size=2)
    for text, answer in zip(texts, together, strict=True):
        alone = predict(model, [text], "pet")[0]
        assert answer.answer == alone.answer
        assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert predict(model, [], "pet") == []


def test_the_probe_is_converged_on_every_strength():
    torch.manual_seed(0)
    task, y = Classification(name="t", names=("a", "b", "c")), torch.arange(90) % 3
    x = torch.randn(90, 8) * torch.logspace(-2, 2, 8) + torch.eye(3, 8)[y]
    for strength, head in zip(STRENGTHS, fit(task, x, y, STRENGTHS), strict=True):
        assert head.gradient_norm < 1e-4
        mean_, std = x.double().mean(0), x.double().std(0, correction=0)
        weight = (head.weight * std).requires_grad_()  # of the standardised problem
        loss = F.cross_entropy((x.double() - mean_) / std @ weight.T + head.bias + head.weight @ mean_, y)
        (gradient,) = torch.autograd.grad(loss + strength / 2 * weight.square().sum(), weight)
        assert gradient.norm() < 1e-4


def test_the_probe_never_fits_held_out_or_test_examples():
    task = tiny.tasks()[1]
    features = Features(tiny.model([task]))
    kept, held = task.train.select(range(36)), task.train.select(range(36, 48))
    found = probe(task, kept, held, features)
    other = replace(task, test=Examples(task.test.texts, task.test.labels[::-1]))
    swapped = probe(other, kept, Examples(held.texts, held.labels[::-1]), features)
    assert torch.equal(found.head.weight, probe(other, kept, held, features).head.weight)
    first, second = (p.selection_head.weight for p in (found, swapped))
    assert found.strength != swapped.strength or torch.equal(first, second)
    assert 0 <= found.score <= 1 and found.majority == pytest.approx(4 / 12)
