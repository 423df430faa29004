"""Tasks one after the other: the steps of each, what happens between them, and the numbers of what was forgotten."""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from rich.console import Console

import tiny
from polyrank import Adapter, LoRA, adapt
from polyrank.mixing import Mixing
from polyrank.recipe import load_run, read_recipe, run
from polyrank.recipe.card import show
from polyrank.recipe.plan import plan
from polyrank.sequence import Forgetting
from polyrank.train import train
from polyrank.training import Training
from resumable import equal, go, weights
from test_recipe import save_examples
from test_resume import Cut, cut_after

SEQUENCE = Mixing(order="sequence")
STEPS = Training(steps=11, batch_size=8, lr=1e-2, eval_every=3, checkpoint_every=1, mixing=SEQUENCE)  # stages 5 and 6
LENGTHS = st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=20), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.integers(4, 40), st.integers(1, 3))
def test_each_stage_draws_its_own_task_once_per_epoch(lengths, batch_size, seed, steps, window):
    mixing = Mixing(order="sequence", length_window=window)
    sampler = mixing.sampler(lengths, batch_size, seed, steps)
    stages = mixing.stages(steps, len(lengths))
    assert [step for stage in stages for step in stage] == list(range(steps))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    for task, stage in enumerate(stages):
        drawn = [sampler.batch(step) for step in stage]
        epoch = -(-len(lengths[task]) // batch_size)
        assert all(t == task for batch in drawn for t, _ in batch)
        for first in range(0, len(stage) - epoch + 1, epoch):
            seen = sorted(i for batch in drawn[first : first + epoch] for _, i in batch)
            assert seen == list(range(len(lengths[task])))
    again = mixing.sampler(lengths, batch_size, seed, steps)
    assert [again.batch(step) for step in reversed(range(steps))] == [
        sampler.batch(step) for step in reversed(range(steps))
    ]
    pieces = [sampler.batch(steps - 1, part, 2) for part in range(2)]
    assert pieces[0] + pieces[1] == sampler.batch(steps - 1)
    assert sampler.smallest == min(len(sampler.batch(step)) for step in range(steps)) or steps < 40


def test_the_rate_rises_and_falls_in_each_stage():
    training = Training(steps=100, warmup=0.1, mixing=SEQUENCE)
    alone = Training(steps=50, warmup=0.1)
    first, second = training.mixing.stages(100, 2)
    rates = [training.rate(step, first if step < 50 else second) for step in range(100)]
    assert rates[:50] == rates[50:] == [alone.rate(step) for step in range(50)]
    assert rates[4] == rates[54] == 1 > rates[49]


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"mixing": {"order": "sequence", "batches": "one_task"}}, "leave out"),
        ({"mixing": {"order": "sequence", "sampling": "uniform"}}, "leave out"),
        ({"mixing": {"order": "sequence"}, "combine": "nash_mtl"}, "nothing to weigh: leave out combine"),
        ({"mixing": {"order": "sequence"}, "combine": "uniform"}, "nothing to weigh: leave out combine"),
        ({"mixing": {"order": "sequence"}, "task_weights": {"a": 1.0}}, "task_weights"),
        ({"mixing": {"order": "backwards"}}, "together"),
    ],
    ids=str,
)
def test_what_makes_no_sense_in_sequence_is_refused(wrong, cure):
    with pytest.raises(ValueError, match=cure):
        Training.model_validate(wrong)


def test_too_few_steps_and_a_task_without_examples_are_refused():
    with pytest.raises(ValueError, match=r"2 steps for 3 tasks .* raise steps"):
        SEQUENCE.sampler([[1], [1], [1]], 4, 0, 2)
    with pytest.raises(ValueError, match=r"tasks number \[1\] have no example"):
        SEQUENCE.sampler([[1], []], 4, 0, 10)


