"""The recipes of the papers' protocols: every file parses, and rows in the hub's form give the papers' prompts."""

from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from polyrank.data import of_dataset
from polyrank.recipe import Recipe, check_recipe
from polyrank.recipe.loading import kind_of, load_examples, load_tasks
from polyrank.recipe.reading import apply_setting, parse_yaml

FOLDER = Path(__file__).parents[1] / "recipes"
PAPERS = ["moore_csr_mtl", "moore_nlu_mtl", "more_glue_t5", "more_commonsense_llama"]


def content_of(name: str) -> dict:
    path = FOLDER / f"{name}.yaml"
    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def recipe_of(name: str) -> Recipe:
    return check_recipe(content_of(name), f"{name}.yaml", FOLDER)


STRING, NUMBER = Value("string"), Value("int32")
CHOICES = {"text": List(STRING), "label": List(STRING)}
ARC = Features({"id": STRING, "question": STRING, "choices": CHOICES, "answerKey": STRING})


def glue(label: list[str] | None, *columns: str) -> Features:
    kind = Value("float32") if label is None else ClassLabel(names=label)
    return Features({**dict.fromkeys(columns, STRING), "label": kind, "idx": NUMBER})


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ["entailment", "not_entailment"]
FEATURES = {  # the columns of the hub's data sets
    "allenai/ai2_arc:ARC-Challenge": ARC,
    "allenai/ai2_arc:ARC-Easy": ARC,
    "google/boolq": Features({"question": STRING, "answer": Value("bool"), "passage": STRING}),
    "allenai/openbookqa:main": Features(
        {"id": STRING, "question_stem": STRING, "choices": CHOICES, "answerKey": STRING}
    ),
    "ybisk/piqa": Features({"goal": STRING, "sol1": STRING, "sol2": STRING, "label": ClassLabel(names=["0", "1"])}),
    "allenai/social_i_qa": Features(
        dict.fromkeys(["context", "question", "answerA", "answerB", "answerC", "label"], STRING)
    ),
    "Rowan/hellaswag": Features(
        {"ind": NUMBER, "activity_label": STRING, "ctx": STRING, "endings": List(STRING), "label": STRING}
    ),
    "allenai/winogrande:winogrande_debiased": Features(
        dict.fromkeys(["sentence", "option1", "option2", "answer"], STRING)
    ),
    "tau/commonsense_qa": Features(
        {"id": STRING, "question": STRING, "question_concept": STRING, "choices": CHOICES, "answerKey": STRING}
    ),
    "nyu-mll/glue:cola": glue(["unacceptable", "acceptable"], "sentence"),
    "nyu-mll/glue:mnli": glue(["entailment", "neutral", "contradiction"], "premise", "hypothesis"),
    "nyu-mll/glue:mrpc": glue(["not_equivalent", "equivalent"], *PAIR),
    "nyu-mll/glue:qnli": glue(ENTAILMENT, "question", "sentence"),
    "nyu-mll/glue:qqp": glue(["not_duplicate", "duplicate"], "question1", "question2"),
    "nyu-mll/glue:rte": glue(ENTAILMENT, *PAIR),
    "nyu-mll/glue:sst2": glue(["negative", "positive"], "sentence"),
    "nyu-mll/glue:stsb": glue(None, *PAIR),
}


def stored(name: str, *rows: tuple) -> Dataset:
    """Rows as the hub has them: made up values for the named columns, empty ones for the others."""
    columns = FEATURES[name]
    empty = {key: "" if kind == STRING else 0 for key, kind in columns.items()}
    used = [key for key in columns if key not in ("id", "idx", "ind", "question_concept")]
    return Dataset.from_list([empty | dict(zip(used, row, strict=True)) for row in rows], features=columns)


def choices(*texts: str, keys: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(keys[: len(texts)])}


SKY = ("What color is the sky?", choices("red", "blue", "green", "black"), "B")
ICE = ("Ice is", choices("wet", "cold", "hot", keys="123"), "2")
WORM = ("Worms eat", choices("iron", "glass", "leaves", "light"), "C")
MILK = ("keep milk", "in a fridge", "in a drawer")
FISH = ("do fish sleep", True, "Fish rest.")
FLAT = ("is the earth flat", False, "The earth is round.")
SHOE = ("Where are shoes?", choices("box", "sea", "sky", "cup", "tree"), "A")

