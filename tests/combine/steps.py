"""Steps for the tests of the combiners."""

import torch
from torch import Tensor

from polyrank.combine import COMBINERS, Combiner, Step


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def step_of(
    jacobian: Tensor | None = None, losses: Tensor | None = None, live: Tensor | None = None, number: int = 0, seed=0
) -> Step:
    """A step with these gradients (T, n) and losses (T,); every task is live unless said otherwise."""
    measured = jacobian if jacobian is not None else losses
    count = len(measured if measured is not None else live)
    live = torch.ones(count, dtype=torch.bool) if live is None else live
    losses = torch.ones(count, dtype=torch.float64) if losses is None else losses
    gram = None if jacobian is None else jacobian @ jacobian.T
    return Step(tuple("abcdefghijklmnopqrstuvw"[:count]), live, number, seed, losses, gram)


def jacobian(seed: int, tasks: int, width: int | None = None, spread: float = 1.0) -> Tensor:
    """Random gradients, their lengths spread over +-``spread`` orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** (spread * (2 * torch.rand(tasks, 1, generator=generator, dtype=torch.float64) - 1))
    return torch.randn(tasks, width or 2 * tasks, generator=generator, dtype=torch.float64) * lengths


def combiner(name: str) -> Combiner:
    """By name, with what has no default; a short window so that it turns within a test."""
    settings = {
        "achievement": {"potential": {task: 0.5 + i / 50 for i, task in enumerate("abcdefghijklmnopqrstuvw")}},
        "dwa": {"window": 2},
    }
    return COMBINERS[name](**settings.get(name, {}))
