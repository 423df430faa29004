"""Some fifty bad inputs: one message that says where and what to do, exit code 2, and nothing is changed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from polyrank.cli import app
from polyrank.files import sealed
from test_recipe import save_examples

TRAIN, EVAL, PREDICT = "train", "eval", "predict"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its data, and a finished run."""
    folder = tmp_path_factory.mktemp("original")
    tiny.save_model(folder / "model")
    for task in tiny.tasks():
        save_examples(folder / f"{task.name}-train.jsonl", task.train)
        save_examples(folder / f"{task.name}-test.jsonl", task.test)
    recipe = {
        "model": "model",
        "method": {"name": "lora", "rank": 2},
        "tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("mood", "pet")],
        "max_length": 16,
        "training": {"steps": 3, "batch_size": 8},
        "out": "new",
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    home = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, ["train", "r.yaml", "--out", "run"])
    finally:
        os.chdir(home)
    assert result.exit_code == 0, result.output
    return folder


def text(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_text(change((folder / file).read_text()))

    return apply


def data(content: bytes, file: str = "mood-train.jsonl") -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def recipe(**change: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = yaml.safe_load((folder / "r.yaml").read_text())
        (folder / "r.yaml").write_text(yaml.safe_dump(content | change))

    return apply


def line(row: object) -> bytes:
    return (json.dumps({"text": "a cat", "label": "good"}) + "\n" + json.dumps(row) + "\n").encode()


def manifest(part: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "run" / part / "manifest.json"
        content = json.loads(path.read_text())
        content.pop("sha256")
        change(content)
        path.write_bytes(sealed(json.dumps(content, indent=1)))

    return apply


def tensors(part: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the weights and their checksum, as a careless program would."""

    def apply(folder: Path) -> None:
        path = folder / "run" / part / f"{part}.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest(part, lambda m: m["files"].update({path.name: digest}))(folder)

    return apply


def flip(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / path).write_bytes(content)

    return apply


def first(content: dict) -> str:
    return next(iter(content))


def another_base(folder: Path) -> None:
    tiny.backbone(seed=5).save_pretrained(folder / "model")
    content = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump(content | {"model": str(folder / "model")}))


def no_permission(folder: Path) -> None:
    """A file where the folder of the runs should be: root writes through permissions, not through this."""
    (folder / "new").write_text("mine")


NAN = lambda t: t[first(t)].fill_(float("nan"))  # noqa: E731
TASK = {"name": "mood", "train": "mood-train.jsonl", "test": "mood-test.jsonl"}
BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # recipes
    "misspelt key": (TRAIN, recipe(traning={}), "r.yaml: traning: unknown name; did you mean 'training'"),
    "misspelt value": (TRAIN, recipe(method={"name": "lroa"}), "did you mean 'lora'"),
    "wrong type": (TRAIN, recipe(max_length="long"), "max_length: "),
    "out of range": (TRAIN, recipe(training={"lr": -1.0}), "training.lr: "),
    "yaml tag": (TRAIN, data(b"model: !!python/object/apply:os.system ['true']", "r.yaml"), "r.yaml:1: "),
    "alias bomb": (TRAIN, data(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "r.yaml"), "r.yaml:2: "),
    "key twice": (TRAIN, text("r.yaml", lambda t: t + "\nmodel: other\n"), "stands twice"),
    "recipe not UTF-8": (TRAIN, data(b"model: \xff", "r.yaml"), "save it as UTF-8"),
    "recipe empty": (TRAIN, data(b"", "r.yaml"), "a recipe is a mapping"),
    "recipe is huge": (TRAIN, data(b"#" * 200_000, "r.yaml"), "at most"),
    "recipe not there": (TRAIN, lambda f: (f / "r.yaml").unlink(), "no recipe r.yaml"),
    "no tasks": (TRAIN, recipe(tasks=[]), "tasks: "),
    "path in a task name": (TRAIN, recipe(tasks=[TASK | {"name": "../../up"}]), "task name '../../up'"),
    "two tasks of one name": (TRAIN, recipe(tasks=[TASK, TASK | {"name": "Mood"}]), "rename one"),
    "unknown data set": (TRAIN, recipe(tasks=["r88"]), "did you mean 'r8'"),
    "weights of unknown tasks": (TRAIN, recipe(training={"task_weights": {"mod": 1.0}}), "name each once"),
    "targets that are not there": (TRAIN, recipe(targets=["q_proj"]), "q_proj"),
    "a pattern that is none": (TRAIN, recipe(targets="query("), "query("),
    # data
    "broken JSON": (TRAIN, data(line(1) + b'{"text": "a'), "mood-train.jsonl:2: "),
    "no object": (TRAIN, data(line([1])), "mood-train.jsonl:2: expected an object, found list"),
    "column missing": (TRAIN, data(line({"txt": "a", "label": "good"})), "mood-train.jsonl:2: no column 'text'"),
    "text is no text": (TRAIN, data(line({"text": 3, "label": "good"})), "mood-train.jsonl:2: 'text' is 3"),
    "text is empty": (TRAIN, data(line({"text": " ", "label": "good"})), "mood-train.jsonl:2: 'text' is empty"),
    "label is a list": (TRAIN, data(line({"text": "a", "label": ["x"]})), "mood-train.jsonl:2: "),
    "one label only": (TRAIN, data(line({"text": "a dog", "label": "good"})), "at least 2"),
    "empty file": (TRAIN, data(b""), "mood-train.jsonl:1: no rows"),
    "bad UTF-8": (TRAIN, data(b'{"text": "caf\xe9", "label": "good"}\n'), "not UTF-8"),
    "UTF-16": (TRAIN, data(line(1).decode().encode("utf-16")), "not UTF-8"),
    "100 MB line": (TRAIN, data(b'{"text": "' + b"a " * 50_000_000), "mood-train.jsonl:1: "),
    "label only in test": (TRAIN, data(line({"text": "a", "label": "ugly"}), "mood-test.jsonl"), "'ugly'"),
    "unknown kind of file": (TRAIN, recipe(tasks=[TASK | {"train": "r.yaml"}]), "Convert it"),
    "data not there": (TRAIN, lambda f: (f / "mood-train.jsonl").unlink(), "no such file"),
    # models, and no network
    "no such model": (TRAIN, recipe(model="nobody/nothing"), "cannot be loaded"),
    "model without weights": (TRAIN, lambda f: (f / "model" / "model.safetensors").unlink(), "cannot be loaded"),
    "model of another kind": (TRAIN, data(b'{"model_type": "toaster"}', "model/config.json"), "cannot be loaded"),
    "model settings damaged": (TRAIN, data(b"{", "model/config.json"), "cannot be loaded"),
    "model damaged": (TRAIN, data(b"x" * 999, "model/model.safetensors"), "cannot be loaded"),
    # folders
    "file in the way": (TRAIN, no_permission, "new exists and is no run folder"),
    "thesis in the way": (TRAIN, lambda f: shutil.copytree(f / "model", f / "new") and None, "is no run folder"),
    # adapters
    "wrong base model": (EVAL, another_base, "another base model"),
    "flipped bit": (EVAL, flip("run/adapter/adapter.safetensors"), "SHA-256 differs"),
    "flipped bit of the manifest": (EVAL, flip("run/adapter/manifest.json"), "manifest.json"),
    "flipped bit of a head": (PREDICT, flip("run/heads/heads.safetensors"), "SHA-256 differs"),
    "missing tensor": (EVAL, tensors("adapter", lambda t: t.pop(first(t))), "lack"),
    "extra tensor": (EVAL, tensors("adapter", lambda t: t.update(x=torch.ones(1))), "have x"),
    "misshapen tensor": (EVAL, tensors("heads", lambda t: t.update({first(t): torch.ones(1, 1)})), "shape"),
    "NaN weights": (EVAL, tensors("adapter", NAN), "NaN"),
    "path in the adapter": (EVAL, manifest("adapter", lambda m: m.update(tasks=["../up", "pet"])), "'../up'"),
    "newer adapter": (EVAL, manifest("adapter", lambda m: m.update(schema=99)), "upgrade polyrank"),
    "adapter missing": (PREDICT, lambda f: shutil.rmtree(f / "run" / "adapter"), "manifest.json"),
    "half a run": (PREDICT, lambda f: (f / "run" / "results.json").unlink(), "no finished run"),
    "results damaged": (PREDICT, data(b"{", "run/results.json"), "run cannot be loaded"),
}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command, spoil, expected = BAD[name]
    folder = tmp_path / "work"
    shutil.copytree(original, folder)
    spoil(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = contents(folder)
    words = {TRAIN: ["train", "r.yaml"], EVAL: ["eval", "run"], PREDICT: ["predict", "run", "a good cat"]}[command]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.output.startswith(("error: ", "note: ")) and "Traceback" not in result.output
    assert expected in result.output
    assert contents(folder) == before