# (row, prompt, options, the right one); None where the label is missing
CSR = {
    "arc-c": [
        (
            SKY,
            "Please choose the correct answer to the question: What color is the sky?\n"
            "(A) red\n(B) blue\n(C) green\n(D) black\nAnswer:",
            "ABCD",
            1,
        ),
        (
            ICE,
            "Please choose the correct answer to the question: Ice is\n(A) wet\n(B) cold\n(C) hot\nAnswer:",
            "ABC",
            1,
        ),
    ],
    "boolq": [
        (
            FISH,
            "Please answer the following question with true or false: do fish sleep?\nAnswer:",
            ("true", "false"),
            0,
        ),
        (
            FLAT,
            "Please answer the following question with true or false: is the earth flat?\nAnswer:",
            ("true", "false"),
            1,
        ),
    ],
    "obqa": [
        (
            WORM,
            "Please choose the correct answer to the question: Worms eat (A) iron (B) glass (C) leaves (D) light\n"
            "Answer:",
            "ABCD",
            2,
        ),
        (
            ("A {cup}", choices("1", "2", "3", "4"), "D"),
            "Please choose the correct answer to the question: A {cup} (A) 1 (B) 2 (C) 3 (D) 4\nAnswer:",
            "ABCD",
            3,
        ),
    ],
    "piqa": [
        (
            (*MILK, 0),
            "Below is a common task along with two possible solutions labeled (A) and (B). Please select the "
            "appropriate solution to achieve the task:\nkeep milk\n\n(A) in a fridge\n(B) in a drawer\n\n"
            "Correct solution:",
            "AB",
            0,
        ),
        (
            ("count", "1", "0", 1),  # an option that reads like an index
            "Below is a common task along with two possible solutions labeled (A) and (B). Please select the "
            "appropriate solution to achieve the task:\ncount\n\n(A) 1\n(B) 0\n\nCorrect solution:",
            "AB",
            1,
        ),
        (
            (*MILK, -1),
            "Below is a common task along with two possible solutions labeled (A) and (B). Please select the "
            "appropriate solution to achieve the task:\nkeep milk\n\n(A) in a fridge\n(B) in a drawer\n\n"
            "Correct solution:",
            "AB",
            None,
        ),
    ],
    "siqa": [
        (
            ("Ann fell.", "How is Ann?", "hurt", "glad", "rich", "1"),
            "Please choose the correct answer to the question.\nQuestion: Ann fell. How is Ann?\n"
            "(A) hurt\n(B) glad\n(C) rich\nAnswer:",
            "ABC",
            0,
        ),
        (
            ("Bo won.", "Why?", "luck", "work", "both", "3"),
            "Please choose the correct answer to the question.\nQuestion: Bo won. Why?\n"
            "(A) luck\n(B) work\n(C) both\nAnswer:",
            "ABC",
            2,
        ),
    ],
    "hellaswag": [
        (
            ("Cooking", "A man boils water. He", ["eats it.", "adds salt.", "sings.", "flies."], "1"),
            "Please choose the correct ending to complete the given sentence.\n"
            "Sentence: Cooking. A man boils water. He\n(A) eats it.\n(B) adds salt.\n(C) sings.\n(D) flies.\nAnswer:",
            "ABCD",
            1,
        ),
        (
            ("Golf", "She", ["a", "b", "c", "d"], "3"),
            "Please choose the correct ending to complete the given sentence.\n"
            "Sentence: Golf. She\n(A) a\n(B) b\n(C) c\n(D) d\nAnswer:",
            "ABCD",
            3,
        ),
    ],
    "winogrande": [
        (
            ("The cup did not fit in the box as _ was big.", "cup", "box", "1"),
            "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
            "Sentence: The cup did not fit in the box as _ was big.\n(A) cup\n(B) box\nAnswer:",
            "AB",
            0,
        ),
        (
            ("_ slept.", "Ann", "Bo", "2"),
            "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
            "Sentence: _ slept.\n(A) Ann\n(B) Bo\nAnswer:",
            "AB",
            1,
        ),
    ],
    "csqa": [
        (
            SHOE,
            "Please choose the correct answer to the question: Where are shoes? "
            "(A) box (B) sea (C) sky (D) cup (E) tree\nAnswer:",
            "ABCDE",
            0,
        ),
        (
            ("Why?", choices("v", "w", "x", "y", "z"), "E"),
            "Please choose the correct answer to the question: Why? (A) v (B) w (C) x (D) y (E) z\nAnswer:",
            "ABCDE",
            4,
        ),
    ],
}
CSR["arc-e"] = CSR["arc-c"]
COMMONSENSE = {
    "boolq": [
        (
            FISH,
            "Passage: Fish rest.\nQuestion: do fish sleep?\nTrue or false? Answer:",
            ("true", "false"),
            0,
        ),
        (
            FLAT,
            "Passage: The earth is round.\nQuestion: is the earth flat?\nTrue or false? Answer:",
            ("true", "false"),
            1,
        ),
    ],
    "piqa": [
        ((*MILK, 0), "Goal: keep milk\n(A) in a fridge\n(B) in a drawer\nAnswer:", "AB", 0),
        ((*MILK, 1), "Goal: keep milk\n(A) in a fridge\n(B) in a drawer\nAnswer:", "AB", 1),
    ],
    "obqa": [
        (WORM, "Question: Worms eat\n(A) iron\n(B) glass\n(C) leaves\n(D) light\nAnswer:", "ABCD", 2),
        (
            ("Ice is", choices("a", "b", "c", "d"), "A"),
            "Question: Ice is\n(A) a\n(B) b\n(C) c\n(D) d\nAnswer:",
            "ABCD",
            0,
        ),
    ],
    "arc-e": [
        (SKY, "Question: What color is the sky?\n(A) red\n(B) blue\n(C) green\n(D) black\nAnswer:", "ABCD", 1),
        (ICE, "Question: Ice is\n(A) wet\n(B) cold\n(C) hot\nAnswer:", "ABC", 1),
    ],
}
COMMONSENSE["arc-c"] = COMMONSENSE["arc-e"]