def test_between_two_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The method is told, the moments are gone, all tasks are looked at, and the last weights stay."""
    tasks = tiny.tasks()
    model = tiny.model(tasks)
    adapter = adapt(model.backbone, LoRA(rank=2), tasks=[task.name for task in tasks])
    optimizers, told, moments = [], [], []
    honest = torch.optim.AdamW.step

    def step(self, closure=None):
        optimizers.append(self)
        moments.append({int(state["step"]) for state in self.state.values()})
        return honest(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(Adapter, "after_task", lambda self: told.append(len(optimizers)))
    scores = iter([0.875, 0.75, 0.625, 0.5, 0.375, 0.25])
    monkeypatch.setattr(
        "polyrank.train.evaluate", lambda *_, **__: dict.fromkeys(["mood", "pet"], next(scores))
    )  # worse each time
    history = train(model, adapter, tasks, STEPS, tmp_path, progress=False)
    assert told == [5, 11]
    assert moments == [set(), {1}, {2}, {3}, {4}, set(), {1}, {2}, {3}, {4}, {5}]
    assert not optimizers[0].state
    assert [entry["step"] for entry in history.evaluations] == [0, 3, 5, 6, 9, 11]
    assert history.best_step == 11 and history.best_score == 0.25
    losses = [set(entry["losses"]) for entry in history.steps]
    assert losses == [{"mood"}] * 5 + [{"pet"}] * 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lrs = [line["lr"] for line in lines if "lr" in line]
    assert lrs[0] == lrs[5] == 1e-2 > lrs[4]


@pytest.mark.parametrize("kind", ["lora", "same"])
@pytest.mark.parametrize("after", [3, 5, 8])  # in the middle of a stage, right at its end, in the next
def test_resuming_in_sequence_is_exact(kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = go(tmp_path / "whole", kind, STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(after))
        with pytest.raises(Cut):
            go(tmp_path / "cut", kind, STEPS)
    assert equal(weights(go(tmp_path / "cut", kind, STEPS)), weights(whole))
    texts = [(tmp_path / x / "metrics.jsonl").read_text() for x in ("whole", "cut")]
    lines = [[json.loads(line) | {"seconds": 0} for line in text.splitlines()] for text in texts]
    assert lines[0] == lines[1]
    if kind == "same":
        usage = {name: p for name, p in whole.state_dict().items() if name.endswith("usage")}
        assert usage and all(p.any() for p in usage.values())


R = ((0.5, 0.1, 0.2), (0.7, 0.6, 0.2), (0.4, 0.5, 0.9))


def test_the_numbers_of_the_matrix():
    found = Forgetting(("a", "b", "c"), R)
    assert found.average == pytest.approx((0.4 + 0.5 + 0.9) / 3)
    assert found.forgetting == pytest.approx((0.7 - 0.4, 0.6 - 0.5))
    assert found.mean_forgetting == pytest.approx(0.2)
    assert found.backward_transfer == pytest.approx(((0.4 - 0.5) + (0.5 - 0.6)) / 2)
    assert Forgetting.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert str(found).splitlines()[-1] == "| forgotten | 30.0 | 10.0 |  |"
    one = Forgetting(("a",), ((0.5,),))
    assert (one.average, one.forgetting, one.mean_forgetting, one.backward_transfer) == (0.5, (), 0.0, 0.0)
    with pytest.raises(ValueError, match="one row after each task"):
        Forgetting(("a", "b"), R)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    tiny.save_model(folder / "model")
    for task in tiny.tasks():
        save_examples(folder / f"{task.name}-train.jsonl", task.train)
        save_examples(folder / f"{task.name}-test.jsonl", task.test)
    content = {
        "model": str(folder / "model"),
        "method": {"name": "same", "num_experts": 2, "rank": 2},
        "tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("pet", "mood")],
        "max_length": 16,
        "training": {"steps": 8, "batch_size": 8, "eval_every": 3, "holdout": 0.25, "mixing": {"order": "sequence"}},
        "out": str(folder / "out"),
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return folder / "r.yaml"


def test_a_recipe_in_sequence_writes_and_shows_what_was_forgotten(recipe: Path):
    described = read_recipe(recipe)
    assert plan(described).steps == 8
    finished = run(described, progress=False)
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    held = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    found = json.loads((finished.folder / "forgetting.json").read_text())
    assert found["tasks"] == ["pet", "mood"]
    assert found["scores"] == [[held[step]["pet"], held[step]["mood"]] for step in (4, 8)]
    assert finished.results["best_step"] == 8
    for one in (finished, load_run(finished.folder)):
        console = Console(record=True, width=100, file=io.StringIO())
        show(one, console)
        text = console.export_text()
        assert "forgetting" in text and "forgotten" in text
    run(described, overwrite=True, progress=False)
    short = described.model_copy(update={"training": described.training.model_copy(update={"holdout": 0.0})})
    run(short, overwrite=True, progress=False)
    assert not (finished.folder / "forgetting.json").exists(), "nothing was held out: there is no such number"


def test_a_recipe_with_fewer_steps_than_tasks_is_refused_before_it_starts(recipe: Path):
    with pytest.raises(ValueError, match="1 steps for 2 tasks"):
        read_recipe(recipe, ["training.steps=1"])
