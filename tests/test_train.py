import itertools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import tiny
from polyrank import LoRA, MoORE, adapt
from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate
from polyrank.mixing import Proportional
from polyrank.step import backward, micro_batches, sum_gradients
from polyrank.tasks import Classification, Examples
from polyrank.train import Diverged, combine as build_combination, split, train
from polyrank.training import Training

COMBINED = ("nash_mtl", "gls", "pcgrad")  # gradients, losses, and noise


def ready(tasks: list[Classification], method=LoRA(rank=2)):  # noqa: B008
    model = tiny.model(tasks)
    adapter = adapt(model.backbone, method, tasks=[task.name for task in tasks])
    return model, adapter


def gradients(
    accumulation: int,
    accelerator: Accelerator,
    weights: dict[str, float] | None = None,
    combine: str | None = None,
) -> tuple[float, Tensor]:
    """Loss and fp64 gradient of step 3, split as told; some labels are missing."""
    tasks = [
        replace(t, train=Examples(t.train.texts, [y if i % 3 else None for i, y in enumerate(t.train.labels)]))
        for t in tiny.tasks()
    ]
    model, adapter = ready(tasks)
    model.double()
    torch.manual_seed(1)
    for p in adapter.parameters():
        p.data.normal_(std=0.3)
    settings = {"batch_size": 32, "accumulation": accumulation, "task_weights": weights, "combine": combine}
    training = Training.model_validate(settings)
    corpus = Corpus.of(tasks, {t.name: t.train for t in tasks}, model.reader)
    batches = micro_batches(Proportional(corpus.lengths, 32, 0), corpus, 3, accumulation, accelerator)
    loss, _ = backward(model, adapter, batches, training, accelerator, build_combination(training, model, adapter), 3)
    parameters = [*adapter.parameters(), *model.heads.parameters()]
    sum_gradients(parameters, accelerator)
    return loss, torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])


@pytest.mark.parametrize("weights", [None, {"mood": 0.3, "pet": 2.0}])
@pytest.mark.parametrize("accumulation", [4, 5, 32, 40])
def test_splitting_a_step_changes_no_gradient(accumulation: int, weights):
    loss, whole = gradients(1, Accelerator(cpu=True), weights)
    split_loss, parts = gradients(accumulation, Accelerator(cpu=True), weights)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-13)
    assert whole.norm() > 1e-3


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    loss, gradient = gradients(2, accelerator)
    combined = {name: gradients(2, accelerator, combine=name)[1] for name in COMBINED}
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    history = train(model, adapter, tasks, Training(steps=3, batch_size=8, eval_every=2), progress=False)
    trained = torch.cat([p.detach().reshape(-1) for p in [*adapter.parameters(), *model.heads.parameters()]])
    torch.save(
        {
            "loss": loss,
            "gradient": gradient,
            "combined": combined,
            "trained": trained,
            "losses": [s["loss"] for s in history.steps],
        },
        Path(folder) / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    loss, gradient = gradients(1, Accelerator(cpu=True))
    assert first["loss"] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(first["gradient"], gradient, rtol=1e-10, atol=1e-13)
    for name in COMBINED:
        whole = gradients(1, Accelerator(cpu=True), combine=name)[1]
        torch.testing.assert_close(first["combined"][name], whole, rtol=1e-9, atol=1e-12)
    assert torch.equal(first["trained"], second["trained"])
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    history = train(model, adapter, tasks, Training(steps=3, batch_size=8, eval_every=2), progress=False)
    assert first["losses"] == pytest.approx([s["loss"] for s in history.steps], rel=1e-4)


@pytest.mark.parametrize("method", [LoRA(rank=4), MoORE(num_reflections=2, task_dim=4, router_dim=4)])
def test_training_learns_and_keeps_the_best_step(method, tmp_path: Path):
    tasks = tiny.tasks(96)
    model, adapter = ready(tasks, method)
    before = [p.clone() for n, p in model.backbone.named_parameters() if not p.requires_grad]
    training = Training(steps=100, batch_size=16, lr=1e-2, head_lr=3e-2, eval_every=20)
    history = train(model, adapter, tasks, training, tmp_path, progress=False)
    after = [p for n, p in model.backbone.named_parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    best = max(entry["held_out_mean"] for entry in history.evaluations)
    assert history.best_score == best > 0.8
    held = split(tasks, training)[1]
    scores = evaluate(model, held, progress=False)
    assert sum(scores.values()) / 2 == pytest.approx(best)  # the state that was put back
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 101))
    assert [line["step"] for line in lines if "held_out" in line] == [0, 20, 40, 60, 80, 100]
    assert {"losses", "lr", "gradient_norm", "seconds", "skipped"} <= lines[1].keys()


