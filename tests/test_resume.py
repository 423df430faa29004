"""A power cut costs at most the steps since the last checkpoint, and no bit of the result."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

import polyrank.checkpoint as checkpoint
import polyrank.step as step
import tiny
from polyrank import Adapter
from polyrank.cli import app
from polyrank.files import read_folder, write_folder
from polyrank.recipe import RecipeError
from polyrank.recipe.folder import check_folder, claimed
from resumable import KINDS, STEPS, equal, go, weights, worker
from test_recipe import save_examples


class Cut(BaseException):
    """The plug is pulled."""


def cut_after(steps: int) -> Callable[[Adapter], None]:
    """An `after_step` that is cut off in the step after so many."""
    left, honest = [steps], Adapter.after_step

    def pull(self: Adapter) -> None:
        if not left[0]:
            raise Cut
        left[0] -= 1
        honest(self)

    return pull


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [1, 11])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = go(tmp_path / "whole", kind)
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(after))
        with pytest.raises(Cut):
            go(tmp_path / "cut", kind)
    assert equal(weights(go(tmp_path / "cut", kind)), weights(whole))
    texts = [(tmp_path / x / "metrics.jsonl").read_text() for x in ("whole", "cut")]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for entries in lines:
        for entry in entries:
            del entry["seconds"]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_twenty_random_moments(kind: str, tmp_path: Path):
    """Every process dies by SIGKILL at a random moment, of training or of saving; the next one goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable"])
    torch.set_num_threads(1)
    start = time.monotonic()
    worker(tmp_path / "whole", kind)
    longest = time.monotonic() - start
    expected, _ = read_folder(tmp_path / "whole" / "final")
    rng, kills, runs = random.Random(kind), 0, 0
    while kills < 20:
        runs += 1
        folder = tmp_path / f"run-{runs}"
        while not (folder / "final").exists():
            before = checkpoint.newest(folder)[0]
            process = context.Process(target=worker, args=(folder, kind))
            process.start()
            limit = time.monotonic() + rng.uniform(0, longest)
            while process.is_alive() and time.monotonic() < limit:
                time.sleep(0.01)
            if kills < 20 and process.is_alive():
                process.kill()
                kills += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            after, passed = checkpoint.newest(folder)
            assert not passed, "a checkpoint that looks complete is damaged"
            if before is not None:
                assert after is not None and after.step >= before.step, "a checkpoint was lost"
        assert equal(read_folder(folder / "final")[0]["weights"], expected["weights"])


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(tmp_path: Path):
    whole = go(tmp_path / "whole", "lora")
    (tmp_path / "cut").mkdir()
    for _, folder in checkpoint.checkpoints(tmp_path / "whole"):
        folder.parent.rename(tmp_path / "cut" / "checkpoints")
        break
    (_, last) = checkpoint.checkpoints(tmp_path / "cut")[-1]
    data = bytearray((last / "optimizer.safetensors").read_bytes())
    data[-3] ^= 1
    (last / "optimizer.safetensors").write_bytes(data)
    state, passed = checkpoint.newest(tmp_path / "cut")
    assert state is not None and state.step == 11 and "optimizer.safetensors" in passed[0]
    assert equal(weights(go(tmp_path / "cut", "lora")), weights(whole))


def test_a_damaged_checkpoint_never_crowds_out_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go(tmp_path, "lora")
    for _, folder in checkpoint.checkpoints(tmp_path):  # steps 11 and 12
        (folder / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "after_step", cut_after(3))
        with pytest.raises(Cut):
            go(tmp_path, "lora")
    state, passed = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 3 and not passed
    go(tmp_path, "lora")
    assert checkpoint.checkpoints(tmp_path)[-1][0] == 12


def test_a_signal_after_the_last_look_is_not_lost(request: pytest.FixtureRequest):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), checkpoint.Signals(True):
        signal.raise_signal(signal.SIGINT)
    with checkpoint.Signals(False), pytest.raises(KeyboardInterrupt):  # nothing to save: as always
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-2}, {"seed": 5}, {"batch_size": 4}, {"holdout": 0.2}],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, change: dict):
    go(tmp_path, "lora")
    with pytest.raises(checkpoint.CheckpointError, match="not those it began with"):
        go(tmp_path, "lora", STEPS.model_copy(update=change))


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        if checkpoint.checkpoints(tmp_path)[-1:] and checkpoint.checkpoints(tmp_path)[-1][0] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_folder(*_)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_folder", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"No space left.*--resume"):
        go(tmp_path, "lora")
    state, passed = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 5 and not passed


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    go(tmp_path, "lora")
    with pytest.raises(checkpoint.CheckpointError, match="resume=True"):
        go(tmp_path, "lora", resume=False)
    with pytest.raises(checkpoint.CheckpointError, match="another run"):
        go(tmp_path, "more")


