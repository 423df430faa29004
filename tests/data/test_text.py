"""The six text sets as they are in the archives, and the errors of the file reader."""

from pathlib import Path

import pytest

from polyrank.data import DATASETS, load, read_file
from polyrank.data.text import TextSplits, _split

# name: (train, test, classes, dropped); train + test + dropped are the rows of the archive
EXPECTED = {
    "newsgroups": (11_286, 7_528, 20, 7),
    "r8": (5_480, 2_189, 8, 5),
    "tweets": (5_080, 1_270, 2, 94),
    "sarcasm": (22_798, 5_700, 2, 116),
    "movies": (8_033, 2_008, 2, 2),
    "nyt": (2_192, 559, 2, 37),
}


def key(text: str) -> str:
    return " ".join(text.casefold().split())


@pytest.fixture(scope="module", params=list(DATASETS))
def splits(request: pytest.FixtureRequest) -> TextSplits:
    return DATASETS[request.param]()


def test_counts(splits: TextSplits):
    counts = len(splits.train), len(splits.test), len(splits.classes), sum(splits.dropped.values())
    assert counts == EXPECTED[splits.name]


def test_classes_stand_on_both_sides(splits: TextSplits):
    assert set(splits.train.labels) == set(splits.test.labels) == set(splits.classes)
    assert list(splits.classes) == sorted(splits.classes)


def test_no_test_text_stands_in_train(splits: TextSplits):
    assert not {key(t) for t in splits.train.texts} & {key(t) for t in splits.test.texts}


def test_texts_are_clean(splits: TextSplits):
    texts = [*splits.train.texts, *splits.test.texts]
    assert all(text.strip() for text in texts)
    assert not any("Ã" in text or "\ufffd" in text for text in texts), "decoded with the wrong encoding"
    if splits.name == "tweets":
        assert not any("http" in text for text in texts), "a URL gives the author away"


def test_load_samples_by_seed():
    small, large, other = load("nyt", 50, 20), load("nyt", 100, 40), load("nyt", 50, 20, seed=1)
    assert (len(small.train), len(small.test)) == (50, 20)
    assert small == load("nyt", 50, 20)
    assert small.train.texts == large.train.texts[:50], "a smaller sample begins the larger one"
    assert small.test.texts == large.test.texts[:20]
    assert set(small.train.texts) != set(other.train.texts)
    assert small.classes == ("negative", "positive")
    assert len(load("nyt").train) == 2_192, "at most max_train"


def test_load_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown data set 'imdb'.*newsgroups"):
        load("imdb")
    with pytest.raises(ValueError, match="max_train=-1"):
        load("nyt", max_train=-1)


def test_split_keeps_sources_whole_and_does_not_depend_on_order():
    rows = [(f"text {i}", "ab"[i % 2], f"article {i // 5}") for i in range(100)]
    one, other = _split("made", rows), _split("made", rows[::-1])
    assert set(one.test.texts) == set(other.test.texts)
    assert len(one.test) == 20
    articles = [{int(t.split()[1]) // 5 for t in side.texts} for side in (one.train, one.test)]
    assert not articles[0] & articles[1]


def test_split_drops_and_counts():
    rows = [("A  b", "x", ""), ("a b", "x", ""), ("c", "x", ""), ("C", "y", ""), (" ", "x", ""), ("d", "y", "")]
    made = _split("made", rows, test_share=0)
    assert made.train.texts == ["A  b", "d"]
    assert made.dropped == {"duplicate text": 1, "same text, other label": 2, "empty text": 1}


GOOD = [("naïve, yes", "pos"), ("no", "0")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "naïve, yes", "label": "pos"}\n{"text": "no", "label": 0}\n'),
        ("a.jsonl", '\ufeff{"text": "naïve, yes", "label": "pos"}\r\n\r\n{"text": "no", "label": 0, "more": [1]}'),
        ("a.csv", 'text,label\n"naïve, yes",pos\nno,0\n'),
        ("a.CSV", '\ufefflabel,text\r\npos,"naïve, yes"\r\n\r\n0,no\r\n'),
    ],
)
def test_read_file(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_bytes(content.encode())
    read = read_file(tmp_path / name)
    assert list(zip(read.texts, read.labels, strict=True)) == GOOD


def test_read_file_takes_column_names_and_multiline_cells(tmp_path: Path):
    (tmp_path / "a.csv").write_text('body,y\n"two\nlines",1\n')
    assert read_file(tmp_path / "a.csv", text="body", label="y").texts == ["two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a", "label": "b"}\n{"text": "a"',
            r"a\.jsonl:2: bad JSON at column 13.*one JSON object",
        ),
        ("a.jsonl", b'["a", "b"]', r"a\.jsonl:1: expected an object, found list\. Write"),
        ("a.jsonl", b'{"text": "a", "y": "b"}', r"a\.jsonl:1: no column 'label', found 'text', 'y'\..*name yours"),
        ("a.jsonl", b'{"text": 3, "label": "b"}', r"a\.jsonl:1: 'text' is 3, not a string\. Put it in quotes"),
        ("a.jsonl", b'{"text": "a", "label": null}', r"a\.jsonl:1: 'label' is null\. Labels are"),
        ("a.jsonl", b'\n{"text": " ", "label": "b"}', r"a\.jsonl:2: 'text' is empty\. Fill it in"),
        ("a.jsonl", b"", r"a\.jsonl:1: no rows\. Write at least one"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": "b"}', r"a\.jsonl: not UTF-8 \(byte 0xe9\)\. Convert it"),
        ("a.csv", b"", r"a\.csv:1: no rows"),
        ("a.csv", b"text,label\n", r"a\.csv:1: no rows"),
        ("a.csv", b"text,y\na,b\n", r"a\.csv:1: no column 'label', found 'text', 'y'"),
        ("a.csv", b'text,label\n"two\nlines",b\na,b,c\n', r"a\.csv:4: 3 cells but 2 columns\. Quote"),
        ("a.csv", b"text,label\na,b\n,b\n", r"a\.csv:3: 'text' is empty"),
        ("a.csv", b'text,label\n"a" x,b\n', r"a\.csv:2: bad CSV: .*Close every quote"),
        ("a.parquet", b"x", r"a\.parquet: cannot read \.parquet\. Convert it to \.jsonl or \.csv"),
    ],
)
def test_read_file_errors_carry_the_cure(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


def test_read_file_without_a_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone\.csv"):
        read_file(tmp_path / "gone.csv")
