"""Bytes are exact, ratios are those of the same round, and `polyrank bench` measures any method."""

import json

import pytest
import torch
from torch import nn

from polyrank.bench import bench
from polyrank.measure import PeakBytes, SavedBytes, Timing, compare
from polyrank.methods import LoRA, MixLoRA, MoORE, XLoRA
from test_cli import call


def test_a_ratio_is_that_of_the_same_round():
    """The machine became four times slower in the middle: medians of seconds would lie, ratios do not."""
    mine, other = Timing((1.0, 2.0, 4.0, 8.0, 8.4)), Timing((2.0, 4.0, 8.0, 16.0, 4.2))
    ratio = mine.over(other)
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 0.5, 0.5)
    assert str(ratio) == "0.50 (0.50 to 0.50)"


def test_every_candidate_runs_in_every_round():
    calls = []
    found = compare({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=7, least=0.0)
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 7, "b": 7, "c": 7}
    counted = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(counted) == 7 and all(sorted(one) == ["a", "b", "c"] for one in counted)
    assert len({tuple(one) for one in counted}) > 1, "the order changes"


def test_more_work_takes_longer():
    x = torch.randn(256, 256)
    found = compare({"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, rounds=7)
    assert 2 < found["four"].over(found["one"]).median < 8


def test_bytes_kept_and_alive():
    x, layer = torch.randn(10, 20, requires_grad=True), nn.Linear(20, 30, bias=False)
    with SavedBytes() as saved:
        y = layer(x).exp()
    assert saved.total == 4 * (10 * 20 + 20 * 30 + 10 * 30)
    with SavedBytes([x, layer.weight]) as saved:
        y = layer(x).exp()
    assert saved.total == 4 * 10 * 30
    del y
    with PeakBytes() as peak:
        y = torch.zeros(100) + 1  # two at once
        y = y[:50] * 2  # the first is gone; a view is no memory
    assert peak.total == 4 * 200
    assert y.shape == (50,)


def test_bench_measures_blocks_banks_and_the_rest():
    methods = {"lora": LoRA(rank=2), "moore": MoORE(router_dim=2, task_dim=2), "mixlora": MixLoRA(rank=2)}
    found = bench(methods | {"xlora": XLoRA(rank=2)}, width=16, tokens=32, samples=4, tasks=2, seconds=0.05)
    assert list(found) == [*methods, "xlora"]
    assert found["lora"].weights == 2 * 2 * (16 + 64)
    assert found["lora"].kept < found["mixlora"].kept
    assert all(cost.training.median > 1 and cost.alive > 1 for cost in found.values())
    with pytest.raises(ValueError, match="multiple"):
        bench(methods, tokens=33, samples=4)


def test_the_command(tmp_path):
    small = ["--width", "16", "--tokens", "32", "--seconds", "0.1"]
    done = call("bench", "lora", "more", *small, "--out", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    assert "training step" in done.output and "more" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["width"] == 16 and found["costs"]["lora"]["weights"] == 2 * 8 * (16 + 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nolora"], "unknown method"),
        (["lora", "--dtype", "int8"], "one of"),
        (["lora", "--tokens", "9"], "multiple"),
        (["lora", "--out", "nowhere/found.json"], "no folder"),
        (["lora", "--out", "."], "is a folder"),
        (["lora", "--device", "gpu"], "cpu or cuda"),
        (["lora", "--threads", "4096"], "cores"),
    ],
)
def test_the_command_refuses(words, said):
    failed = call("bench", *words)
    assert failed.exit_code == 2 and said in failed.output
