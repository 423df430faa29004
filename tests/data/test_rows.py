"""Your own files: what is read, and the errors of what cannot be."""

from pathlib import Path

import pytest

from polyrank.data import Columns, Examples, examples, read_rows


def read(path: Path, **columns: object) -> Examples:
    return examples(read_rows(path), Columns(**columns))[0]


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
    found = read(tmp_path / name)
    assert list(zip(found.texts, found.labels, strict=True)) == GOOD


def test_read_file_takes_column_names_and_multiline_cells(tmp_path: Path):
    (tmp_path / "a.csv").write_text('body,y\n"two\nlines",1\n')
    assert read(tmp_path / "a.csv", text="body", label="y").texts == ["two\nlines"]


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
        ("a.jsonl", b'{"text": "a", "label": 0.5}', r"a\.jsonl:1: 'label' is 0.5\. Labels are"),
        ("a.jsonl", b'\n{"text": " ", "label": "b"}', r"a\.jsonl:2: 'text' is empty\. Fill it in"),
        ("a.jsonl", b"", r"a\.jsonl:1: no rows\. Write at least one"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": "b"}', r"a\.jsonl: not UTF-8 \(byte 0xe9\)\. Convert it"),
        ("a.csv", b"", r"a\.csv:1: no rows"),
        ("a.csv", b"text,label\n", r"a\.csv:1: no rows"),
        ("a.csv", b"text,y\na,b\n", r"a\.csv:2: no column 'label', found 'text', 'y'"),
        ("a.csv", b'text,label\n"two\nlines",b\na,b,c\n', r"a\.csv:4: 3 cells but 2 columns\. Quote"),
        ("a.csv", b"text,label\na,b\n,b\n", r"a\.csv:3: 'text' is null, not a string"),
        ("a.csv", b'text,label\n"a" x,b\n', r"a\.csv:2: bad CSV: .*Close every quote"),
        ("a.parquet", b"x", r"a\.parquet: no readable Parquet file"),
        ("a.xls", b"x", r"a\.xls: cannot read \.xls\. Convert it to \.jsonl or \.csv or \.parquet"),
    ],
)
def test_read_file_errors_carry_the_cure(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_read_file_without_a_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone\.csv"):
        read(tmp_path / "gone.csv")
