"""Every weigher of losses does what its paper's formula gives by hand; what learns, also torch's autograd."""

import math

import pytest
import torch

from combine.steps import jacobian, step_of, vector
from polyrank.combine import COMBINERS, DWA, FAMO, GLS, RLW, Achievement, GradNorm, Step, Uncertainty, Uniform

# three steps of two tasks
LOSSES = [(2.0, 0.5), (1.0, 0.6), (0.8, 0.1)]


def close(weights: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(weights, vector(*expected), rtol=1e-12, atol=1e-14)


class AdamByHand:
    """Of one number, as in Algorithm 1 of its paper."""

    def __init__(self, start: float, lr: float) -> None:
        self.x, self.lr, self.m, self.v, self.t = start, lr, 0.0, 0.0, 0

    def step(self, gradient: float) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        corrected = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.x -= self.lr * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)


def test_uniform():
    for losses in LOSSES:
        close(Uniform().weights(step_of(losses=vector(*losses)), {}), 0.5, 0.5)


def test_rlw_is_the_softmax_of_the_steps_noise():
    seen = []
    for number in range(3):
        step = step_of(losses=vector(1, 2, 3), number=number, seed=4)
        noise = torch.randn(3, generator=step.generator(), dtype=torch.float64).tolist()
        total = sum(math.exp(z) for z in noise)
        seen.append(RLW().weights(step, {}))
        close(seen[-1], *(math.exp(z) / total for z in noise))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_rlw_is_as_random_as_it_says():
    """Over many steps log w_1 - log w_2 is N(0, 2); the bounds are at five standard errors."""
    many = torch.stack([RLW().weights(step_of(losses=vector(1, 1), number=n), {}) for n in range(2000)])
    difference = (many[:, 0] / many[:, 1]).log()
    assert abs(float(difference.mean())) < 5 * math.sqrt(2 / 2000)
    assert abs(float(difference.var()) - 2) < 5 * 2 * math.sqrt(2 / 2000)


def test_gls():
    """sqrt(2 * 0.5) = 1, so the weights are 1 / (2 L): 1/4 and 1."""
    close(GLS().weights(step_of(losses=vector(2, 0.5)), {}), 0.25, 1.0)
    for a, b in LOSSES:
        mean = math.sqrt(a * b)
        close(GLS().weights(step_of(losses=vector(a, b)), {}), mean / (2 * a), mean / (2 * b))
    three = vector(0.3, 4.0, 1.7).requires_grad_()
    (three.prod() ** (1 / 3)).backward()
    close(GLS().weights(step_of(losses=three.detach()), {}), *three.grad.tolist())


def test_gls_takes_a_loss_of_zero():
    weights = GLS().weights(step_of(losses=vector(0, 1)), {})
    close(weights, 1e-4 / 2e-8, 1e-4 / 2)  # the mean of 1e-8 and 1 is 1e-4


def test_uncertainty():
    combiner, state = Uncertainty(lr=0.1), {}
    variances = [AdamByHand(0.0, 0.1), AdamByHand(0.0, 0.1)]
    for number, losses in enumerate(LOSSES):
        step = step_of(losses=vector(*losses), number=number)
        close(combiner.weights(step, state), *(1 / (2 * math.exp(s.x)) for s in variances))
        combiner.after(step, step.losses, state)
        for s, loss in zip(variances, losses, strict=True):
            s.step(-loss / (2 * math.exp(s.x)) + 1 / 2)
    # Adam's first step has length lr whatever the gradient: 2 > 1 raises s, 0.5 < 1 lowers it
    fresh: dict = {}
    combiner.after(step_of(losses=vector(2, 0.5)), vector(2, 0.5), fresh)
    torch.testing.assert_close(fresh["s"], vector(0.1, -0.1), rtol=1e-6, atol=0)


def test_uncertainty_is_its_papers_objective_under_torchs_adam():
    combiner, state = Uncertainty(lr=0.05), {}
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([s], lr=0.05)
    for number, losses in enumerate(LOSSES * 4):
        step = step_of(losses=vector(*losses), number=number)
        assert torch.allclose(combiner.weights(step, state), (-s.detach()).exp() / 2, rtol=1e-12)
        combiner.after(step, step.losses, state)
        optimiser.zero_grad()
        (step.losses / (2 * s.exp()) + s / 2).sum().backward()
        optimiser.step()


def test_uncertainty_settles_at_one_over_twice_the_loss():
    combiner, state = Uncertainty(lr=0.05), {}
    step = step_of(losses=vector(3.0, 0.2))
    for _ in range(600):
        combiner.after(step, step.losses, state)
    torch.testing.assert_close(combiner.weights(step, state), vector(1 / 6, 1 / 0.4), rtol=1e-3, atol=0)


def test_dwa():
    """Windows of one step: 1, 1, then r = (1 / 2, 0.6 / 0.5) at temperature 2, then r = (0.8 / 1, 0.1 / 0.6)."""
    combiner, state = DWA(window=1), {}
    rates = [(1, 1), (1, 1), (0.5, 1.2), (0.8, 1 / 6)]
    for number, ((p, q), losses) in enumerate(zip(rates, [*LOSSES, (9.0, 9.0)], strict=True)):
        step = step_of(losses=vector(*losses), number=number)
        a, b = math.exp(p / 2), math.exp(q / 2)
        close(combiner.weights(step, state), 2 * a / (a + b), 2 * b / (a + b))
        combiner.after(step, step.losses, state)


