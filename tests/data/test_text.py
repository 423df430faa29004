"""The built-in sets as they are in the archives."""

import pytest

from polyrank.data import DATASETS, load
from polyrank.data.text import TextSplits, _split
from polyrank.tasks import Text, plain

# name: (train, test, classes, dropped); train + test + dropped are the rows of the archive
EXPECTED = {
    "newsgroups": (11_286, 7_528, 20, 7),
    "r8": (5_480, 2_189, 8, 5),
    "tweets": (5_080, 1_270, 2, 94),
    "sarcasm": (22_798, 5_700, 2, 116),
    "movies": (8_033, 2_008, 2, 2),
    "nyt": (2_192, 559, 2, 37),
    "socialiqa": (1_762, 441, 0, 21),
}


def key(text: Text) -> str:
    return " ".join(text.casefold().split()) if isinstance(text, str) else plain(text)


@pytest.fixture(scope="module", params=list(DATASETS))
def splits(request: pytest.FixtureRequest) -> TextSplits:
    return DATASETS[request.param]()


def test_counts(splits: TextSplits):
    counts = len(splits.train), len(splits.test), len(splits.classes), sum(splits.dropped.values())
    assert counts == EXPECTED[splits.name]


def test_classes_stand_on_both_sides(splits: TextSplits):
    assert set(splits.train.labels) == set(splits.test.labels) == set(splits.classes or range(3))
    assert list(splits.classes) == sorted(splits.classes)


def test_no_test_text_stands_in_train(splits: TextSplits):
    assert not {key(t) for t in splits.train.texts} & {key(t) for t in splits.test.texts}


def test_texts_are_clean(splits: TextSplits):
    texts = [*splits.train.texts, *splits.test.texts]
    assert all(key(text).strip() for text in texts)
    assert not any("Ã" in str(text) or "\ufffd" in str(text) for text in texts), "decoded with the wrong encoding"
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
