"""Six text classification sets and one of multiple choice, out of the pinned archives of :mod:`polyrank.assets`.

Splits are honest: no text of the test side stands on the train side. Texts are compared without regard to case and
white space. Order, splits and samples come from SHA-256 of the content, so they are the same on every machine and
every Python, and a smaller sample is the beginning of a larger one with the same seed.
"""

import csv
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

from polyrank.assets import EVALS, ORANGE, VADER, AssetError, fetch
from polyrank.tasks import Examples, Label, Text, plain

Row = tuple[Text, Label, str]  # text, label, and the source that must not be torn apart by a split


@dataclass(frozen=True)
class TextSplits:
    """A data set in two sides.

    ``classes`` are the labels of the whole set, sorted, also where a small sample lacks one; ``kind`` is the type of
    task. ``dropped`` counts the rows that were left out before splitting, by reason.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    kind: str = "classification"


def newsgroups() -> TextSplits:
    """20 Newsgroups, 20 classes, 11,293 + 7,528 rows as published (letters only, lower case, subject first).

    The published test side is kept as it is; 7 train rows whose text stands in it are dropped.
    """
    return _published("newsgroups", "20newsgroups")


def r8() -> TextSplits:
    """Reuters-21578 R8, 8 classes, 5,485 + 2,189 rows as published (letters only, lower case).

    The published test side is kept as it is; 5 train rows whose text stands in it are dropped.
    """
    return _published("r8", "reuters-r8")


def tweets() -> TextSplits:
    """Who sent it: 6,444 tweets of the two candidates of the 2016 US election, retweets included.

    URLs are removed: their form gives the author away. Tweets that are nothing but a URL are dropped.
    """
    rows = [(re.sub(r"https?://\S+", "", text).strip(), author) for text, author in _orange("election-tweets-2016")]
    return _split("tweets", [(text, author, text) for text, author in rows])


def sarcasm() -> TextSplits:
    """News headlines, 28,614 rows: ``sarcastic`` or ``not sarcastic``."""
    names = {"1": "sarcastic", "0": "not sarcastic"}
    with zipfile.ZipFile(fetch(EVALS)) as archive:
        lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    pairs = [(row["input"][-1]["content"], names[row["ideal"]]) for row in rows]
    return _split("sarcasm", [(text, label, text) for text, label in pairs])


def movies() -> TextSplits:
    """Movie-review sentences, 10,605 rows, ``positive`` or ``negative`` where abs(mean human rating) > 0.5.

    The file numbers its rows and names no review, so no split by review is possible. Neighbouring rows share
    capitalised words about as rarely as distant ones, so the rows do not stand together by review: they are split
    one by one. Sentences about one film may stand on both sides.
    """
    return _split("movies", [(text, label, text) for _, text, label in _rated("movieReviewSnippets")])


def nyt() -> TextSplits:
    """New York Times editorial sentences, 5,190 rows, ``positive`` or ``negative`` where abs(mean human rating) > 0.5.

    Row ids are ARTICLE_SENTENCE, with 498 articles: the split is by article, none stands on both sides.
    """
    return _split("nyt", [(text, label, row.split("_")[0]) for row, text, label in _rated("nytEditorialSnippets")])


def socialiqa() -> TextSplits:
    """Social IQa, 2,224 questions of its test side with three answers each; label: the index of the right one.

    Source: Sap et al., EMNLP 2019, https://arxiv.org/abs/1904.09728. The split is by context: no situation stands on
    both sides. Rows that do not read "context and question A: ...; B: ...; C: ...." are dropped.
    """
    with zipfile.ZipFile(fetch(EVALS)) as archive:
        lines = archive.read("evals/registry/data/theory_of_mind/socialiqa/test.jsonl").decode().splitlines()
    raw = [json.loads(line) for line in lines if line.strip()]
    rows: list[Row] = []
    for row in raw:
        parts = re.fullmatch(r"(.+?) A: (.+?); B: (.+?); C: (.+?)\.?", row["input"][-1]["content"].strip(), re.DOTALL)
        if parts is not None:
            question, *options = (part.strip() for part in parts.groups())
            context = re.split(r"(?<=[.!?]) ", question)[0]
            rows.append(((question, tuple(options)), "ABC".index(row["ideal"]), context))
    splits = _split("socialiqa", rows)
    dropped = {**splits.dropped, **({"unreadable": len(raw) - len(rows)} if len(raw) > len(rows) else {})}
    return replace(splits, kind="multiple_choice", classes=(), dropped=dropped)


def as_rows(examples: Examples) -> list[dict[str, Any]]:
    """Examples as rows with the columns ``text`` and ``label``, and for multiple choice ``prompt``, ``options``,
    ``answer``: for tasks of another type on the same data.
    """
    return [
        {"text": text, "label": label}
        if isinstance(text, str)
        else {"prompt": text[0], "options": list(text[1]), "answer": label}
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]


DATASETS: Mapping[str, Callable[[], TextSplits]] = {
    "newsgroups": newsgroups,
    "r8": r8,
    "tweets": tweets,
    "sarcasm": sarcasm,
    "movies": movies,
    "nyt": nyt,
    "socialiqa": socialiqa,
}


def load(name: str, max_train: int = 4000, max_test: int = 500, seed: int = 0) -> TextSplits:
    """A data set of :data:`DATASETS`, with a seeded sample of at most ``max_train`` and ``max_test`` rows.

    ``seed`` picks and orders the samples; the split itself never changes. The archives are fetched on the first call.

    Raises:
        ValueError: an unknown name, or a negative size.
        AssetError: the archive cannot be had, see :func:`polyrank.assets.fetch`.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: the known ones are {', '.join(DATASETS)}")
    if max_train < 0 or max_test < 0:
        raise ValueError(f"sizes are 0 or more, not max_train={max_train}, max_test={max_test}")
    splits = DATASETS[name]()
    train = _sample(splits.train, max_train, f"train:{seed}")
    return replace(splits, train=train, test=_sample(splits.test, max_test, f"test:{seed}"))