def test_dwa_takes_means_of_windows():
    """Windows of two steps: means 3 and 1, then 1.5 and 2."""
    combiner, state = DWA(window=2, temperature=0.5), {}
    found = []
    for number, losses in enumerate([(2.0, 0.5), (4.0, 1.5), (1.0, 1.0), (2.0, 3.0), (5.0, 5.0), (6.0, 6.0)]):
        step = step_of(losses=vector(*losses), number=number)
        found.append(combiner.weights(step, state))
        combiner.after(step, step.losses, state)
    a, b = math.exp(0.5 / 0.5), math.exp(2.0 / 0.5)
    for number, weights in enumerate(found):
        close(weights, *((1, 1) if number < 4 else (2 * a / (a + b), 2 * b / (a + b))))


def test_famo():
    """Hand gradient: d(softmax)' delta = z_t (delta_t - z . delta), plus the decay of xi."""
    combiner, state = FAMO(lr=0.1, weight_decay=0.01), {}
    xi = [AdamByHand(0.0, 0.1), AdamByHand(0.0, 0.1)]
    later = [(1.5, 0.55), (0.9, 0.6), (0.8, 0.2)]  # of the same examples, after the step
    for number, (now, then) in enumerate(zip(LOSSES, later, strict=True)):
        step = step_of(losses=vector(*now), number=number)
        total = sum(math.exp(x.x) for x in xi)
        z = [math.exp(x.x) / total for x in xi]
        c = z[0] / now[0] + z[1] / now[1]
        close(combiner.weights(step, state), z[0] / now[0] / c, z[1] / now[1] / c)
        combiner.after(step, vector(*then), state)
        delta = [math.log(a) - math.log(b) for a, b in zip(now, then, strict=True)]
        mean = z[0] * delta[0] + z[1] * delta[1]
        for x, share, gained in zip(xi, z, delta, strict=True):
            x.step(share * (gained - mean) + 0.01 * x.x)
    # the first improved at each step, the second did not: the second's share grew
    assert state["xi"][1] > state["xi"][0]


def test_famo_is_autograds_softmax_under_torchs_adam():
    combiner, state = FAMO(), {}
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        now, then = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
        step = step_of(losses=now, number=number)
        expected = xi.detach().softmax(0) / now
        torch.testing.assert_close(combiner.weights(step, state), expected / expected.sum(), rtol=1e-12, atol=0)
        combiner.after(step, then, state)
        optimiser.zero_grad()
        xi.softmax(0).backward(now.log() - then.log())
        optimiser.step()


def test_gradnorm():
    """Lengths 3 and 1. In the first step r = 1 and the target is their mean, 2: w_1 falls, w_2 rises, sum 2."""
    combiner, state = GradNorm(lr=0.1, alpha=1.5), {}
    lengths = [(3.0, 1.0), (2.0, 1.5), (2.0, 0.1)]
    w = [AdamByHand(1.0, 0.1), AdamByHand(1.0, 0.1)]
    first = LOSSES[0]
    for number, (losses, n) in enumerate(zip(LOSSES, lengths, strict=True)):
        step = step_of(torch.diag(vector(*n)), vector(*losses), number=number)
        close(combiner.weights(step, state), w[0].x, w[1].x)
        combiner.after(step, step.losses, state)
        grads = [w[0].x * n[0], w[1].x * n[1]]
        ratios = [losses[0] / first[0], losses[1] / first[1]]
        for task, weight in enumerate(w):
            relative = ratios[task] / ((ratios[0] + ratios[1]) / 2)
            target = (grads[0] + grads[1]) / 2 * relative**1.5
            weight.step(math.copysign(n[task], grads[task] - target))
        total = w[0].x + w[1].x
        for weight in w:
            weight.x *= 2 / total
        if number == 0:
            assert (w[0].x, w[1].x) == pytest.approx((0.9, 1.1), abs=1e-8)  # but for Adam's epsilon
    close(state["weights"], w[0].x, w[1].x)


@pytest.mark.parametrize("length, rises", [(1.80, True), (1.86, False)])
def test_gradnorms_exponent(length: float, rises: bool):
    """Losses at 3 and 1 times the first: r = 1.5, and the target is 1.5^1.5 = 1.837 times the mean length, 1."""
    combiner, state = GradNorm(alpha=1.5), {}
    for losses, n in [((1, 1), (1, 1)), ((3, 1), (length, 2 - length))]:
        step = step_of(torch.diag(vector(*n)), vector(*losses))
        close(combiner.weights(step, state), 1, 1)  # the first step is balanced
        combiner.after(step, step.losses, state)
    assert (combiner.weights(step, state)[0] > 1) == rises


