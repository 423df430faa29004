"""From somebody's files to answers, without an edit."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

import tiny
from polyrank.cli import app
from polyrank.recipe import load_tasks, read_recipe
from polyrank.recipe.init import guess
from polyrank.tasks import Examples, LanguageTask


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two tasks in different layouts, and a file that is none."""
    folder = tmp_path / "my data"
    folder.mkdir()
    mood, pet = tiny.tasks()
    rows = [
        {"id": str(i), "body": text, "stars": int(label == "good")}
        for i, (text, label) in enumerate(zip(mood.train.texts, mood.train.labels, strict=True))
    ]
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for part, examples in (("train", pet.train), ("dev", pet.test)):
        with (folder / f"pets_{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("animal", "sentence"), *zip(examples.labels, examples.texts, strict=True)])
    (folder / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    return folder


def test_init_then_train_eval_predict_without_an_edit(files: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    made = call("init", files, "--out", recipe)
    assert made.exit_code == 0, made.output
    assert "classification of 'body' into 2 values of 'stars'" in made.output
    assert "left out" in made.output and "numbers.csv" in made.output
    found = {task.name: task for task in read_recipe(recipe).tasks}
    assert (found["reviews"].text, found["reviews"].label, found["reviews"].test) == ("body", "stars", None)
    assert (found["pets"].text, found["pets"].label) == ("sentence", "animal")
    assert found["pets"].test == str(files / "pets_dev.csv")
    assert "# classification" in recipe.read_text() or "# task reviews: classification" in recipe.read_text()
    tiny.save_model(tmp_path / "model")
    small = [
        f"model={tmp_path / 'model'}",
        "method.num_reflections=2",
        "training.steps=3",
        "max_length=16",
        f"out={tmp_path / 'run'}",
    ]
    done = call("train", recipe, *(word for setting in small for word in ("--set", setting)))
    assert done.exit_code == 0, done.output
    scores = json.loads(call("eval", tmp_path / "run", "--json").stdout)
    assert scores["tasks"].keys() == {"reviews", "pets"}
    answers = call("predict", tmp_path / "run", "a good cat", "--json").stdout.splitlines()
    assert {json.loads(answer)["answer"] for answer in answers} <= {"0", "1", "cat", "dog", "fish"}
    again = call("init", files, "--out", recipe)
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no rows"),
        (b"{\n", "bad JSON"),
        (b"[1]\n", "expected an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": "a"}\n{"text": "c"}\n', "looks like labels"),
        (b'{"label": "x"}\n{"label": "y"}\n{"label": "x"}\n{"label": "y"}\n', "looks like labels"),
    ],
)
def test_files_that_hold_no_task_are_named_with_the_reason(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "a.jsonl").write_bytes(content)
    result = call("init", tmp_path, "--out", tmp_path / "r.yaml")
    assert result.exit_code == 2 and reason in result.output and "a.jsonl" in result.output
    assert not (tmp_path / "r.yaml").exists()
    assert call("init", tmp_path / "none", "--out", tmp_path / "r.yaml").exit_code == 2


def test_a_recipe_of_awkward_names_is_read_back(tmp_path: Path):
    rows = [{'what: "is" # it': f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    (tmp_path / "été & co.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = call("init", tmp_path / "été & co.jsonl", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    (task,) = read_recipe(tmp_path / "r.yaml").tasks
    assert task.text == 'what: "is" # it' and task.train == str((tmp_path / "été & co.jsonl").resolve())
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["tasks"][0]["name"] == task.name


def test_no_file_is_lost_to_a_name(tmp_path: Path):
    for place in ("one/a.jsonl", "two/a.jsonl", "two/A.csv", "con.jsonl", "one/train.jsonl", "one/test.jsonl"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": f"some text {i}", "label": "ab"[i % 2]} for i in range(20)]
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        path.write_text("\n".join(lines if path.suffix == ".csv" else map(json.dumps, rows)))
    result = call("init", tmp_path / "one", tmp_path / "two", tmp_path / "con.jsonl", "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    tasks = read_recipe(tmp_path / "r.yaml").tasks
    used = [path for task in tasks for path in (task.train, task.test) if path]
    assert sorted(used) == sorted(str(path.resolve()) for path in tmp_path.rglob("*.[jc]s*") if path.suffix != ".yaml")
    assert len({task.name.lower() for task in tasks}) == len(tasks) == 5


def test_a_split_by_content_keeps_equal_texts_together_and_needs_no_seed():
    texts = [f"text {i % 50}" for i in range(120)]
    examples = Examples(texts, ["x"] * 120)
    train, test = examples.split(0.2)
    assert len(train) + len(test) == 120 and len(set(test.texts)) == 10
    assert not set(train.texts) & set(test.texts)
    longer = Examples([*texts, "Text  3"], ["x"] * 121).split(0.2)
    assert ("Text  3" in longer[1].texts) == ("text 3" in longer[1].texts)


NOUNS = ["cat", "dog", "fish", "bird"]
ROWS = {
    "classification": [{"body": f"the {NOUNS[i % 4]} number {i}", "kind": NOUNS[i % 4]} for i in range(30)],
    "pairs": [{"one": f"a {i} cat sat", "two": f"the cat {i} sat", "same": bool(i % 2)} for i in range(30)],
    "multi_label": [{"text": f"a text {i}", "topics": NOUNS[: i % 3]} for i in range(30)],
    "regression": [{"text": f"a text {i}", "score": i / 7} for i in range(30)],
    "similarity": [{"first": f"a text {i}", "second": f"b text {i}", "score": i / 7} for i in range(30)],
    "token_classification": [{"tokens": ["the", f"w{i}"], "ner": ["O", "B-X"]} for i in range(30)],
    "completion": [{"instruction": f"say {i} now", "output": f"said {i}"} for i in range(30)],
    "chat": [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "hello"}]}
        for i in range(30)
    ],
    "plain": [{"text": f"once upon a time {i}"} for i in range(30)],
    "multiple_choice": [{"question": f"which is {i}?", "choices": NOUNS[:3], "answer": i % 3} for i in range(30)],
    "letters": [{"question": f"which is {i}?", "choices": NOUNS[:3], "answer": "ABC"[i % 3]} for i in range(30)],
}
GUESSED = {
    "classification": {"type": "classification", "text": "body", "label": "kind"},
    "pairs": {"type": "classification", "text": ["one", "two"], "label": "same"},
    "multi_label": {"type": "multi_label", "text": "text", "label": "topics"},
    "regression": {"type": "regression", "text": "text", "label": "score"},
    "similarity": {"type": "regression", "text": ["first", "second"], "label": "score"},
    "token_classification": {"type": "token_classification", "text": "tokens", "label": "ner"},
    "completion": {"type": "generation", "text": "instruction", "label": "output"},
    "chat": {"type": "generation", "text": "messages"},
    "plain": {"type": "generation", "text": "text"},
    "multiple_choice": {"type": "multiple_choice", "text": "question", "options": "choices", "label": "answer"},
    "letters": {"type": "multiple_choice", "text": "question", "options": "choices", "label": "answer"},
}


@pytest.mark.parametrize("name", ROWS)
def test_each_type_is_guessed_and_its_rows_can_be_read(tmp_path: Path, name: str):
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS[name])))
    assert guess(ROWS[name]).fields == GUESSED[name]
    assert call("init", tmp_path, "--out", tmp_path / "r.yaml").exit_code == 0
    recipe = read_recipe(tmp_path / "r.yaml")
    (task,) = load_tasks(recipe).tasks
    assert task.kind == GUESSED[name]["type"] and len(task.train) + len(task.test) == 30
    assert recipe.model == ("smollm2" if isinstance(task, LanguageTask) else "minilm")


