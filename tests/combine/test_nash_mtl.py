"""Nash-MTL solves its bargaining equation, or keeps what it had."""

import math

import pytest
import torch

from combine.steps import jacobian, step_of, vector
from polyrank.combine import NashMTL


def residual(gram: torch.Tensor, weights: torch.Tensor) -> float:
    return float((weights * (gram @ weights) - 1).abs().max())


def test_solves_well_posed_systems():
    """1,000 systems of 2 to 20 tasks, gradient lengths over four orders of magnitude, half of them correlated."""
    worst = 0.0
    for seed in range(1000):
        tasks = 2 + seed % 19
        rows = jacobian(seed, tasks, 3 * tasks, spread=2)
        if seed % 2:
            rows = rows / rows.norm(dim=1, keepdim=True)
            rows = (rows + 0.5 * rows[0]) * jacobian(seed, tasks, 1, spread=2)  # also of opposite signs
        weights = NashMTL().weights(step := step_of(rows), {})
        assert (weights > 0).all()
        worst = max(worst, residual(step.gram, weights))
    assert worst < 1e-6, worst


def test_ill_posed_systems_meet_the_tolerance_or_keep_weights():
    solved = 0
    for seed in range(200):
        tasks = 2 + seed % 19
        rows = jacobian(seed, tasks, 3 * tasks)
        rows[1] = -rows[0] * 3 + 10.0 ** -(1 + seed % 12) * rows[1]  # all but opposed
        state = {"weights": torch.full((tasks,), 7.0, dtype=torch.float64)}
        weights = NashMTL().weights(step := step_of(rows), state)
        if (weights == 7).all():
            assert (state["weights"] == 7).all()
        else:
            solved += 1
            assert residual(step.gram, weights) <= NashMTL().tolerance
    assert 40 < solved < 140  # all have a solution; beyond 1 + cos = 1e-9 or so M's own rounding hides it


def test_two_tasks_in_closed_form():
    """For lengths p and q at angle c: symmetric in the unit gradients, so b^2 (1 + c) = 1 and a = b / length."""
    p, q, c = 3.0, 0.2, -0.6
    rows = torch.stack([vector(p, 0), vector(q * c, q * math.sqrt(1 - c * c))])
    b = 1 / math.sqrt(1 + c)
    torch.testing.assert_close(NashMTL().weights(step_of(rows), {}), vector(b / p, b / q), rtol=1e-12, atol=0)


def test_a_task_scaled_is_weighed_by_the_inverse_and_the_update_has_length_sqrt_t():
    rows, scale = jacobian(0, 5), vector(1, 10, 1e-4, 3e5, 0.5)
    plain, scaled = (NashMTL().weights(step_of(r), {}) for r in (rows, rows * scale[:, None]))
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-9, atol=0)
    assert float((plain @ rows).norm()) == pytest.approx(math.sqrt(5))


def test_weights_are_kept_between_updates():
    combiner, state = NashMTL(update_every=3), {}
    found = [combiner.weights(step_of(jacobian(n, 4), number=n), state) for n in range(7)]
    assert all(torch.equal(found[n], found[n - n % 3]) for n in range(7))
    assert not torch.allclose(found[0], found[3]) and not torch.allclose(found[3], found[6])
    every = NashMTL().weights(step_of(jacobian(3, 4), number=3), {})
    assert torch.equal(found[3], every)


def test_a_task_first_seen_between_updates_is_solved_for_at_once():
    combiner, state, rows = NashMTL(update_every=10), {}, jacobian(0, 3)
    combiner.weights(step_of(rows, live=torch.tensor([True, True, False])), state)
    weights = combiner.weights(step_of(rows, number=1), state)
    torch.testing.assert_close(weights, NashMTL().weights(step_of(rows), {}))


def test_opposed_gradients_keep_the_previous_weights():
    opposed = torch.stack([vector(1, 0), vector(-2, 0)])
    combiner, state = NashMTL(), {}
    before = combiner.weights(step_of(jacobian(0, 2)), state)
    kept = {name: value.clone() for name, value in state.items()}
    assert torch.equal(combiner.weights(step_of(opposed, number=1), state), before)
    assert torch.equal(state["weights"], kept["weights"])
    torch.testing.assert_close(combiner.weights(step_of(opposed), {}), vector(1, 0.5))  # none yet: 1 / length


def test_a_gradient_of_zero_has_no_part_in_the_bargain():
    rows = jacobian(0, 4)
    rows[2] = 0
    weights = NashMTL().weights(step_of(rows), {})
    assert weights[2] == 0
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(weights[others], NashMTL().weights(step_of(rows[others]), {}))
    assert (NashMTL().weights(step_of(torch.zeros(3, 2, dtype=torch.float64)), {}) == 0).all()