def _published(name: str, stem: str) -> TextSplits:
    """A set with its own sides: only train rows whose text stands in the test side go."""
    train, test = _orange(f"{stem}-train"), _orange(f"{stem}-test")
    seen = {plain(text) for text, _ in test}
    kept = [(text, label) for text, label in train if plain(text) not in seen]
    dropped = {"train rows whose text is in the test side": len(train) - len(kept)}
    return _splits(name, kept, test, dropped)


def _split(name: str, rows: list[Row], test_share: float = 0.2) -> TextSplits:
    """A fixed split by source of a set without its own; one row per text, none where its labels disagree."""
    labels: dict[str, set[Label]] = {}
    for text, label, _ in rows:
        labels.setdefault(plain(text), set()).add(label)
    kept: dict[str, Row] = {}
    dropped = {"empty text": 0, "same text, other label": 0, "duplicate text": 0}
    for row in rows:
        key = plain(row[0])
        if not key:
            dropped["empty text"] += 1
        elif len(labels[key]) > 1:
            dropped["same text, other label"] += 1
        elif key in kept:
            dropped["duplicate text"] += 1
        else:
            kept[key] = row
    sources = sorted({source for _, _, source in kept.values()}, key=lambda source: _rank("split", source))
    held_out = set(sources[: round(test_share * len(sources))])
    train = [(text, label) for text, label, source in kept.values() if source not in held_out]
    test = [(text, label) for text, label, source in kept.values() if source in held_out]
    return _splits(name, train, test, dropped)


def _splits(
    name: str, train: Sequence[tuple[Text, Label]], test: Sequence[tuple[Text, Label]], dropped: dict[str, int]
) -> TextSplits:
    classes = tuple(sorted({str(label) for _, label in [*train, *test]}))
    counts = {reason: count for reason, count in dropped.items() if count}
    return TextSplits(name, _examples(train), _examples(test), classes, counts)


def _sample(examples: Examples, size: int, salt: str) -> Examples:
    """At most ``size`` rows in an order that is a pure function of salt and content (ties keep their order)."""
    return examples.select(sorted(range(len(examples)), key=lambda i: _rank(salt, _content(examples.texts[i])))[:size])


def _content(text: Text) -> str:
    return text if isinstance(text, str) else plain(text)


def _examples(pairs: Sequence[tuple[Text, Label]]) -> Examples:
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


def _rank(salt: str, content: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{content}".encode()).digest()


def _orange(table: str) -> list[tuple[str, str]]:
    """(text, label) of an Orange table: tab-separated, three header rows (names, types, roles)."""
    columns = ("Content", "Author") if table.startswith("election") else ("Text", "Category")
    with zipfile.ZipFile(fetch(ORANGE)) as archive:
        content = archive.read(f"orangecontrib/text/datasets/{table}.tab").decode()
    header, _types, _roles, *rows = csv.reader(io.StringIO(content, newline=""), delimiter="\t")
    text, label = map(header.index, columns)
    return [(row[text], row[label]) for row in rows if row]  # a blank line may end the table


def _rated(table: str) -> Iterable[tuple[str, str, str]]:
    """(row id, text, label) of a file with the columns id, mean rating in [-4, 4], text; near-neutral rows go."""
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(fetch(VADER)) as outer,
        tarfile.open(fileobj=_member(outer, f"vaderSentiment-3.3.2/{inner}")) as tar,
    ):
        lines = _member(tar, f"hutto_ICWSM_2014/{table}_GroundTruth.txt").read().decode().split("\n")
    for row, rating, text in (line.rstrip("\r").split("\t", 2) for line in lines if line.strip()):
        if abs(float(rating)) > 0.5:
            yield row, text, "positive" if float(rating) > 0 else "negative"


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    if file is None:
        raise AssetError(f"{archive.name}: {name} is not a file: the manifest of Polyrank is wrong, please report it")
    return file
