"""The combiners of gradients agree with torchjd's, with twins on explicit vectors, and with what defines them."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchjd.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    IMTLGWeighting,
    MGDAWeighting,
    PCGradWeighting,
    UPGradWeighting,
)
from torchjd.linalg import QuadprogProjector

from combine.steps import jacobian, step_of, vector
from polyrank.combine import IMTLG, MGDA, AlignedMTL, CAGrad, PCGrad, UPGrad

SEEDS = range(60)


def rows_of(seed: int) -> torch.Tensor:
    """2 to 13 gradients that are independent; every other case pulled to its mean, so that conflicts vary."""
    rows = jacobian(seed, 2 + seed % 12)
    return rows + 0.3 * rows.mean(0) if seed % 2 else rows


def length(gram: torch.Tensor, weights: torch.Tensor) -> float:
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))


# any gradients at all: more tasks than dimensions, copies, opposed pairs, zeros
@st.composite
def gradients(draw):
    tasks, width = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    rows = jacobian(draw(st.integers(0, 10**6)), tasks, width)
    for row in range(1, tasks):
        match draw(st.sampled_from(["own"] * 5 + ["copy", "opposed", "zero"])):
            case "copy":
                rows[row] = rows[row - 1]
            case "opposed":
                rows[row] = -2 * rows[row - 1]
            case "zero":
                rows[row] = 0
    return rows


anything = settings(deadline=None, max_examples=150)


@pytest.mark.parametrize("seed", SEEDS)
def test_mgda_and_frank_wolfe(seed: int):
    """theirs approaches the minimum at a rate of 1 / rounds; on two tasks its first line search is exact."""
    step = step_of(rows_of(seed))
    ours = MGDA().weights(step, {})
    theirs = MGDAWeighting(epsilon=1e-12, max_iters=1000)(step.gram)
    assert length(step.gram, ours) <= length(step.gram, theirs) * (1 + 1e-12)
    if len(ours) == 2:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # the bound of Frank-Wolfe: |g|^2 is within 2 * diameter^2 / (rounds + 2), and so is |g - g*|^2
    pairs = step.gram.diagonal() + step.gram.diagonal()[:, None] - 2 * step.gram
    assert length(step.gram, ours - theirs) ** 2 <= 2 * float(pairs.max()) / 1002


@anything
@given(gradients())
def test_mgda_is_the_nearest_point_of_the_hull(rows: torch.Tensor):
    """No gradient has less along d than d itself: the condition of the minimum, sufficient since it is convex."""
    weights = MGDA().weights(step := step_of(rows), {})
    assert (weights >= 0).all() and float(weights.sum()) == pytest.approx(1)
    squared = weights @ step.gram @ weights
    assert float((squared - step.gram @ weights).max()) <= 1e-10 * float(step.gram.diagonal().max())


def pcgrad_on_vectors(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Algorithm 1 of the paper, with the gradients themselves."""
    total = torch.zeros_like(rows[0])
    for task in range(len(rows)):
        v = rows[task].clone()
        for other in torch.randperm(len(rows), generator=generator).tolist():
            if other != task and v @ rows[other] < 0:
                v -= (v @ rows[other]) / rows[other].norm() ** 2 * rows[other]
        total += v
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_pcgrad(seed: int):
    rows = rows_of(seed)
    step = step_of(rows, number=seed)
    ours = PCGrad().weights(step, {})
    # both draw one permutation a task, theirs from torch's own generator: with its seed the orders are the same
    with torch.random.fork_rng():
        torch.manual_seed(step.generator().initial_seed())
        torch.testing.assert_close(ours, PCGradWeighting()(step.gram), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours @ rows, pcgrad_on_vectors(rows, step.generator()), rtol=1e-10, atol=1e-10)


def test_pcgrad_orders_vary_with_the_step_and_the_seed():
    rows = jacobian(3, 8, 4)
    found = {tuple(PCGrad().weights(step_of(rows, number=n, seed=s), {}).tolist()) for n in (0, 1) for s in (0, 1)}
    assert len(found) == 4


def cagrad_value(rows: torch.Tensor, d: torch.Tensor) -> float:
    return float((rows @ d).min())


