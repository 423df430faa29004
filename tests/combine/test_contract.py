"""What every combiner keeps to, whatever its formula."""

import math

import pytest
import torch

import polyrank.combine
from combine.steps import combiner, jacobian, step_of, vector
from polyrank.combine import COMBINERS, Combiner, State, Step
from polyrank.combine.base import PerTask

NAMES = sorted(COMBINERS)
NAN = float("nan")


def nth(number: int, tasks: int = 4, seed: int = 0) -> Step:
    """A step of a run in which one task or another is not live now and then."""
    rows, generator = jacobian(100 + number, tasks), torch.Generator().manual_seed(number)
    losses = torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.1
    live = torch.ones(tasks, dtype=torch.bool)
    if number % 3 == 1:
        live[number % tasks] = False
    return step_of(rows * live[:, None], losses * live, live, number, seed)


def run(each: Combiner, state: State, numbers: range) -> list[torch.Tensor]:
    """As the loop does: weights, the step, what the step showed, and now and then the scores."""
    found = []
    for number in numbers:
        step = nth(number)
        found.append(each.weights(step, state))
        each.after(step, step.losses * 0.9 if each.looks_again else step.losses, state)
        if number % 2:
            each.scored({task: 0.1 * number + i / 40 for i, task in enumerate(step.tasks)}, state)
    return found


def cloned(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_combiner_is_listed():
    listed = {name for name, kind in vars(polyrank.combine).items() if kind in COMBINERS.values()}
    assert {kind.__name__ for kind in COMBINERS.values()} == listed
    assert len(COMBINERS) == len(listed) == 15


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_equal(name: str):
    whole, half = {}, {}
    straight = run(combiner(name), whole, range(8))
    first = run(combiner(name), half, range(5))
    resumed = run(combiner(name), saved := cloned(half), range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, first + resumed, strict=True))
    assert same(whole, saved)