def test_tasks_of_both_kinds_become_tasks_of_a_language_model(tmp_path: Path):
    for name in ("classification", "multiple_choice", "pairs", "regression"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS[name])))
    result = call("init", tmp_path, "--out", tmp_path / "r.yaml")
    assert result.exit_code == 0 and "left out" in result.output and "needs an encoder" in result.output
    recipe = read_recipe(tmp_path / "r.yaml")
    kinds = {task.name: task for task in load_tasks(recipe).tasks}
    assert kinds.keys() == {"classification", "multiple_choice", "pairs"}
    prompt, options = kinds["classification"].train.texts[0]
    assert prompt.endswith("\nkind:") and options == tuple(sorted(NOUNS))
    assert kinds["pairs"].train.texts[0][1] == ("false", "true") and kinds["pairs"].train.labels[0] in (0, 1)
    assert recipe.model == "smollm2"


def test_gaps_and_confidences_do_not_change_the_guess():
    rows = ROWS["classification"]
    assert (
        guess([{**row, "kind": None} if i == 3 else row for i, row in enumerate(rows)]).fields
        == GUESSED["classification"]
    )
    assert guess([rows[0], *({**row, "confidence": i / 7} for i, row in enumerate(rows))]).fields["label"] == "kind"
    named = [{**row, "label": row["kind"], "confidence": i / 7} for i, row in enumerate(rows)]
    assert guess(named).fields["label"] == "label"
