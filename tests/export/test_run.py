"""Tasks of a finished run, exported by the command and loaded as the ecosystem loads them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner, Result

import tiny
from polyrank.cli import app
from polyrank.recipe import load_run
from test_recipe import save_examples

TEXTS = ["the cat is good", "a very bad dog", "the fish was the fish", "is was a"]
MOODS = {"good": "B-mood", "bad": "B-mood"}


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def rows(path: Path, entries: list[dict]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path.name


@pytest.fixture(scope="module", params=["more", "ase"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four kinds of tasks, whose adapter has changed something."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_model(folder / "model")
    (mood, pet) = tiny.tasks()
    for task in (mood, pet):
        save_examples(folder / f"{task.name}-train.jsonl", task.train)
        save_examples(folder / f"{task.name}-test.jsonl", task.test)
    texts = list(mood.train.texts)
    files = {
        "length": [{"text": text, "label": float(len(text))} for text in texts],
        "both": [{"text": text, "labels": [w for w in ("good", "bad", "the") if w in text.split()]} for text in texts],
        "tags": [{"words": text.split(), "tags": [MOODS.get(w, "O") for w in text.split()]} for text in texts],
    }
    kinds = {"length": "regression", "both": "multi_label", "tags": "token_classification"}
    tasks = [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("mood", "pet")]
    for name, entries in files.items():
        train, test = rows(folder / f"{name}-1.jsonl", entries[:36]), rows(folder / f"{name}-2.jsonl", entries[36:])
        tasks.append({"name": name, "type": kinds[name], "train": train, "test": test})
    recipe = {
        "model": str(folder / "model"),
        "method": {"name": request.param},
        "tasks": tasks,
        "max_length": 16,
        "training": {"steps": 2, "batch_size": 20},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = call("train", folder / "r.yaml", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    adapter = load_run(folder / "run").adapter
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    adapter.save(folder / "run" / "adapter")
    return folder


def logits(run: Path, task: str) -> torch.Tensor:
    loaded = load_run(run)
    model = loaded.model
    reader, index = model.reader, model.index(task)
    rows = [type(row)(row.ids, [], row.types) for row in model.tasks[0].rows(_unlabelled(), reader)]
    with torch.no_grad():
        hidden, pooled = model.hidden(reader.collate(rows), torch.full((len(TEXTS),), index))
        return model.heads[task](hidden if task == "tags" else pooled)


def _unlabelled():
    from polyrank.tasks import Examples

    return Examples(TEXTS, [None] * len(TEXTS))


def routed(folder: Path) -> bool:
    return folder.name.startswith("ase")


def test_plain_models_are_loaded_by_their_libraries(folder: Path, tmp_path: Path):
    more = ("--approximate", "mean-gate") if routed(folder) else ()
    result = call(
        "export", folder / "run", "--all-tasks", "--format", "dense", "--out", tmp_path / "out", *more, "--json"
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    for name in ("mood", "pet", "length", "both"):
        model = SentenceTransformer(str(tmp_path / "out" / name), device="cpu")
        found, want = torch.as_tensor(model.encode(TEXTS)), logits(folder / "run", name)
        if name == "length":
            task = load_run(folder / "run").model.tasks[2]
            want = want * task.deviation + task.mean
        if routed(folder):
            assert said[name]["approximate"] == "mean-gate" and said[name]["max_difference"] > 1e-5
        else:
            assert float((found - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "tags").eval()
    assert set(tagger.config.id2label.values()) == {"B-mood", "O"}
    given = AutoTokenizer.from_pretrained(tmp_path / "out" / "tags")(TEXTS, padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    with torch.no_grad():
        found = tagger(**given).logits
    if not routed(folder):
        here = given["attention_mask"].bool()
        assert float((found - logits(folder / "run", "tags"))[here].abs().max()) <= 1e-5


def test_a_lora_and_its_head(folder: Path, tmp_path: Path):
    result = call("export", folder / "run", "--task", "mood", "--out", tmp_path / "out")
    if routed(folder):
        assert result.exit_code == 2 and "--approximate mean-gate" in result.output
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
        more = ("--approximate", "mean-gate", "--max-rank", "2")
        result = call("export", folder / "run", "--task", "mood", "--out", tmp_path / "out", *more)
        assert "KL(mixture || export)" in result.output and "as a mixture" in result.output
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "out" / "mood").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "labels.json"} <= files
    assert json.loads((tmp_path / "out" / "mood" / "labels.json").read_text()) == ["bad", "good"]
    assert "PeftModel.from_pretrained" in result.output
    again = call("export", folder / "run", "--task", "mood", "--out", tmp_path / "out")
    assert again.exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--all-tasks"),
        (("--task", "moode"), "mood"),
        (("--task", "mood", "--format", "gguf"), "lora, dense"),
        (("--task", "mood", "--dtype", "int8"), "float32"),
        (("--task", "mood", "--format", "dense", "--max-rank", "4"), "--format lora"),
        (("--task", "mood", "--approximate", "yes"), "mean-gate"),
    ],
)
def test_wrong_wishes(folder: Path, words, said):
    result = call("export", folder / "run", *words)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
