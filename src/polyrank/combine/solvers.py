"""Small problems that several combiners share, solved exactly and in fp64."""

from collections.abc import Callable

import torch
from torch import Tensor

from .base import State, Step

EPS = torch.finfo(torch.float64).eps


def gram_of(step: Step) -> Tensor:
    """M (T, T). That it is there was checked where the step came in."""
    assert step.gram is not None
    return step.gram


def losses_of(step: Step) -> Tensor:
    """L (T,). As above."""
    assert step.losses is not None
    return step.losses


def norms_of(gram: Tensor) -> Tensor:
    """|g_t| (T,)."""
    return gram.diagonal().clamp_min(0).sqrt()


def cosines(gram: Tensor, norms: Tensor) -> Tensor:
    """The Gram matrix of the unit gradients (T, T); all norms are positive."""
    return gram / norms / norms[:, None]


def nonnegative(q: Tensor, c: Tensor) -> Tensor:
    """argmin x'Qx / 2 - c'x over x >= 0, for Q (n, n) positive semidefinite and a problem that is bounded below.

    The active set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23) on the normal
    equations: exact on the support that it ends with. A variable enters only if its gradient exceeds its own rounding
    error, so copies of a column and columns in the span of others stay out.
    """
    n = len(c)
    unit = norms_of(q)
    unit = torch.where(unit > 0, unit, 1.0)  # columns of one length: the scale of a task costs no digits
    q, c = cosines(q, unit), c / unit
    x, free, refused = torch.zeros_like(c), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for _ in range(10 * n):
        gain = c - q @ x
        enters = ~free & ~refused & (gain > 10 * n * EPS * (c.abs() + q.abs() @ x))
        if not enters.any():
            break
        new = int(torch.where(enters, gain, -torch.inf).argmax())
        free[new] = True
        z = _on_support(q, c, free)
        if z[new] <= 0:  # cannot be but for rounding: its column is all but in the span of the others
            free[new], refused[new] = False, True
            continue
        while (z[free] <= 0).any():  # as far as the first that becomes 0, which leaves
            part = torch.where(free & (z <= 0), x / (x - z), torch.inf)
            x = (x + part.min() * (z - x)).clamp_min(0)
            free &= part > part.min()
            z = _on_support(q, c, free)
        x = z
        refused[:] = False
    return x / unit


def _on_support(q: Tensor, c: Tensor, free: Tensor) -> Tensor:
    x = torch.zeros_like(c)
    x[free] = torch.linalg.pinv(q[free][:, free], hermitian=True) @ c[free]
    return x


def min_norm(gram: Tensor) -> Tensor:
    """argmin |sum_t a_t g_t| over a >= 0, sum a = 1: the point of the gradients' hull nearest to 0.

    u = argmin u'Mu / 2 + (1'u - 1)^2 / 2 over u >= 0 has the same conditions up to scale, so a = u / 1'u.
    """
    smallest = gram.diagonal().min()
    if smallest <= 0:  # a gradient of 0 is the nearest point itself
        still = (gram.diagonal() <= 0).to(gram.dtype)
        return still / still.sum()
    u = nonnegative(gram / smallest + 1.0, torch.ones_like(gram[0]))
    return u / u.sum()


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f changes sign in [0, 1]; ``low`` > 0 > ``high`` are f(0) and f(1), or stand for their signs.

    Secants between two points of either sign, with the Illinois rule so that both move.
    """
    a, b, side = 0.0, 1.0, 0
    for _ in range(100):
        s = (a * high - b * low) / (high - low)
        value = f(s)
        if value > 0:
            a, low, high, side = s, value, high / 2 if side > 0 else high, 1
        else:
            b, high, low, side = s, value, low / 2 if side < 0 else low, -1
        if value == 0 or b - a <= 4 * EPS * b or abs(value) <= 4 * EPS:
            return s
    return (a + b) / 2


def adam_memory(name: str, start: float) -> dict[str, float]:
    """What ``adam`` remembers of a vector, for ``PerTask.memory``."""
    return {name: start, f"{name}_mean": 0.0, f"{name}_square": 0.0, f"{name}_steps": 0.0}


def adam(memory: State, name: str, gradient: Tensor, lr: float, decay: float = 0.0) -> None:
    """One step of Adam (Kingma and Ba, ICLR 2015; betas 0.9 and 0.999, L2 decay in the gradient) on memory[name].

    Each task has its own count of steps, so one that was not live for a while goes on where it stood.
    """
    gradient = gradient + decay * memory[name]
    memory[f"{name}_steps"] = steps = memory[f"{name}_steps"] + 1
    memory[f"{name}_mean"] = mean = 0.9 * memory[f"{name}_mean"] + 0.1 * gradient
    memory[f"{name}_square"] = square = 0.999 * memory[f"{name}_square"] + 0.001 * gradient.square()
    memory[name] = memory[name] - lr * (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
