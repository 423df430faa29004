import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tiny
from polyrank.corpus import Corpus
from polyrank.mixing import Mixing, Proportional
from polyrank.reader import HeadReader
from polyrank.tasks import MISSING, Examples, Row

BATCHES = ("mixed", "one_task")
SAMPLING = ("proportional", "temperature", "uniform", "exponential")
LENGTHS = st.lists(st.lists(st.integers(1, 64), max_size=40), min_size=1, max_size=4).filter(any)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.integers(1, 5))
def test_every_example_once_per_epoch(lengths, batch_size, seed, window):
    sampler = Proportional(lengths, batch_size, seed, window)
    everything = sorted((t, i) for t, of_task in enumerate(lengths) for i in range(len(of_task)))
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.batch(step) for step in steps]
        assert sorted(pick for batch in batches for pick in batch) == everything
        assert {len(b) for b in batches} <= {len(everything) // len(batches), -(-len(everything) // len(batches))}
        assert max(map(len, batches)) <= batch_size


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 200), min_size=1, max_size=9))
@pytest.mark.parametrize("mixing", [Mixing(sampling=s, batches=b) for s in SAMPLING for b in BATCHES], ids=str)
def test_a_step_is_a_pure_function_of_seed_and_step(mixing, lengths, batch_size, seed, steps):
    def fresh():
        return mixing.sampler(lengths, batch_size, seed)

    used = fresh()
    assert [used.batch(step) for step in steps] == [fresh().batch(step) for step in steps]


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 33), st.integers(0, 50), st.integers(1, 6))
def test_parts_are_disjoint_and_make_the_whole(lengths, batch_size, step, parts):
    sampler = Proportional(lengths, batch_size, 0)
    pieces = [sampler.batch(step, part, parts) for part in range(parts)]
    assert sorted(pick for piece in pieces for pick in piece) == sorted(sampler.batch(step))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_seeds_and_epochs_differ():
    lengths = [[5] * 100]
    sampler = Proportional(lengths, 10, 0)
    assert sampler.batch(0) != sampler.batch(sampler.steps_per_epoch)
    assert sampler.batch(0) != Proportional(lengths, 10, 1).batch(0)


def padding(lengths, window: int, parts: int) -> float:
    sampler = Proportional(lengths, 32, 0, window)
    slices = [sampler.batch(step, part, parts) for step in range(sampler.steps_per_epoch) for part in range(parts)]
    sizes = [[lengths[t][i] for t, i in picks] for picks in slices]
    return 1 - sum(map(sum, sizes)) / sum(max(size) * len(size) for size in sizes)


def test_parts_of_similar_length_save_padding_and_a_window_saves_more():
    rng = torch.Generator().manual_seed(0)
    lengths = [torch.randint(4, 65, (2000,), generator=rng).tolist()]
    assert padding(lengths, 1, 1) > 0.4
    assert padding(lengths, 1, 4) < 0.22
    assert padding(lengths, 16, 1) < 0.06


def test_a_step_mixes_tasks_of_different_lengths():
    sampler = Proportional([[60] * 500, [10] * 500], 32, 0)
    for step in range(20):
        assert 4 < sum(t for t, _ in sampler.batch(step)) < 28


@pytest.mark.parametrize("batches", ["mixed", "one_task"])
@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"sampling": "proportional"}, 0.9),
        ({"sampling": "temperature", "temperature": 1.0}, 0.9),
        ({"sampling": "temperature", "temperature": 2.0}, 0.75),  # sqrt(900) : sqrt(100) is 3 : 1
        ({"sampling": "temperature", "temperature": float("inf")}, 0.5),
        ({"sampling": "uniform"}, 0.5),
        ({"sampling": "exponential"}, math.exp(0.9) / (math.exp(0.9) + math.exp(0.1))),
    ],
)
def test_the_share_of_each_task_is_what_the_rule_says(batches: str, fields: dict, share: float):
    lengths = [[1] * 900, [1] * 100, []]
    sampler = Mixing(batches=batches, length_window=4, **fields).sampler(lengths, 50 if batches == "mixed" else 2, 0)
    steps = [[t for t, _ in sampler.batch(step)] for step in range(100 if batches == "mixed" else 2400)]
    drawn = [t for step in steps for t in step]
    assert 2 not in drawn
    assert drawn.count(0) / len(drawn) == pytest.approx(share, abs=0.03)
    if batches == "one_task":
        assert all(len(set(step)) == 1 for step in steps)


def test_a_temperature_below_one_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Mixing(sampling="temperature", temperature=0.5)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="training data"):
        Proportional([[], []], 4, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collation_pads_to_the_longest_on_the_right_whatever_the_tokenizer_says(side: str):
    tasks = tiny.tasks()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    texts = Examples(["cat", "the dog is very good " * 9], ["cat", None])
    corpus = Corpus.of(tasks, {"pet": texts, "mood": Examples(["bad"], ["bad"])}, HeadReader(tokenizer, 8, "right"))
    batch = corpus.collate([(1, 0), (1, 1), (0, 0)])
    tokenizer.padding_side = "right"
    expected = tokenizer([*texts.texts, "bad"], truncation=True, max_length=8, padding="longest", return_tensors="pt")
    assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(batch.inputs["attention_mask"], expected["attention_mask"])
    assert batch.task_ids.tolist() == [1, 1, 0]
    assert {name: own.tolist() for name, own in batch.labels.items()} == {"pet": [0, MISSING], "mood": [0]}


def test_by_length_holds_everything_once_longest_first():
    rows = [[Row([1] * 3), Row([1] * 9)], [Row([1] * 5)]]
    corpus = Corpus(tiny.tasks(), rows, HeadReader(tiny.tokenizer(), 16, "right"))
    assert corpus.by_length(2) == [[(0, 1), (1, 0)], [(0, 0)]]