def test_out_of_memory_halves_the_micro_batch_at_an_equal_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = STEPS.model_copy(update={"accumulation": 4, "lr": 1e-3})
    expected = weights(go(tmp_path / "small", "lora", small))
    seen: list[int] = []
    inner = step.backward

    def tight(model, adapter, batches, *rest):  # type: ignore[no-untyped-def]
        seen.append(max(len(batch.task_ids) for batch in batches))
        if seen[-1] > 2:
            batches[0].inputs["input_ids"] = batches[0].inputs["input_ids"].clone()
            inner(model, adapter, batches[:1], *rest)  # a part of the gradient was there before memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(model, adapter, batches, *rest)

    monkeypatch.setattr(step, "backward", tight)
    found = weights(go(tmp_path / "large", "lora", small.model_copy(update={"accumulation": 1})))
    assert seen[0] > 4 >= seen[1] > 2 and set(seen[3:]) <= {1, 2}
    assert equal(found, expected)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_model(folder / "model")
    for task in tiny.tasks():
        save_examples(folder / f"{task.name}-train.jsonl", task.train)
        save_examples(folder / f"{task.name}-test.jsonl", task.test)
    content = {
        "model": str(folder / "model"),
        "method": {"name": "lora", "rank": 2},
        "tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("mood", "pet")],
        "max_length": 16,
        "training": {"steps": 40, "batch_size": 8, "eval_every": 40, "checkpoint_every": 10},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return folder


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-c", "from polyrank.cli import main; main()", "train", str(recipe / "r.yaml"), *words]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_resume_finishes(recipe: Path, signum: signal.Signals):
    out, whole = recipe / f"out-{signum}", recipe / "whole"
    long = ("--set", "training.steps=400", "--set", "training.checkpoint_every=0")
    process = subprocess.Popen(command(recipe, "--out", str(out), *long), stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size > 2000):
        time.sleep(0.02)
    with pytest.raises(RecipeError, match="another run is writing there"), claimed(out):
        pass
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert signum.name in errors and "--resume" in errors and "Traceback" not in errors
    state, _ = checkpoint.newest(out)
    assert state is not None and 0 < state.step < 400

    from typer.testing import CliRunner

    runner = CliRunner()
    both = runner.invoke(app, command(recipe, "--out", str(out), *long, "--resume", "--overwrite")[3:])
    assert both.exit_code == 2 and "contradict" in both.output
    (out / "recipe.yaml").rename(out / ".aside")
    lost = runner.invoke(app, command(recipe, "--out", str(out), *long, "--resume")[3:])
    assert lost.exit_code == 2 and "no recipe.yaml" in lost.output and checkpoint.newest(out)[0] is not None
    (out / ".aside").rename(out / "recipe.yaml")
    plain = runner.invoke(app, command(recipe, "--out", str(out), *long)[3:])
    assert plain.exit_code == 2 and "unfinished run" in plain.output and checkpoint.newest(out)[0] is not None
    other = runner.invoke(app, command(recipe, "--out", str(out), "--resume")[3:])
    assert other.exit_code == 2 and "another training" in other.output
    for folder in (out, whole):
        words = command(recipe, "--out", str(folder), *long, "--resume")[3:]
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
        assert runner.invoke(app, words).exit_code == 0  # nothing left to do
    for part in ("adapter", "heads"):
        one, other = (read_folder(folder / part)[0] for folder in (out, whole))
        assert all(equal(one[file], other[file]) for file in one)


def test_a_folder_in_use_or_not_writable_is_refused_and_an_empty_one_leaves_no_trace(tmp_path: Path):
    with pytest.raises(RuntimeError, match="inside"), claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        raise RuntimeError("inside")
    assert not (tmp_path / "a").exists()
    (tmp_path / "busy").mkdir()
    with (
        FileLock(tmp_path / "busy" / ".lock"),
        pytest.raises(RecipeError, match="another run"),
        claimed(tmp_path / "busy"),
    ):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="no run folder"):
        check_folder(tmp_path / "file", overwrite=True, resume=False)
    assert (tmp_path / "file").read_text() == "mine"