def test_gradnorms_derivative_is_that_of_the_network():
    """|grad of w_t L_t| differentiated by w through the network, create_graph and all, over three steps."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    shared = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([w], lr=0.025)
    combiner, state, first = GradNorm(), {}, None
    for number in range(3):
        losses = ((x @ shared).tanh() - y).square().mean(0)
        plain = torch.stack([torch.autograd.grad(loss, shared, retain_graph=True)[0].flatten() for loss in losses])
        step = step_of(plain, losses.detach(), number=number)
        torch.testing.assert_close(combiner.weights(step, state), w.detach(), rtol=1e-10, atol=0)
        combiner.after(step, step.losses, state)
        first = losses.detach() if first is None else first
        norms = torch.stack([
            torch.autograd.grad(w[t] * losses[t], shared, create_graph=True, retain_graph=True)[0].norm()
            for t in range(3)
        ])  # fmt: skip
        ratio = losses.detach() / first
        target = norms.detach().mean() * (ratio / ratio.mean()) ** 1.5
        optimiser.zero_grad()
        (norms - target).abs().sum().backward(inputs=[w])
        optimiser.step()
        with torch.no_grad():
            w *= 3 / w.sum()
            shared -= 0.1 * plain.sum(0).view(3, 3)


def test_achievement():
    """P = 0.8 and 0.5 with a margin of 5 %: 0.84 and 0.525. Scores are averaged with momentum 0.1, the first taken."""
    combiner, state = Achievement(potential={"a": 0.8, "b": 0.5}), {}
    step = step_of(losses=vector(1, 1))
    close(combiner.weights(step, state), 0.5, 0.5)
    combiner.scored({"a": 0.42, "b": 0.42}, state)  # (1 - 1/2)^2 = 0.25 and (1 - 0.8)^2 = 0.04
    close(combiner.weights(step, state), 0.25 / 0.29, 0.04 / 0.29)
    combiner.scored({"a": 0.82, "b": 0.12}, state)  # 0.1 * 0.82 + 0.9 * 0.42 = 0.46; 0.39
    p, q = (1 - 0.46 / 0.84) ** 2, (1 - 0.39 / 0.525) ** 2
    close(combiner.weights(step, state), p / (p + q), q / (p + q))
    combiner.scored({"b": 0.4}, state)  # 0.391
    q = (1 - 0.391 / 0.525) ** 2
    close(combiner.weights(step, state), p / (p + q), q / (p + q))


def test_achievement_beyond_the_potential():
    combiner, state = Achievement(potential={"a": 0.8, "b": 0.5}), {}
    combiner.scored({"a": 2.0, "b": 0.3}, state)
    close(combiner.weights(step_of(losses=vector(1, 1)), state), 0, 1)
    combiner.scored({"a": 2.0, "b": 30.0}, state)  # all beyond: alike
    close(combiner.weights(step_of(losses=vector(1, 1)), state), 0.5, 0.5)


def test_achievement_names_the_task_without_a_potential():
    for potential in ({"a": 0.8}, {"a": 0.8, "b": 0.5, "c": 0.5}):
        with pytest.raises(ValueError, match=r"potential names .* the tasks are \['a', 'b'\]"):
            Achievement(potential=potential).check(["a", "b"])
    Achievement(potential={"b": 0.8, "a": 0.5}).check(["a", "b"])


def test_a_task_that_was_not_live_goes_on_where_it_stood():
    """Adam has a count for each task: the second's three steps are the same with pauses as without."""
    with_pauses, without = {}, {}
    combiner = Uncertainty(lr=0.1)
    for number, live in enumerate([True, False, False, True, True]):
        step = step_of(losses=vector(1.5, 0.4), live=torch.tensor([True, live]), number=number)
        combiner.after(step, step.losses, with_pauses)
    for _ in range(3):
        combiner.after(step_of(losses=vector(1.5, 0.4)), vector(1.5, 0.4), without)
    assert torch.equal(with_pauses["s"][1], without["s"][1])
    assert not torch.equal(with_pauses["s"][0], without["s"][0])


def test_gradnorm_asks_for_what_it_needs():
    with pytest.raises(ValueError, match="GradNorm needs gradients"):
        GradNorm().weights(step_of(losses=vector(1, 1)), {})
    GradNorm().weights(step_of(jacobian(0, 2)), {})


def test_a_step_that_is_not_what_it_should_be_says_so():
    """As a loop of one's own may have it: single precision, another size, no tensor, something left out."""
    live, two = torch.tensor([True, True]), ("a", "b")
    for wrong, message in [
        ({"gram": torch.eye(2)}, r"Step\.gram must be .* for 2 tasks, got torch\.float32 \(2, 2\)"),
        ({"gram": torch.eye(3, dtype=torch.float64)}, r"got torch\.float64 \(3, 3\)"),
        ({"losses": torch.ones(2)}, r"Step\.losses must be"),
        ({"live": [True, True]}, r"Step\.live must be .* got list"),
    ]:
        with pytest.raises(ValueError, match=message):
            Step(**{"tasks": two, "live": live, **wrong})
    with pytest.raises(ValueError, match="MGDA needs gradients, and Step lacks `losses`"):
        COMBINERS["mgda"]().weights(Step(two, live, gram=torch.eye(2, dtype=torch.float64)), {})