def test_training_is_repeatable():
    states = []
    for _ in range(2):
        tasks = tiny.tasks()
        model, adapter = ready(tasks)
        train(model, adapter, tasks, Training(steps=5, batch_size=8), progress=False)
        states.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        torch.rand(3)  # the loop does not depend on, and does not change, the state of the caller's generator
    assert torch.equal(*states)


def test_bf16_and_checkpointing_train():
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    history = train(
        model, adapter, tasks, Training(steps=3, batch_size=8, precision="bf16", checkpointing=True), progress=False
    )
    assert all(math.isfinite(entry["loss"]) for entry in history.steps)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_step_that_is_not_finite_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch):
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    seen: list[Tensor] = []
    honest = model.loss_sums

    def poisoned(answers, labels):
        seen.append(torch.cat([p.detach().reshape(-1) for p in adapter.parameters()]))
        sums = honest(answers, labels)
        return sums * torch.nan if len(seen) == 2 else sums

    monkeypatch.setattr(model, "loss_sums", poisoned)
    history = train(model, adapter, tasks, Training(steps=4, batch_size=8), progress=False)
    assert history.skipped == 1
    assert [entry["skipped"] for entry in history.steps] == [False, True, False, False]
    assert history.steps[1]["loss"] is None
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])


def test_ten_refused_steps_in_a_row_end_the_training(monkeypatch: pytest.MonkeyPatch):
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    start = [p.detach().clone() for p in adapter.parameters()]
    honest = model.loss_sums
    monkeypatch.setattr(model, "loss_sums", lambda answers, labels: honest(answers, labels) * torch.inf)
    with pytest.raises(Diverged, match="lower lr"):
        train(model, adapter, tasks, Training(steps=50, batch_size=8), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(start, adapter.parameters(), strict=True))


def test_held_out_examples_are_of_train_and_never_trained_on():
    tasks = tiny.tasks()
    kept, held = split(tasks, Training(holdout=0.25, max_holdout=10))
    for task in tasks:
        assert len(held[task.name]) == 10 and len(kept[task.name]) == 38
        assert sorted([*kept[task.name].texts, *held[task.name].texts]) == sorted(task.train.texts)


def test_schedules():
    linear, cosine = (Training(steps=100, warmup=0.1, schedule=schedule) for schedule in ("linear", "cosine"))
    for training in (linear, cosine):
        rates = [training.rate(step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
        assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.02
    assert linear.rate(55) == pytest.approx(0.5) and cosine.rate(55) == pytest.approx(0.5)


def test_trackers_get_every_number_of_the_metrics(tmp_path: Path):
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    training = Training(steps=3, batch_size=8, eval_every=3, trackers=["tensorboard"])
    train(model, adapter, tasks, training, tmp_path, progress=False)
    found = EventAccumulator(str(tmp_path / "trackers" / "polyrank")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "losses/mood", "losses/pet", "held_out/mood", "held_out_mean", "lr"} <= set(found.Tags()["scalars"])
    written = [(event.step, event.value) for event in found.Scalars("loss")]
    assert written == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    with pytest.raises(ValueError, match=r"Unsupported logging capability|not installed"):
        Training(trackers=["abacus"]).check_trackers()


def test_other_tasks_than_the_models_are_refused():
    tasks = tiny.tasks()
    model, adapter = ready(tasks)
    with pytest.raises(ValueError, match="not the model's"):
        train(model, adapter, tasks[:1], Training(steps=1), progress=False)


if __name__ == "__main__":
    _process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
