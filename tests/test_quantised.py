"""4- and 8-bit bases: trained through their own forward, saved and loaded; refused where a method needs the weight."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from typer.testing import CliRunner, Result

from polyrank.cli import app
from test_language import END, tokenizer

ROWS = [{"prompt": f"is a cat {i} good?", "completion": ["yes", "no"][i % 2]} for i in range(20)]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=320, **sizes, **END)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    recipe = {
        "model": str(tmp_path / "model"),
        "method": {"name": "more", "rank": 4},
        "tasks": [{"name": "a", "type": "generation", "train": "a.jsonl"}],
        "max_length": 32,
        "training": {"steps": 3, "batch_size": 4},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # bitsandbytes says that it casts
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_and_comes_back(folder: Path, bits: str):
    run = folder / "run"
    result = call("train", folder / "r.yaml", "--set", f"quantise={bits}", "--out", run)
    assert result.exit_code == 0, result.output
    written = json.loads((run / "results.json").read_text())
    scores = json.loads(call("eval", run, "--json").stdout)
    assert scores["tasks"]["a"] == written["tasks"]["a"]["adapted"]
    answer = json.loads(call("predict", run, "--json", "is it good?").stdout)
    assert isinstance(answer["answer"], str)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["moore", "moore_topk"])
def test_a_method_that_needs_the_weight_refuses_a_quantised_base(folder: Path, method: str):
    result = call(
        "train", folder / "r.yaml", "--set", f"method.name={method}", "--set", "quantise=8bit", "--out", folder / "run"
    )
    assert result.exit_code == 2 and "load the base unquantised" in result.output
    assert not (folder / "run").exists()


def test_without_bitsandbytes_the_cure_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    there = importlib.util.find_spec
    gone = "bitsandbytes"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == gone else there(name, *a))
    result = call("train", folder / "r.yaml", "--set", "quantise=4bit", "--out", folder / "run")
    assert result.exit_code == 2 and "pip install bitsandbytes" in result.output
    assert not (folder / "run").exists()