# (row, prompt, label)
NLU = {
    "cola": [
        (("He go.", 0), "Is the following sentence ”He go.” grammatically acceptable?\nAnswer:", "unacceptable"),
        (("He goes.", 1), "Is the following sentence ”He goes.” grammatically acceptable?\nAnswer:", "acceptable"),
        (("He.", -1), "Is the following sentence ”He.” grammatically acceptable?\nAnswer:", None),
    ],
    "mnli": [
        (("I ran.", "I moved.", 0), "Dose the statement ”I ran.” imply that ”I moved.”?\nAnswer:", "entailment"),
        (("I ran.", "It rained.", 1), "Dose the statement ”I ran.” imply that ”It rained.”?\nAnswer:", "neutral"),
        (("I ran.", "I sat.", 2), "Dose the statement ”I ran.” imply that ”I sat.”?\nAnswer:", "contradiction"),
    ],
    "mrpc": [
        (
            ("A left.", "A went.", 1),
            "Dose the following sentence ”A left.” convey the equivalent meaning as ”A went.”?\nAnswer:",
            "equivalent",
        ),
        (
            ("A left.", "B ate.", 0),
            "Dose the following sentence ”A left.” convey the equivalent meaning as ”B ate.”?\nAnswer:",
            "not_equivalent",
        ),
    ],
    "qnli": [
        (
            ("Who?", "Ann did.", 0),
            "Based on the statement: ”Who?” dose the following sentence ”Ann did.” have a definitive answer?\nAnswer:",
            "entailment",
        ),
        (
            ("Who?", "Rain.", 1),
            "Based on the statement: ”Who?” dose the following sentence ”Rain.” have a definitive answer?\nAnswer:",
            "not_entailment",
        ),
    ],
    "qqp": [
        (
            ("Why?", "How come?", 1),
            "Is the following question ”Why?” essentially asking the same thing as ”How come?”?\nAnswer:",
            "duplicate",
        ),
        (
            ("Why?", "Who?", 0),
            "Is the following question ”Why?” essentially asking the same thing as ”Who?”?\nAnswer:",
            "not_duplicate",
        ),
    ],
    "rte": [
        (("I ran.", "I moved.", 0), "Dose the text ”I ran.” entail the statement ”I moved.”?\nAnswer:", "entailment"),
        (("I ran.", "I sat.", 1), "Dose the text ”I ran.” entail the statement ”I sat.”?\nAnswer:", "not_entailment"),
    ],
    "sst2": [
        (("a joy", 1), "Is the following sentence ”a joy” sentimently positive?\nAnswer:", "positive"),
        (("a bore", 0), "Is the following sentence ”a bore” sentimently positive?\nAnswer:", "negative"),
    ],
}
GLUE_T5 = {
    "cola": [
        (("He go.", 0), "cola sentence: He go.", "unacceptable"),
        (("He goes.", 1), "cola sentence: He goes.", "acceptable"),
        (("He.", -1), "cola sentence: He.", None),
    ],
    "mnli": [
        (("I ran.", "I moved.", 0), "mnli hypothesis: I moved. premise: I ran.", "entailment"),
        (("I ran.", "It rained.", 1), "mnli hypothesis: It rained. premise: I ran.", "neutral"),
        (("I ran.", "I sat.", 2), "mnli hypothesis: I sat. premise: I ran.", "contradiction"),
    ],
    "mrpc": [
        (("A left.", "A went.", 1), "mrpc sentence1: A left. sentence2: A went.", "equivalent"),
        (("A left.", "B ate.", 0), "mrpc sentence1: A left. sentence2: B ate.", "not_equivalent"),
    ],
    "qnli": [
        (("Who?", "Ann did.", 0), "qnli question: Who? sentence: Ann did.", "entailment"),
        (("Who?", "Rain.", 1), "qnli question: Who? sentence: Rain.", "not_entailment"),
    ],
    "qqp": [
        (("Why?", "How come?", 1), "qqp question1: Why? question2: How come?", "duplicate"),
        (("Why?", "Who?", 0), "qqp question1: Why? question2: Who?", "not_duplicate"),
    ],
    "rte": [
        (("I ran.", "I moved.", 0), "rte sentence1: I ran. sentence2: I moved.", "entailment"),
        (("I ran.", "I sat.", 1), "rte sentence1: I ran. sentence2: I sat.", "not_entailment"),
    ],
    "sst2": [
        (("a joy", 1), "sst2 sentence: a joy", "positive"),
        (("a bore", 0), "sst2 sentence: a bore", "negative"),
    ],
    "stsb": [
        (("A cat.", "A pet.", 3.8), "stsb sentence1: A cat. sentence2: A pet.", "3.8"),
        (("A cat.", "A cat.", 5.0), "stsb sentence1: A cat. sentence2: A cat.", "5.0"),
    ],
}
EXPECTED = dict(zip(PAPERS, (CSR, NLU, GLUE_T5, COMMONSENSE), strict=True))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path):
    recipe = check_recipe(parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path), path.parent)
    assert recipe.build_method()


