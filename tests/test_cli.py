import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

import tiny
from polyrank.cli import app
from polyrank.methods import METHODS
from polyrank.recipe.reading import parse_yaml
from test_recipe import save_examples


def call(*words: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its data and model, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_model(folder / "model")
    for task in tiny.tasks():
        save_examples(folder / f"{task.name}-train.jsonl", task.train)
        save_examples(folder / f"{task.name}-test.jsonl", task.test)
    recipe = {
        "model": str(folder / "model"),
        "method": {"name": "lora"},
        "tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("mood", "pet")],
        "max_length": 16,
        "training": {"steps": 3, "batch_size": 8},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = call("train", folder / "r.yaml", "--set", "method.rank=2", "--out", folder / "run")
    assert result.exit_code == 0, result.output
    assert "frozen model" in result.output and "difference" in result.output
    return folder


def test_a_dry_run_says_what_would_happen_and_writes_nothing(folder: Path):
    before = sorted(folder.rglob("*"))
    more = ("--set", "method.rank=3", "--set", "training.steps=300", "--out", folder / "dry")
    result = call("train", folder / "r.yaml", "--dry-run", *more)
    assert result.exit_code == 0, result.output
    for expected in (
        "task mood: ",
        "2 labels (bad 24, good 24)",
        "trainable parameters",
        "300, about",
        "s a step here",
    ):
        assert expected in result.output
    assert "test texts also stand in its training data" in result.output  # true of these tiny sentences
    assert sorted(folder.rglob("*")) == before


def test_the_schema_of_recipes_accepts_what_we_ship_and_refuses_what_we_refuse(folder: Path):
    schema = json.loads(call("schema").output)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"):
        validator.validate(parse_yaml(path.read_text(), path.name))
    good = yaml.safe_load((folder / "r.yaml").read_text())
    validator.validate(good)
    for bad in (
        {"modle": "x"},
        {"method": {"name": "lora", "num_reflections": 2}},
        {"method": {"name": "mooer"}},
        {"training": {"steps": 0}},
        {"training": {"mixing": {"sampling": "unfair"}}},
    ):
        assert not validator.is_valid(good | bad), bad


def test_help_teaches_with_examples():
    assert "polyrank quickstart" in call("--help").output
    for command in ("quickstart", "train", "eval", "predict", "methods", "schema"):
        result = call(command, "--help")
        assert result.exit_code == 0 and f"polyrank {command}" in result.output
    assert call("--version").output.startswith("polyrank ")


def test_methods_lists_all_and_one():
    everything = call("methods").output
    assert all(name in everything for name in METHODS)
    one = call("methods", "moore").output
    assert "SVD" in one and "num_reflections" in one
    wrong = call("methods", "mooer")
    assert wrong.exit_code == 2 and "did you mean 'moore'" in wrong.output


def test_eval_gives_the_numbers_of_the_run(folder: Path):
    result = call("eval", folder / "run", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "run" / "results.json").read_text())
    scores = json.loads(result.output)
    assert scores["tasks"] == {name: row["adapted"] for name, row in written["tasks"].items()}
    assert "mean" in call("eval", folder / "run").output


def test_predict_from_arguments_file_and_standard_input(folder: Path):
    texts = ["the cat is good", "a dog"]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n\n")
    ways = [
        call("predict", folder / "run", *texts, "--task", "pet", "--json"),
        call("predict", folder / "run", "--file", folder / "texts.txt", "--task", "pet", "--json"),
        call("predict", folder / "run", "--task", "pet", "--json", text="\n".join(texts)),
    ]
    assert all(way.exit_code == 0 for way in ways), ways[0].output
    assert ways[0].output == ways[1].output == ways[2].output
    answers = [json.loads(line) for line in ways[0].output.splitlines()]
    assert [answer["text"] for answer in answers] == texts
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1) for answer in answers)
    both = call("predict", folder / "run", texts[0]).output.splitlines()
    assert [line.split("\t")[0] for line in both] == ["mood", "pet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "none.yaml"], "no recipe none.yaml"),
        (["train", "{folder}/r.yaml", "--out", "{folder}/run"], "--overwrite"),
        (["train", "{folder}/r.yaml", "--set", "training.stpes=1", "--out", "{folder}/new"], "did you mean 'steps'"),
        (["train", "{folder}/r.yaml", "--set", "model=nowhere/at/all", "--out", "{folder}/new"], "cannot be loaded"),
        (["eval", "{folder}"], "no finished run"),
        (["predict", "{folder}/run", "text", "--task", "pets"], "did you mean 'pet'"),
        (["predict", "{folder}/run", "text", "--file", "x"], "not both"),
        (["predict", "{folder}/run", "--file", "{folder}/nothing.txt"], "cannot be read"),
        (["predict", "{folder}/run"], "no text"),
        (["quickstart", "--method", "mor", "--out", "{folder}/new"], "did you mean 'more'"),
        (["quickstart", "--seeds", "1,1", "--out", "{folder}/new"], "whole numbers"),
        (["quickstart", "--set", "method.rnak=2", "--out", "{folder}/new"], "unknown name"),
        (["quickstart", "--model", "nowhere/at/all", "--out", "{folder}/new"], "cannot be loaded"),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_2(folder: Path, words: list[str], message: str):
    result = call(*(word.format(folder=folder) for word in words), text="")
    assert result.exit_code == 2
    assert "error: " in result.output and message in result.output
    assert "Traceback" not in result.output
    assert not (folder / "new").exists()


def test_the_quickstart_runs_from_end_to_end(folder: Path):
    sources = [
        {"name": n, "train": f"{folder}/{n}-train.jsonl", "test": f"{folder}/{n}-test.jsonl"} for n in ("mood", "pet")
    ]
    settings = [f"tasks={json.dumps(sources)}", "max_length=16", "training.batch_size=8", "method.num_reflections=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    out = folder / "quick"
    result = call("quickstart", "--model", folder / "model", "--steps", 2, "--seeds", "0,1", "--out", out, *options)
    assert result.exit_code == 0, result.output
    for expected in ("trivial answer", "frozen model", "adapted model", "mean ± sd", "loaded into a fresh base model"):
        assert expected in result.output
    assert "polyrank predict" in result.output
    assert {path.name for path in out.iterdir()} == {"seed-0", "seed-1"}


def test_the_entry_point_shows_no_traceback():
    command = [sys.executable, "-c", "from polyrank.cli import main; main()", "train", "none.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
