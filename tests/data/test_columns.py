"""From rows to examples: every type of task, in every form that a row may have."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, strategies as st

from polyrank.data import Columns, examples, of_dataset, read_dataset, read_rows
from polyrank.data.columns import RowError
from polyrank.tasks import KINDS, Examples

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
GOOD = [
    (Columns(), {"text": "a", "label": True}, ("a", "true")),
    (Columns(text=["a", "b"], label="y"), {"a": "p", "b": "q", "y": "z"}, (("p", "q"), "z")),
    (Columns(names=["no", "yes"]), {"text": "a", "label": 1}, ("a", "yes")),
    (Columns(text="Q: {q}\nA: {d[x]}", label="y"), {"q": "1", "d": {"x": "2"}, "y": "z"}, ("Q: 1\nA: 2", "z")),
    (Columns(), {"text": "a", "label": None}, ("a", None)),
    (Columns("multi_label"), {"text": "a", "labels": ["x", "b"]}, ("a", ("b", "x"))),
    (Columns("multi_label"), {"text": "a", "labels": "x | b"}, ("a", ("b", "x"))),
    (Columns("multi_label"), {"text": "a", "labels": []}, ("a", ())),
    (Columns("multi_label", label=["m", "n"]), {"text": "a", "m": "1", "n": 0}, ("a", ("m",))),
    (Columns("regression"), {"text": "a", "label": "2.5"}, ("a", 2.5)),
    (Columns("token_classification"), {"words": ["a", "b"], "tags": ["O", "X"]}, (("a", "b"), ("O", "X"))),
    (Columns("token_classification"), {"words": "a b", "tags": "O X"}, (("a", "b"), ("O", "X"))),
    (Columns("generation"), {"prompt": "a", "completion": "b"}, ("a", "b")),
    (Columns("generation"), {"messages": CHAT}, ((("user", "hi"),), "hello")),
    (Columns("generation"), {"text": "a b"}, ("", "a b")),
    (Columns("generation", text="body"), {"body": "a b"}, ("", "a b")),
    (Columns("generation", text="talk"), {"talk": CHAT}, ((("user", "hi"),), "hello")),
    (Columns("generation", text="{t}?", label="y", names=["no", "yes"]), {"t": "a", "y": 1}, ("a?", "yes")),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "y"], "answer": 1}, (("a", ("x", "y")), 1)),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "y"], "answer": "y"}, (("a", ("x", "y")), 1)),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["1", "0"], "answer": 1}, (("a", ("1", "0")), 1)),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["1", "0"], "answer": "1"}, (("a", ("1", "0")), 0)),
    (Columns("multiple_choice", choices=["no", "yes"]), {"prompt": "a", "answer": "yes"}, (("a", ("no", "yes")), 1)),
    (Columns(names=["no", "yes"]), {"text": "a", "label": "1"}, ("a", "yes")),
    (Columns("multi_label", names=["x", "y"]), {"text": "a", "labels": [1]}, ("a", ("y",))),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "y"], "answer": "b"}, (("a", ("x", "y")), 1)),
    (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "y"], "answer": "0"}, (("a", ("x", "y")), 0)),
    (
        Columns("multiple_choice", text="question", options="choices.text", names="choices.label", label="answerKey"),
        ARC,
        (("Q?", ("x", "y")), 1),
    ),
    (
        Columns("multiple_choice", text="question", options="choices.text", names="choices.label", label="answerKey",
                letters=True),
        ARC,
        (("Q?\n(A) x\n(B) y\nAnswer:", ("A", "B")), 1),
    ),
    (
        Columns("multiple_choice", text="g", options=["s1", "s2"], label="l"),
        {"g": "a", "s1": "x", "s2": "y", "l": 0},
        (("a", ("x", "y")), 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "row", "expected"), GOOD, ids=lambda x: None)
def test_what_a_row_says(columns: Columns, row: dict, expected: tuple):
    text, label = columns.example(row)
    assert (text, label) == expected
    task = KINDS[columns.kind].from_examples("t", _enough(columns.kind), Examples([text], [None]))
    assert task.test.texts == [text]
    assert columns.question({k: v for k, v in row.items() if v is not None}) == (
        text if columns.kind != "generation" or text else row.get("text", row.get("body"))
    )


def _enough(kind: str) -> Examples:
    labels = {"multi_label": ("x",), "regression": 1.0, "token_classification": ("O",), "multiple_choice": 0}
    other = {"multi_label": ("y",), "regression": 2.0, "token_classification": ("X",), "multiple_choice": 1}
    text = {"token_classification": ("a",), "multiple_choice": ("q", ("a", "b"))}.get(kind, "a")
    return Examples([text, text], [labels.get(kind, "p"), other.get(kind, "q")])


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (Columns(text="{nope}"), {"label": "x"}, "does not fit the columns 'label'"),
        (Columns(text="{text.__class__}"), {"text": "a", "label": "x"}, "does not fit"),
        (Columns(text="{text!r}{"), {"text": "a", "label": "x"}, "does not fit"),
        (Columns(names=["a"]), {"text": "a", "label": 4}, "names 1 labels"),
        (Columns(label=["a", "b"]), {"text": "a", "a": 1, "b": 0}, "one column of labels"),
        (Columns("multi_label"), {"text": "a", "labels": [1.5]}, "not a list of strings"),
        (Columns("multi_label", label=["m"]), {"text": "a", "m": "maybe"}, "Write 0 or 1"),
        (Columns("regression"), {"text": "a", "label": "much"}, "not a finite number"),
        (Columns("regression"), {"text": "a", "label": float("nan")}, "not a finite number"),
        (Columns("token_classification"), {"words": ["a"], "tags": ["O", "X"]}, "one tag for each word"),
        (Columns("token_classification"), {"words": [], "tags": []}, "no words"),
        (Columns("generation"), {"messages": CHAT[:1]}, "last turn of messages is not the assistant's"),
        (Columns("generation"), {"messages": CHAT[1:]}, "nothing but an answer"),
        (Columns("generation"), {"messages": [{"role": "user"}]}, "Write {"),
        (Columns("generation"), {"prompt": "", "completion": "b"}, "'prompt' is empty"),
        (Columns("generation"), {"prompt": "a", "completion": " "}, "'completion' is empty"),
        (Columns("multiple_choice"), {"prompt": "a", "options": ["x"], "answer": 0}, "Give two to 26"),
        (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "y"], "answer": 2}, "its index from 0"),
        (Columns("multiple_choice"), {"prompt": "a", "options": 3, "answer": 2}, "not a list of strings"),
        (Columns("multi_label"), {"text": "a", "labels": [0, 1, 1, 0]}, "a mark for each label"),
        (Columns("generation"), {"prompt": "a", "completion": ["b"]}, "not a string"),
        (Columns("generation"), {"text": "a", "note": "b"}, "say which hold the prompt"),
        (Columns("generation", text="Q: {q}", label="a"), {"q": None, "a": "x"}, "does not fit"),
        (Columns("multiple_choice"), {"prompt": "a", "options": ["x", "x"], "answer": 0}, "not all different"),
        (Columns("multiple_choice"), {"prompt": "a", "options": ["x", ""], "answer": 0}, "one is empty"),
        (Columns("token_classification"), {"words": ["a", " "], "tags": ["O", "O"]}, "an empty word"),
    ],
)
def test_what_a_row_cannot_say(columns: Columns, row: dict, reason: str):
    with pytest.raises(RowError, match=reason.replace("{", r"\{")):
        columns.example(row)


LEAVES = st.none() | st.booleans() | st.floats() | st.text()


@given(st.dictionaries(st.text(max_size=20), st.recursive(LEAVES, st.lists, max_leaves=12), max_size=10))
@pytest.mark.parametrize("kind", KINDS)
def test_any_row_is_an_example_or_a_row_error(kind: str, row: dict):
    defaults = dict.fromkeys(("text", "label", "labels", "prompt", "options", "answer", "words", "tags"))
    for given_row in (row, dict(zip(defaults, row.values(), strict=False))):
        try:
            text, label = Columns(kind).example(given_row)
        except RowError:
            continue
        assert text is not None and (label is None or isinstance(label, str | tuple | float | int))


def test_bad_rows_stop_or_are_counted(tmp_path: Path):
    lines = ['{"text": "a", "label": "x"}', "{", '{"text": "", "label": "x"}', '{"text": "b", "label": "y"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: bad JSON"):
        examples(read_rows(tmp_path / "a.jsonl"), Columns())
    found, faults = examples(read_rows(tmp_path / "a.jsonl"), Columns(), skip=True)
    assert list(found.texts) == ["a", "b"]
    assert [fault.split(": ")[0].rsplit(":", 1)[1] for fault in faults] == ["2", "3"]
    (tmp_path / "b.jsonl").write_text("{\n[")
    with pytest.raises(ValueError, match="no row can be used"):
        examples(read_rows(tmp_path / "b.jsonl"), Columns(), skip=True)


def test_odd_cells_are_faults_of_their_own_line(tmp_path: Path):
    lines = [
        '{"text": "a \\ud83d b", "label": "x"}',
        f'{{"text": "a", "label": {"9" * 5000}}}',
        '{"text": "a", "label": "x"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [bool(record.fault) for record in read_rows(tmp_path / "a.jsonl")] == [True, True, False]
    (tmp_path / "a.csv").write_text(f"text,label\n{'long ' * 40_000},x\n")
    assert [record.fault for record in read_rows(tmp_path / "a.csv")] == [""]
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="two columns have one name"):
        list(read_rows(tmp_path / "b.csv"))


def test_the_same_rows_in_every_kind_of_file(tmp_path: Path):
    rows = [{"text": "naïve, yes", "label": "pos"}, {"text": "no", "label": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text('text,label\n"naïve, yes",pos\nno,\n')
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    found = [examples(read_rows(tmp_path / f"a.{kind}"), Columns())[0] for kind in ("jsonl", "csv", "parquet")]
    found.append(examples(read_dataset(str(tmp_path / "saved"), "train"), Columns())[0])
    found.append(examples(of_dataset(dataset), Columns())[0])
    for one in found:
        assert list(one.texts) == ["naïve, yes", "no"] and list(one.labels) == ["pos", None]


def test_class_labels_become_names_and_minus_one_is_missing():
    features = datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"]),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
    })  # fmt: skip
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [1]]}
    records = list(of_dataset(datasets.Dataset.from_dict(rows, features)))
    assert [record.row["label"] for record in records] == ["pos", None]
    assert records[0].row["tags"] == ["O", "B-X"]


@pytest.mark.parametrize(("name", "split"), [("saved", "nope"), ("nobody/nothing", "train")])
def test_a_data_set_that_is_not_there(tmp_path: Path, name: str, split: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "saved")
    place = str(tmp_path / name) if name == "saved" else name
    with pytest.raises(ValueError, match=r"cannot be loaded.*save_to_disk"):
        list(read_dataset(place, split))