@pytest.mark.parametrize("name", ["nash_mtl", "uncertainty", "dwa", "famo", "gradnorm", "achievement"])
def test_memory_lives_in_the_state(name: str):
    """Without the state the sixth step's weights would differ, for those that remember; and it is what can be saved."""
    each, state = combiner(name), {}
    each = type(each)(update_every=2) if name == "nash_mtl" else each
    run(each, state, range(5))
    step = nth(5)
    assert not torch.equal(each.weights(step, cloned(state)), each.weights(step, {}))
    assert all(value.dtype == torch.float64 and value.is_contiguous() for value in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_state_is_replaced_never_written_into(name: str):
    """A checkpoint may hold the tensors of an earlier step."""
    each, state = combiner(name), {}
    run(each, state, range(3))
    held, copy = dict(state), cloned(state)
    run(each, state, range(3, 6))
    assert same(held, copy)


@pytest.mark.parametrize("name", NAMES)
def test_only_live_tasks_count(name: str):
    """The weights are those of the live tasks alone, and 0 for the others, whose memory stays."""
    live = torch.tensor([True, False, True, True, False])
    rows, losses = jacobian(0, 5) * live[:, None], vector(1.2, 0, 0.4, 0.7, 0)
    step = step_of(rows, losses, live)
    state: State = {}
    weights = combiner(name).weights(step, state)
    assert weights.dtype == torch.float64 and (weights[~live] == 0).all()
    alone = Step(("a", "c", "d"), torch.ones(3, dtype=torch.bool), 0, 0, losses[live], step.gram[live][:, live])
    torch.testing.assert_close(weights[live], combiner(name).weights(alone, {}), rtol=1e-12, atol=0)

    run(combiner(name), state := {}, range(2))
    before, step = cloned(state), nth(4)  # its task 0 is not live
    assert not step.live[0]
    combiner(name).weights(step, state)
    combiner(name).after(step, step.losses, state)
    assert all(torch.equal(value[0], before[key][0]) for key, value in state.items() if value.ndim)


@pytest.mark.parametrize("bad", [NAN, math.inf, 1e308])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_leaves_the_state_alone(name: str, bad: float):
    each = combiner(name)
    for start in ({}, state := {}):
        if start is state:
            run(each, state, range(4))
        before, step = cloned(start), nth(5)
        gram, losses = step.gram.clone(), step.losses.clone()
        gram[1, 2] = gram[2, 1] = gram[2, 2] = losses[2] = bad
        broken = Step(step.tasks, step.live, step.number, 0, losses, gram)
        weights = each.weights(broken, start)
        assert weights.isfinite().all() and float(weights.sum()) > 0
        if bad == 1e308:  # finite itself, whatever comes of it
            continue
        each.after(broken, losses, start)
        each.after(step, losses, start)
        each.scored(dict.fromkeys(step.tasks, bad), start)
        assert same(start, before)
        if isinstance(each, PerTask):
            torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_of_a_task_that_is_not_live_is_not_looked_at(name: str):
    step = nth(4)
    gram, losses = step.gram.clone(), step.losses.clone()
    gram[0], gram[:, 0], losses[0] = NAN, NAN, NAN
    broken = Step(step.tasks, step.live, step.number, 0, losses, gram)
    assert torch.equal(combiner(name).weights(broken, {}), combiner(name).weights(step, {}))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_a_function_of_seed_step_and_state(name: str):
    a, b = (combiner(name).weights(nth(3, seed=5), {}) for _ in range(2))
    torch.rand(3)  # torch's own generator has no say
    assert torch.equal(a, b) and torch.equal(a, combiner(name).weights(nth(3, seed=5), {}))


# of a single task with a gradient of length 5 and a loss of 2: 1 but where the paper's value is another
SINGLE = {"nash_mtl": 1 / 5, "cagrad": 1.4, "uncertainty": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_one_task(name: str):
    step = step_of(torch.stack([vector(0, 0), vector(3, 4)]), vector(0, 2), torch.tensor([False, True]))
    torch.testing.assert_close(combiner(name).weights(step, {}), vector(0, SINGLE.get(name, 1.0)))


@pytest.mark.parametrize("name", NAMES)
def test_no_task(name: str):
    state: State = {}
    run(combiner(name), state, range(2))
    before = cloned(state)
    step = step_of(torch.zeros(4, 8, dtype=torch.float64), vector(0, 0, 0, 0), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(combiner(name).weights(step, state), vector(0, 0, 0, 0))
    combiner(name).after(step, step.losses, state)
    assert same(state, before)


HARD = {
    "all zero": torch.zeros(3, 4, dtype=torch.float64),
    "one zero": torch.stack([vector(1, 2, 0), vector(0, 0, 0), vector(-1, 1, 1)]),
    "copies": torch.stack([vector(1, 2, 0), vector(1, 2, 0), vector(-3, 1, 1)]),
    "opposed": torch.stack([vector(1, 2, 0), vector(-1, -2, 0), vector(0, 0, 1)]),
    "cancelling": torch.stack([vector(1, 0), vector(0, 1), vector(-1, -1)]),
    "all but opposed": torch.stack([vector(1, 1e-9), vector(-1, 1e-9)]),
    "far apart": torch.diag(vector(1e-140, 1.0, 1e140)),
    "one direction": torch.arange(-10, 10, dtype=torch.float64)[:, None] * vector(1, 2, 3),
    "twenty": jacobian(0, 20, 40),
    "twenty in five": jacobian(0, 20, 5),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", NAMES)
def test_hard_gradients_give_finite_weights(name: str, case: str):
    each, state = combiner(name), {}
    for number in range(2):
        step = step_of(HARD[case], number=number)
        assert each.weights(step, state).isfinite().all()
        each.after(step, step.losses, state)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_repr_is_the_combiner(name: str):
    each = combiner(name)
    assert eval(repr(each), dict(vars(polyrank.combine))) == each


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_setting_is_an_error(name: str):
    with pytest.raises(ValueError, match="learning_rate"):
        COMBINERS[name](learning_rate=1.0)


def test_noise_is_of_the_seed_and_the_step():
    draws = {torch.rand(1, generator=Step(("a",), torch.ones(1, dtype=torch.bool), number, seed).generator()).item()
             for number in range(5) for seed in range(5)}  # fmt: skip
    assert len(draws) == 25
