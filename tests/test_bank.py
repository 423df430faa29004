"""Every method from one recipe; a method that mixes trained LoRAs trains them first, and loses none of them."""

import shutil
from pathlib import Path

import pytest
import torch

import polyrank.train as training
import tiny
from polyrank import METHODS, Adapter
from polyrank.evaluate import predict
from polyrank.recipe import RecipeError, load_run, read_recipe, run, write_recipe
from polyrank.recipe.plan import lines, plan
from test_recipe import save_examples, write
from test_resume import Cut, cut_after


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe over a tiny model and two tasks in files."""
    tiny.save_model(tmp_path / "model")
    sources = []
    for task in tiny.tasks(24):
        save_examples(tmp_path / f"{task.name}-train.jsonl", task.train)
        save_examples(tmp_path / f"{task.name}-test.jsonl", task.test)
        names = {part: f"{task.name}-{part}.jsonl" for part in ("train", "test")}
        sources.append({"name": task.name, **names})
    content = {
        "model": str(tmp_path / "model"),
        "method": {"name": "lora"},
        "tasks": sources,
        "max_length": 16,
        "training": {"steps": 3, "batch_size": 8, "eval_every": 3, "checkpoint_every": 1},
        "out": str(tmp_path / "run"),
    }
    return write(tmp_path, content)


SMALLER = {"vb_lora": ["method.vector_length=16"]}  # what the tiny model's sizes ask for


@pytest.mark.parametrize("name", METHODS)
def test_one_recipe_serves_every_method(name: str, recipe_file: Path, tmp_path: Path):
    """Only the name is changed: it trains, comes back from its folder, and answers the same."""
    recipe = read_recipe(recipe_file, [f"method.name={name}", "training.holdout=0", *SMALLER.get(name, [])])
    write_recipe(recipe, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == recipe
    finished = run(recipe, progress=False)
    assert finished.results["skipped_steps"] == 0
    loaded = load_run(finished.folder)
    assert loaded.adapter.method == recipe.build_method()
    assert name in SMALLER or loaded.adapter.method == METHODS[name]()
    texts = ["a good day", "the bad fish"]
    here, there = (predict(one.model.eval(), texts, "mood") for one in (finished, loaded))
    assert [p.probabilities for p in here] == [p.probabilities for p in there]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_run(folder)
    return {**loaded.adapter.state_dict(), **loaded.model.heads.state_dict()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_moa_trains_its_bank_first(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = read_recipe(recipe_file, ["method={name: moa, rank: 2}"])
    seen = []
    honest = training.build_optimizer

    def spied(model, adapter, settings):
        seen.append((adapter.tasks, {key: p.clone() for key, p in adapter.state_dict().items()}))
        return honest(model, adapter, settings)

    monkeypatch.setattr(training, "build_optimizer", spied)
    run(recipe, progress=False)
    assert [tasks for tasks, _ in seen] == [("mood",), ("pet",), ("mood", "pet")]
    start = seen[-1][1]
    for i, task in enumerate(("mood", "pet")):
        alone = load_run(tmp_path / "run" / "bank" / task).adapter
        for layer in alone.layers:
            for part in ("lora_A", "lora_B"):
                joined = start[f"{layer}.experts.{part}.rows.{i}"]
                assert torch.equal(joined, alone.state_dict()[f"{layer}.experts.{part}"])
                assert part == "lora_A" or joined.abs().max() > 0


@pytest.mark.parametrize("steps", [1, 4, 7], ids=["first bank", "second bank", "the mixture"])
def test_a_cut_costs_no_finished_part(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int):
    recipe = read_recipe(recipe_file, ["method={name: moa, rank: 2}"])
    run(recipe, progress=False)
    whole = tensors(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(steps))
        with pytest.raises(Cut):
            run(recipe, progress=False)
    with pytest.raises(RecipeError, match="unfinished run"):
        run(recipe, progress=False)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "bank").glob("*/results.json")}
    assert len(finished) == (steps - 1) // 3
    run(recipe, resume=True, progress=False)
    assert same(tensors(tmp_path / "run"), whole)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    run(recipe, overwrite=True, progress=False)
    assert same(tensors(tmp_path / "run"), whole)


def test_a_plan_counts_the_bank(recipe_file: Path):
    said = "\n".join(lines(plan(read_recipe(recipe_file, ["method.name=moa"]))))
    assert "2 runs of as many steps, one for each task alone" in said
    assert "before that" not in "\n".join(lines(plan(read_recipe(recipe_file))))


def test_what_cannot_be_combined_is_refused_before_the_bank(recipe_file: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="belongs to one task"):
        run(read_recipe(recipe_file, ["method.name=moa", "training.combine=mgda"]), progress=False)
    assert not (tmp_path / "run").exists()
