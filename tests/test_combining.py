"""Combiners in the training loop: the gradients that they weigh, and that nothing about a step changes them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import tiny
from polyrank import Adapter, adapt
from polyrank.combine import COMBINERS, FAMO, Step
from polyrank.combining import Combination
from polyrank.corpus import Corpus
from polyrank.methods import MoA, MTLLoRA, Poly
from polyrank.mixing import Proportional
from polyrank.models import HeadModel
from polyrank.step import backward, micro_batches, sum_gradients
from polyrank.tasks import Examples
from polyrank.train import train
from polyrank.training import Training
from resumable import equal, weights
from test_resume import Cut, cut_after

METHOD = MTLLoRA(num_experts=2, rank=2)
GRADIENTS = sorted(name for name, kind in COMBINERS.items() if kind.needs == "gradients")
every = pytest.mark.parametrize("name", sorted(COMBINERS))


def tasks():
    """Three tasks, some labels missing."""
    both = tiny.tasks(40)
    third = replace(both[0], name="mirror", train=Examples(both[0].train.texts, both[0].train.labels[::-1]))
    return [
        replace(t, train=Examples(t.train.texts, [y if i % 3 else None for i, y in enumerate(t.train.labels)]))
        for t in [*both, third]
    ]


def ready(method=METHOD):
    of = tasks()
    model = tiny.model(of).double()
    adapter = adapt(model.backbone, method, tasks=[t.name for t in of], targets=["query", "value", "dense"])
    generator = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model, adapter, of


def settings(name: str, *tasks: str) -> dict:
    """What a recipe would say; achievement weights need what each task reaches alone."""
    return {"name": name, **({"potential": dict.fromkeys(tasks, 0.9)} if name == "achievement" else {})}


def step_of(name: str, accumulation: int = 1, checkpointing: bool = False):
    """One step of a combiner: model, adapter, combination; the gradients stand in the parameters."""
    model, adapter, of = ready()
    if checkpointing:
        model.train()
        adapter.enable_checkpointing()
    combine = settings(name, *(t.name for t in of))
    training = Training(batch_size=30, accumulation=accumulation, combine=combine)
    corpus = Corpus.of(of, {t.name: t.train for t in of}, model.reader)
    accelerator = Accelerator(cpu=True)
    batches = micro_batches(Proportional(corpus.lengths, 30, 0), corpus, 3, accumulation, accelerator)
    combiner = training.combiner()
    assert combiner is not None
    combination = Combination(combiner, [t.name for t in of], 0)
    loss, losses = backward(model, adapter, batches, training, accelerator, combination, 3)
    sum_gradients([*adapter.parameters(), *model.heads.parameters()], accelerator)
    return model, adapter, batches, combination, loss, losses


def apart(model, adapter, batches) -> tuple[list[Tensor], list[Tensor]]:
    """Naively, one backward pass for each task over all batches: L_t, and its gradient over all parameters."""
    parameters = [*adapter.parameters(), *model.heads.parameters()]
    losses, found = [], []
    for task in range(len(model.tasks)):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            total = total + model.loss_sums(model(batch.inputs, batch.task_ids), batch.labels)[task]
            count += int(model.counts(batch.labels)[task])
        grads = torch.autograd.grad(total / count, parameters, allow_unused=True)
        losses.append((total / count).detach())
        found.append(
            torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, grads)])  # noqa: B905
        )
    return losses, found


def flat(parameters) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


@every
def test_the_update_is_the_weighted_sum_of_the_tasks_gradients(name):
    """On the shared weights. Where a combiner weighs gradients, a task's own weights get the mean loss's gradient."""
    model, adapter, batches, combination, loss, losses = step_of(name)
    got = flat([*adapter.parameters(), *model.heads.parameters()])
    means, gradients = apart(model, adapter, batches)
    shared = set(adapter.shared_parameters())
    is_shared = torch.cat(
        [torch.full((p.numel(),), p in shared) for p in [*adapter.parameters(), *model.heads.parameters()]]
    )
    gram = torch.stack([torch.stack([a[is_shared] @ b[is_shared] for a in gradients]) for b in gradients])
    step = Step(("mood", "pet", "mirror"), torch.ones(3, dtype=torch.bool), 3, 0, torch.stack(means), gram)
    w = combination.combiner.weights(step, {})
    want = sum(w[t] * gradients[t] for t in range(3))
    own = want if name not in GRADIENTS else sum(gradients) / 3
    torch.testing.assert_close(got[is_shared], want[is_shared], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(got[~is_shared], own[~is_shared], rtol=1e-8, atol=1e-11)
    assert got[is_shared].norm() > 1e-4 and got[~is_shared].norm() > 1e-4
    assert loss == pytest.approx(float(sum(w[t] * means[t] for t in range(3))), rel=1e-9)
    assert losses == pytest.approx({"mood": float(means[0]), "pet": float(means[1]), "mirror": float(means[2])})
    said = combination.numbers()
    assert list(said["weights"].values()) == pytest.approx(w.tolist())
    if name in GRADIENTS:
        cosine = gram[0, 2] / (gram[0, 0] * gram[2, 2]).sqrt()
        assert said["cosines"]["mood"]["mirror"] == pytest.approx(float(cosine))
        assert {a: set(b) for a, b in said["cosines"].items()} == {"mood": {"pet", "mirror"}, "pet": {"mirror"}}


@every
@pytest.mark.parametrize("accumulation", [4])
def test_splitting_a_step_changes_no_gradient(name, accumulation):
    found = []
    for parts in (1, accumulation):
        model, adapter, *_, loss, _ = step_of(name, parts)
        found.append((flat([*adapter.parameters(), *model.heads.parameters()]), loss))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-7, atol=1e-10)
    assert found[1][1] == pytest.approx(found[0][1])


@pytest.mark.parametrize("name", ["nash_mtl", "gls"])
def test_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        model, adapter, *_ = step_of(name, 2, checkpointing)
        found.append(flat([*adapter.parameters(), *model.heads.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def go(folder: Path, combine, resume=True, **more) -> tuple[Adapter, list[dict]]:
    of = tiny.tasks()
    model = tiny.model(of)
    adapter = adapt(model.backbone, METHOD, tasks=[t.name for t in of], targets=["query", "value", "dense"])
    settings = {"steps": 8, "batch_size": 8, "accumulation": 2, "lr": 1e-2, "eval_every": 3, "checkpoint_every": 1}
    training = Training.model_validate({**settings, "combine": combine, **more})
    train(model, adapter, of, training, folder, progress=False, resume=resume)
    adapter.heads = model.heads  # type: ignore[attr-defined]
    return adapter, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MEMORY = [
    {"name": "nash_mtl", "update_every": 3},
    {"name": "dwa", "window": 2},
    "famo",
    "gradnorm",
    "uncertainty",
    "rlw",
    "pcgrad",
    settings("achievement", "mood", "pet"),
]


@pytest.mark.parametrize("combine", MEMORY, ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(combine, tmp_path: Path, monkeypatch):
    whole, lines = go(tmp_path / "whole", combine)
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(4))
        with pytest.raises(Cut):
            go(tmp_path / "cut", combine)
    again, resumed = go(tmp_path / "cut", combine)
    assert equal(weights(again), weights(whole))
    for entry in (*lines, *resumed):
        del entry["seconds"]
    assert lines == resumed
    steps = [line for line in lines if "loss" in line]
    assert all(set(step["weights"]) == {"mood", "pet"} for step in steps)


@pytest.mark.parametrize("name", ["nash_mtl", "cagrad", "famo"])
def test_trains_in_bf16_with_checkpointing_and_learns(name, tmp_path: Path):
    combine = settings(name, "mood", "pet")
    _, lines = go(
        tmp_path,
        combine,
        precision="bf16",
        checkpointing=True,
        steps=40,
        batch_size=16,
        eval_every=50,
        checkpoint_every=0,
    )
    steps = [line for line in lines if "loss" in line]
    assert all(math.isfinite(step["loss"]) and not step["skipped"] for step in steps)
    late, early = (sum(sum(step["losses"].values()) for step in part) for part in (steps[-5:], steps[:5]))
    assert late < early


def test_what_does_not_fit_is_refused():
    for given, message in [
        ("nash", "unknown combiner 'nash'"),
        ({"name": "nash_mtl", "update_evry": 2}, "update_evry"),
        ({"update_every": 2}, "unknown combiner None"),
        (3, "unknown combiner None"),
    ]:
        with pytest.raises(ValueError, match=message):
            Training.model_validate({"combine": given})
    with pytest.raises(ValueError, match="task_weights and combine"):
        Training(combine="mgda", task_weights={"mood": 1.0, "pet": 1.0})  # type: ignore[arg-type]
    assert Training.model_validate({"combine": "nash_mtl"}).combine == {
        "name": "nash_mtl",
        "update_every": 1,
        "tolerance": 1e-6,
    }
    of = tiny.tasks()
    model = tiny.model(of)
    adapter = adapt(model.backbone, MoA(rank=2), tasks=[t.name for t in of])
    with pytest.raises(ValueError, match="belongs to one task"):
        train(model, adapter, of, Training.model_validate({"steps": 1, "combine": "mgda"}), progress=False)


@pytest.mark.parametrize("name", [*GRADIENTS, "famo", "gls", "dwa"])
def test_a_step_that_is_not_finite_is_refused_and_logged(name, tmp_path: Path, monkeypatch):
    seen = []
    honest = HeadModel.loss_sums

    def poisoned(self, answers, labels):
        seen.append(1)
        return honest(self, answers, labels) * (torch.inf if len(seen) == 3 else 1)

    monkeypatch.setattr(HeadModel, "loss_sums", poisoned)
    _, lines = go(tmp_path, settings(name, "mood", "pet"), steps=5, accumulation=1, checkpoint_every=0)
    skipped = [line["skipped"] for line in lines if "loss" in line]
    assert sum(skipped) == 1
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line and not line["skipped"])


def test_the_second_look_has_the_noise_of_the_first(tmp_path: Path, monkeypatch):
    """Poly draws noise in training: without an update, FAMO must see no change of the losses."""
    found = []
    monkeypatch.setattr(FAMO, "after", lambda self, step, losses, state: found.append((step.losses, losses)))
    of = tiny.tasks()
    model = tiny.model(of)
    adapter = adapt(model.backbone, Poly(num_experts=2, rank=2), tasks=[t.name for t in of], targets=["query"])
    for p in adapter.parameters():
        p.data += 0.3 * torch.randn_like(p)
    training = Training.model_validate({"steps": 3, "batch_size": 8, "lr": 1e-30, "head_lr": 1e-30, "combine": "famo"})
    train(model, adapter, of, training, progress=False)
    assert len(found) == 3
    for before, after in found:
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