@pytest.mark.parametrize("c", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("seed", SEEDS[::2])
def test_cagrad(seed: int, c: float):
    """theirs has Clarabel stop at a gap of 1e-8; d is about the root of that away, 2e-4 at most as measured."""
    rows = rows_of(seed)
    step, mean = step_of(rows), rows.mean(0)
    ours, theirs = CAGrad(c=c).weights(step, {}), CAGradWeighting(c=c, norm_eps=0.0)(step.gram)
    assert length(step.gram, ours - theirs) <= 1e-3 * float(mean.norm())
    assert cagrad_value(rows, ours @ rows) >= cagrad_value(rows, theirs @ rows) - 1e-7 * float(rows.norm() ** 2)


@anything
@given(gradients(), st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_is_in_the_ball_and_no_direction_there_serves_the_worst_task_better(rows: torch.Tensor, c: float):
    """Also of dependent gradients: for every x in the simplex, g_x . g_0 + c |g_0| |g_x| bounds what d reaches."""
    step, mean = step_of(rows), rows.mean(0)
    weights = CAGrad(c=c).weights(step, {})
    d, radius, scale = weights @ rows, c * float(mean.norm()), float(rows.norm()) ** 2
    assert float((d - mean).norm()) <= radius + 1e-6 * math.sqrt(scale)  # a length is known to the root of rounding
    pull = weights - 1 / len(weights)
    assert float(pull.min()) >= -1e-12
    candidates = [MGDA().weights(step, {})] + [pull / pull.sum()] * bool(pull.sum() > 1e-9)
    bounds = [float(x @ rows @ mean) + radius * float((x @ rows).norm()) for x in candidates]
    assert cagrad_value(rows, d) >= min(bounds) - 1e-7 * scale


def test_cagrad_where_the_pull_is_zero():
    """Two opposed tasks, and one across them that the mean serves: 0 / 0 in the paper's formula, 0 in torchjd."""
    rows = torch.stack([vector(1, 0), vector(-1, 0), vector(0, 1)])
    torch.testing.assert_close(CAGrad().weights(step_of(rows), {}) @ rows, vector(0, 1 / 3))
    assert (CAGradWeighting(c=0.4)(rows @ rows.T) == 0).all()


def test_cagrad_in_one_dimension():
    """g = 1 and -1/2: mean 1/4, ball [0.15, 0.35], and the second task is served best by 0.15."""
    rows = torch.stack([vector(1.0), vector(-0.5)])
    torch.testing.assert_close(CAGrad(c=0.4).weights(step_of(rows), {}) @ rows, vector(0.15))


@pytest.mark.parametrize("seed", SEEDS)
def test_imtl_g(seed: int):
    rows = rows_of(seed)
    weights = IMTLG().weights(step := step_of(rows), {})
    torch.testing.assert_close(weights, IMTLGWeighting()(step.gram), rtol=1e-9, atol=1e-9)
    along = rows @ (weights @ rows) / rows.norm(dim=1)
    torch.testing.assert_close(along, along.mean().expand_as(along), rtol=1e-8, atol=1e-10)


def test_imtl_g_with_a_copy_has_torchjds_direction():
    """theirs inverts M, ours the cosines: with dependent gradients only the direction is the same."""
    rows = jacobian(1, 4)
    rows = torch.cat([rows, 3 * rows[:1]])
    ours, theirs = IMTLG().weights(step := step_of(rows), {}) @ rows, IMTLGWeighting()(step.gram) @ rows
    assert float(ours @ theirs / (ours.norm() * theirs.norm())) == pytest.approx(1, abs=1e-12)
    along = rows @ ours / rows.norm(dim=1)
    torch.testing.assert_close(along, along.mean().expand_as(along), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_aligned_mtl(seed: int):
    rows = rows_of(seed)
    weights = AlignedMTL().weights(step := step_of(rows), {})
    torch.testing.assert_close(weights, AlignedMTLWeighting()(step.gram), rtol=1e-9, atol=1e-12)
    # by the singular values of the gradients themselves
    u, singular, v = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(weights @ rows, (singular.min() * u @ v).mean(0), rtol=1e-8, atol=1e-10)


def test_aligned_mtl_leaves_out_dependent_directions():
    rows = torch.cat([jacobian(1, 4), jacobian(1, 4)[:2]])
    step = step_of(rows)
    torch.testing.assert_close(AlignedMTL().weights(step, {}), AlignedMTLWeighting()(step.gram), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_upgrad(seed: int):
    """theirs regularises M by reg_eps of its trace, 1e-4 unless told: that much apart, the same without it."""
    step = step_of(rows_of(seed))
    ours = UPGrad().weights(step, {})
    exact = UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-13))(step.gram)
    assert length(step.gram, ours - exact) <= 1e-7 * length(step.gram, ours)


@anything
@given(gradients())
def test_upgrad_conflicts_with_no_task(rows: torch.Tensor):
    weights = UPGrad().weights(step_of(rows), {})
    assert (weights >= 1 / len(rows)).all()
    assert float((rows @ (weights @ rows)).min()) >= -1e-9 * float(rows.norm() ** 2)


@anything
@given(gradients())
def test_upgrad_projects_the_two_task_case_by_hand(rows: torch.Tensor):
    """For two tasks the projections are those of PCGrad, whose order does not matter then; UPGrad is their mean."""
    if len(rows) == 2:
        step = step_of(rows)
        d, sum_of_pcgrad = UPGrad().weights(step, {}) @ rows, PCGrad().weights(step, {}) @ rows
        torch.testing.assert_close(2 * d, sum_of_pcgrad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [MGDA, PCGrad, CAGrad, IMTLG, AlignedMTL, UPGrad])
def test_one_scale_for_all_gradients_changes_no_weight(kind):
    rows = jacobian(5, 6)
    plain = kind().weights(step_of(rows), {})
    for scale in (1e-9, 1e7):
        torch.testing.assert_close(kind().weights(step_of(scale * rows), {}), plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind, each", [(MGDA, 0.5), (PCGrad, 1.0), (IMTLG, 0.5), (AlignedMTL, 0.5), (UPGrad, 0.5)])
def test_orthogonal_gradients_of_one_length(kind, each: float):
    rows = torch.eye(2, dtype=torch.float64) * 3
    torch.testing.assert_close(kind().weights(step_of(rows), {}), vector(each, each))


def test_gradients_of_any_length_have_exact_solutions():
    """Lengths over twelve orders of magnitude: orthogonal, so MGDA's weights are as 1 / length^2."""
    lengths = vector(1e-6, 1e-3, 1, 1e6)
    weights = MGDA().weights(step_of(torch.diag(lengths)), {})
    torch.testing.assert_close(weights, lengths**-2 / (lengths**-2).sum(), rtol=1e-9, atol=0)
