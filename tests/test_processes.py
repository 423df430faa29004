"""Two processes train as one does; what befalls one of them befalls both."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import many
from many import Cell
from polyrank.checkpoint import newest

NEAR = 1e-10
FEW = [
    Cell("ase", layout="absent"),
    Cell("more", layout="apart", combine="nash_mtl", sharding="fsdp2"),
    Cell("lora", event="memory"),
    Cell("more", event="memory"),
    Cell("lora", event="nan"),
]
GRID = [
    Cell(*fields)
    for fields in itertools.product(
        ("lora", "moore-token", "more", "ase"),
        ("equal", "ragged"),
        tuple(many.LAYOUTS),
        (None, "pcgrad", "nash_mtl"),
        ("none", "fsdp2"),
    )
]
OTHERS = [Cell(name, layout="absent") for name in ("mola", "moa", "smora", "adalora")]
MUTATIONS = {
    "global counts": Cell("lora", layout="absent"),
    "global statistics": Cell("ase", layout="absent"),
    "global loads": Cell("smora", layout="absent"),
    "summed gradients": Cell("lora"),
    "shared start": Cell("lora"),
    "combine after the sum": Cell("lora", combine="nash_mtl"),
}


def check(cell: Cell, found: list[dict], want: dict) -> None:
    first, second = found
    assert many.apart(first, second) == 0, cell.name
    assert many.apart(first, want) <= NEAR, cell.name
    assert float((first["losses"] - want["losses"]).abs().max()) <= NEAR, cell.name
    assert first["chosen"] == second["chosen"] == want["chosen"], cell.name


def test_two_processes_train_as_one_and_share_their_errors(tmp_path: Path):
    steps = 6
    cells = [many.replace(cell, steps=steps) for cell in FEW]
    two = many.in_two(tmp_path, cells)
    for cell in cells[:2]:
        check(cell, two[cell], many.alone(cell))
    short, with_notes, odd = cells[2:]
    # one was short of memory: both went on in smaller parts, and the gradient is the same
    check(short, two[short], many.alone(short))
    assert many.apart(*two[with_notes]) == 0
    assert [one["skipped"] for one in two[odd]] == [1, 1] and many.apart(*two[odd]) == 0
    said = [json.loads((tmp_path / f"talk-{rank}.json").read_text()) for rank in range(2)]
    for one in said:
        assert one["texts"] == ["I am 0: é", "I am 1: é"] and one["silent"] == ["", ""]
        assert one["of_first"] == "by 0" and one["none"] == one["same"] == "fine" and one["worked"] == ["worked"]
        assert "process 1 has an answer other than" in one["different"]
    assert [one["second"] for one in said] == ["ProcessFailed: process 1: no 1", "ValueError: no 1"]
    assert [one["both"] for one in said] == ["ValueError: no 0", "ValueError: no 1"]


def test_the_plan_on_the_page_is_what_the_command_prints():
    root = Path(__file__).parent.parent
    said = subprocess.run([sys.executable, root / "examples" / "launch" / "plan.py"], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count("70B") == 4
    assert said.stdout in (root / "docs" / "many_processes.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_grid(tmp_path: Path):
    processes = many.start(tmp_path, [*GRID, *OTHERS])
    alone = {cell: many.alone(cell) for cell in [*GRID, *OTHERS] if cell.sharding == "none"}
    assert [process.wait(timeout=900) for process in processes] == [0, 0], (tmp_path / "0.log").read_text()[-3000:]
    for cell in [*GRID, *OTHERS]:
        found = [many.torch.load(tmp_path / f"{cell.name}-{rank}.pt") for rank in range(2)]
        check(cell, found, alone[many.replace(cell, sharding="none")])


@pytest.mark.slow
def test_without_any_one_mend_two_processes_train_otherwise(tmp_path: Path):
    cells = {name: many.replace(cell, mutation=name) for name, cell in MUTATIONS.items()}
    flags = Cell("lora", event="nan"), Cell("lora", event="nan", mutation="agreed flags")
    two = many.in_two(tmp_path, [*MUTATIONS.values(), *cells.values(), *flags])
    for name, cell in MUTATIONS.items():
        want = many.alone(cell)
        check(cell, two[cell], want)
        assert many.apart(two[cells[name]][0], want) > 1e-6, name
    assert many.apart(*two[flags[0]]) == 0 < 1e-6 < many.apart(*two[flags[1]])


@pytest.mark.slow
def test_a_loss_over_the_pairs_of_a_batch_is_that_of_each_process_by_itself(tmp_path: Path):
    """C-LoRAE tells a sample from the others of its micro-batch: two processes are as two micro-batches of one."""
    cell = Cell("c_lorae")
    (first, second) = many.in_two(tmp_path, [cell])[cell]
    assert many.apart(first, second) == 0
    assert many.apart(first, many.alone(cell, accumulation=2)) <= NEAR
    assert many.apart(first, many.alone(cell)) > 1e-6


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_goes_on(tmp_path: Path):
    """And from one to two."""
    cell, run = Cell("ase", layout="absent", combine="pcgrad", steps=16), tmp_path / "run"
    want = many.alone(cell)
    begun = time.monotonic()
    processes = many.start(tmp_path / "two", [many.replace(cell, event="kill")], run)
    ends = [process.wait(timeout=120) for process in processes]
    assert ends[1] == -9 and ends[0] > 0 and time.monotonic() - begun < 100
    assert "ProcessLost: another process of this run ended" in (tmp_path / "two" / "0.log").read_text()
    found, passed_over = newest(run)
    assert found is not None and found.step == 7 and not passed_over
    assert many.apart(many.result(cell, run), want) <= NEAR

    run = tmp_path / "other"
    with pytest.raises(many.Killed):
        many.result(many.replace(cell, event="stop"), run)
    assert newest(run)[0].step == 7
    for one in many.in_two(tmp_path / "again", [many.replace(cell, sharding="fsdp2")], run).popitem()[1]:
        assert many.apart(one, want) <= NEAR