@pytest.mark.parametrize("name", PAPERS)
def test_a_header_tells_how_to_run_it_and_that_nobody_did(name: str):
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\nmodel:")[0]
    said = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    assert "not run here" in said
    assert f"polyrank train recipes/{name}.yaml --set model=" in said
    assert "https://arxiv.org/abs/" in said


CASES = [(name, task) for name in PAPERS for task in EXPECTED[name]]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_rows_of_the_hub_give_the_papers_prompts(name: str, task: str):
    source = next(one for one in recipe_of(name).tasks if one.name == task)
    assert source.dataset is not None
    columns = source.columns(kind_of(source))
    for row, prompt, *rest in EXPECTED[name][task]:
        (record,) = of_dataset(stored(source.dataset, row))
        text, label = columns.example(record.row)
        if kind_of(source) == "multiple_choice":
            assert text == (prompt, tuple(rest[0]))
        else:
            assert text == prompt
        assert label == rest[-1]


@pytest.mark.parametrize("name", PAPERS)
def test_every_task_of_a_protocol_has_its_rows_here(name: str):
    assert {task.name for task in recipe_of(name).tasks} == set(EXPECTED[name])


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def save(folder: Path, dataset: str, *splits: str, rows: list[tuple]) -> None:
    DatasetDict(dict.fromkeys(splits, stored(dataset, *rows))).save_to_disk(folder)


def pointed(name: str, places: dict[str, Path], *settings: str) -> dict:
    """Some tasks of a recipe, with the data sets in these folders."""
    content = content_of(name)
    content["tasks"] = [
        task | {"dataset": str(places[task["name"]])} for task in content["tasks"] if task["name"] in places
    ]
    for setting in settings:
        apply_setting(content, setting)
    return content


def test_copies_on_disk_give_labels_for_heads(tmp_path: Path):
    rows = {task: [row for row, *_ in NLU[task]] for task in ("cola", "mnli")}
    save(tmp_path / "a", "nyu-mll/glue:cola", "train", "validation", rows=rows["cola"])
    save(tmp_path / "b", "nyu-mll/glue:mnli", "train", "validation_matched", rows=rows["mnli"])
    places = {"cola": tmp_path / "a", "mnli": tmp_path / "b"}
    recipe = check_recipe(pointed("moore_nlu_mtl", places, "max_test=2"), "r.yaml", tmp_path)
    train, test, faults = load_examples(recipe.tasks[0], recipe)
    assert list(train.labels) == ["unacceptable", "acceptable", None]
    assert len(test) == 2
    assert not faults
    tasks = load_tasks(recipe).tasks
    assert [(task.kind, task.metric) for task in tasks] == [
        ("classification", "matthews"),
        ("classification", "accuracy"),
    ]


def test_a_folder_of_the_data_sets_name_beside_the_recipe_stands_for_the_hub(tmp_path: Path):
    for task in ("arc-c", "boolq"):
        dataset = {"arc-c": "allenai/ai2_arc:ARC-Challenge", "boolq": "google/boolq"}[task]
        save(tmp_path / dataset, dataset, "train", "test", "validation", rows=[row for row, *_ in CSR[task]])
    content = content_of("moore_csr_mtl")
    content["tasks"] = [task for task in content["tasks"] if task["name"] in ("arc-c", "boolq")]
    recipe = check_recipe(content, "moore_csr_mtl.yaml", tmp_path)
    found = {source.name: load_examples(source, recipe) for source in recipe.tasks}
    assert [list(train.labels) for train, _, _ in found.values()] == [[1, 1], [0, 1]]
    assert [list(test.labels) for _, test, _ in found.values()] == [[1, 1], [0, 1]]
    assert {task.kind for task in load_tasks(recipe).tasks} == {"multiple_choice"}
