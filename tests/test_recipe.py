import json
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from polyrank.evaluate import predict
from polyrank.quickstart import Choices, quickstart_recipe
from polyrank.recipe import RecipeError, load_run, load_tasks, read_recipe, run, write_recipe
from polyrank.recipe.reading import LARGEST
from polyrank.tasks import Examples

GOOD = {
    "model": "minilm",
    "method": {"name": "more", "rank": 4},
    "tasks": ["r8", {"name": "mood", "train": "mood.jsonl", "test": "mood.jsonl"}],
    "training": {"steps": 5},
}


def write(folder: Path, content: dict | str) -> Path:
    path = folder / "r.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def save_examples(path: Path, examples: Examples) -> None:
    rows = [json.dumps({"text": t, "label": y}) for t, y in zip(examples.texts, examples.labels, strict=True)]
    path.write_text("\n".join(rows))


def test_round_trip_is_exact_and_complete(tmp_path: Path):
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe.tasks[0].data == "r8"
    assert recipe.tasks[1].train == str((tmp_path / "mood.jsonl").resolve())
    elsewhere = tmp_path / "run"
    elsewhere.mkdir()
    write_recipe(recipe, elsewhere / "recipe.yaml")
    assert read_recipe(elsewhere / "recipe.yaml") == recipe
    written = yaml.safe_load((elsewhere / "recipe.yaml").read_text())
    assert written["training"]["weight_decay"] == recipe.training.weight_decay
    assert written["method"].keys() > {"name", "rank", "alpha"}
    assert recipe.build_method().rank == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"r\.yaml: modle: unknown name; did you mean 'model'\?"),
        ({"training": {"stpes": 5}}, r"training\.stpes: unknown name; did you mean 'steps'\?"),
        ({"training": {"steps": "many"}}, r"training\.steps: .*integer, got 'many'"),
        ({"training": {"steps": 0}}, r"training\.steps: .*greater than or equal to 1, got 0"),
        ({"method": {"name": "mooer"}}, r"method: unknown method 'mooer'; did you mean 'moore'\? \(known: .*lora"),
        ({"method": {"name": "more", "rnak": 4}}, r"method\.rnak: unknown name; did you mean 'rank'\?"),
        ({"method": {"name": "more", "rank": "4x"}}, r"method\.rank: .*got '4x'"),
        ({"method": {}}, r"method: .*name"),
        ({"tasks": []}, r"tasks: .*at least 1"),
        ({"tasks": ["r8", "r8"]}, "clash"),
        ({"training": {"task_weights": {"r8": 1.0}}}, r"task_weights names \['r8'\], the tasks are \['mood', 'r8'\]"),
        ({"training": {"combine": "nash"}}, r"training\.combine: unknown combiner 'nash'; did you mean 'nash_mtl'\?"),
        (
            {"training": {"combine": {"name": "dwa", "windo": 3}}},
            r"combine\.windo: unknown name; did you mean 'window'\?",
        ),
        ({"training": {"combine": "mgda", "mixing": {"batches": "one_task"}}}, "nothing to combine: take mixed"),
        (
            {"training": {"combine": {"name": "achievement", "potential": {"r8": 94, "mood": 0.9}}}},
            r"potential\.r8: .*less than or equal to 1, got 94",
        ),
        ({"training": {"combine": "achievement"}}, r"training\.combine\.potential: is missing"),
        (
            {"training": {"combine": {"name": "achievement", "potential": {"r8": 0.9}}}},
            r"potential names \['r8'\], the tasks are \['mood', 'r8'\]",
        ),
        ({"tasks": ["a/b"]}, "task name 'a/b'"),
        ({"tasks": [{"name": "x"}]}, r"tasks\.0: give one of 'data'"),
        ({"tasks": [{"name": "x", "test": "a.csv"}]}, "with the split 'train'"),
        ({"tasks": [{"name": "x", "train": "a.csv", "test_share": 1.0}]}, "less than 1"),
        ({"tasks": [{"name": "x", "dat": "r8"}]}, r"tasks\.0\.dat: unknown name; did you mean 'data'\?"),
    ],
)
def test_errors_name_file_key_reason_and_cure(tmp_path: Path, change: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, GOOD | change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", r"r\.yaml:2: the key 'model' stands twice"),
        ("model: [a\n", r"r\.yaml:2: "),
        ("- a\n", "a recipe is a mapping"),
        ("a: &x 1\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("[" * 20_000, "YAML"),
        ("a: " + "x" * LARGEST, "at most"),
        ("a: 2001-99-99", "YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(tmp_path, text))


def test_a_missing_file_and_bad_bytes_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="no recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        read_recipe(tmp_path / "r.yaml")


def test_settings_change_values_and_a_new_method_starts_from_its_defaults(tmp_path: Path):
    path = write(tmp_path, GOOD)
    recipe = read_recipe(path, ["training.lr=1e-2", "method.name=lora", "method.alpha=3", "tasks=[nyt]"])
    assert recipe.training.lr == 0.01 and recipe.training.steps == 5
    assert recipe.method == {"name": "lora", "rank": 8, "alpha": 3.0}
    assert [task.name for task in recipe.tasks] == ["nyt"]
    for setting, message in (
        ("training.lr", "write key=value"),
        ("model.x=1", "holds no names"),
        ("training.stpes=1", "did you mean 'steps'"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_recipe(path, [setting])


@pytest.mark.parametrize("method", ["moore", "moore_topk", "more", "ase", "lora"])
def test_the_shipped_quickstart_recipe_serves_every_method(method: str, tmp_path: Path):
    recipe = quickstart_recipe(Choices(method=method, steps=7), seed=3, out=tmp_path)
    assert recipe.method["name"] == method
    assert (recipe.training.steps, recipe.training.seed, recipe.out) == (7, 3, str(tmp_path))
    assert [task.name for task in recipe.tasks] == ["newsgroups", "r8", "tweets", "sarcasm", "movies", "nyt"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_recipes_beside_the_package_are_valid(path: Path):
    assert read_recipe(path).build_method()


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model")
    for task in tiny.tasks():
        save_examples(tmp_path / f"{task.name}-train.jsonl", task.train)
        save_examples(tmp_path / f"{task.name}-test.jsonl", task.test)
    content = {
        "model": str(tmp_path / "model"),
        "method": {"name": "moore", "num_reflections": 2, "task_dim": 4, "router_dim": 4},
        "tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in ("mood", "pet")],
        "max_length": 16,
        "training": {"steps": 4, "batch_size": 8, "eval_every": 2},
        "out": str(tmp_path / "run"),
    }
    return write(tmp_path, content)


def test_a_run_comes_back_from_its_folder(recipe_file: Path, tmp_path: Path):
    finished = run(read_recipe(recipe_file), progress=False)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names == {"recipe.yaml", "metrics.jsonl", "adapter", "heads", "results.json"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["mean"]["adapted"] == pytest.approx(sum(r["adapted"] for r in results["tasks"].values()) / 2)
    assert all(row["frozen_gradient_norm"] < 1e-4 for row in results["tasks"].values())
    loaded = load_run(tmp_path / "run")
    assert loaded.recipe == finished.recipe and loaded.results == finished.results
    for task in ("mood", "pet"):
        texts = ["the cat is good", "a very bad dog"]
        for a, b in zip(predict(finished.model, texts, task), predict(loaded.model, texts, task), strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)
    with pytest.raises(RecipeError, match="--overwrite"):
        run(read_recipe(recipe_file), progress=False)
    again = run(read_recipe(recipe_file), overwrite=True, progress=False)
    assert again.results["tasks"] == finished.results["tasks"]  # same seed, same numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model=no/such/folder"], "model 'no/such/folder' cannot be loaded"),
        (["tasks=[{name: a, data: r88}]"], "^task 'a': unknown data set 'r88'; did you mean 'r8'"),
        (["tasks=[{name: a, train: none.csv, test: none.csv}]"], "no such file"),
        (["targets=[q_proj]"], "q_proj"),
    ],
)
def test_what_is_not_there_leaves_no_folder(recipe_file: Path, tmp_path: Path, settings: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        run(read_recipe(recipe_file, settings), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(recipe_file: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match="is no run folder"):
        run(read_recipe(recipe_file), overwrite=True, progress=False)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"


def test_a_damaged_run_is_refused_by_name(recipe_file: Path, tmp_path: Path):
    run(read_recipe(recipe_file), progress=False)
    heads = tmp_path / "run" / "heads" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(RecipeError, match=r"heads\.safetensors"):
        load_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="no finished run"):
        load_run(tmp_path)


def test_fresh_heads_and_seeds(recipe_file: Path):
    torch.manual_seed(5)
    settings = ["heads=fresh", "training.holdout=0"]
    first = run(read_recipe(recipe_file, settings), progress=False)
    torch.manual_seed(6)
    second = run(read_recipe(recipe_file, settings), overwrite=True, progress=False)
    assert first.results["best_step"] == 4  # nothing held out: the last step
    state = second.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())


def test_the_order_of_settings_does_not_matter(tmp_path: Path):
    path = write(tmp_path, GOOD)
    settings = ["method.rank=6", "method.name=dora"]
    for order in (settings, settings[::-1], ["method=dora", "method.rank=6"]):
        assert read_recipe(path, order).method == {"name": "dora", "rank": 6, "alpha": 16.0}
    assert read_recipe(write(tmp_path, GOOD | {"method": "more"})).method["name"] == "more"
    short = write(tmp_path, GOOD | {"method": "emtal"})
    assert read_recipe(short, ["method.num_experts=8"]).method["num_experts"] == 8
    assert read_recipe(short, ["method.name=dora"]).method["name"] == "dora"


def test_a_setting_reaches_into_a_task(tmp_path: Path):
    path = write(tmp_path, GOOD)
    recipe = read_recipe(path, ["tasks.mood.text=body", "tasks.r8.metric=macro_f1"])
    assert recipe.tasks[1].text == "body" and (recipe.tasks[0].data, recipe.tasks[0].metric) == ("r8", "macro_f1")
    with pytest.raises(RecipeError, match="no task 'moods'"):
        read_recipe(path, ["tasks.moods.text=body"])


def test_a_label_too_rare_for_our_own_split_is_trained_on(tmp_path: Path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    for i in range(8):
        odd = [{"text": f"odd {i}", "label": "rare"}]
        (tmp_path / "mood.jsonl").write_text("\n".join(map(json.dumps, rows + odd)))
        content = GOOD | {"tasks": [{"name": "mood", "train": "mood.jsonl"}]}
        (task,) = load_tasks(read_recipe(write(tmp_path, content))).tasks
        assert "rare" in task.train.labels and len(task.train) + len(task.test) == 21
