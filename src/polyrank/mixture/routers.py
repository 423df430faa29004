"""Routers: who should answer? They give logits (..., E) from the layer's input and the batch's tasks.

Where a router is linear in the token, its weight is more rows of A: ``rows`` hands them over and ``forward`` gets the
product back as ``z``. So the token is read once for the base, the experts and the router.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import in_out_features
from .kept import Kept, infers
from .site import Site
from .start import TaskTable, normal, uniform, zeros


class Router(nn.Module, ABC):
    """What every router provides."""

    reads: frozenset[str]  # what the logits depend on: "task", "sample" (pooled tokens), "token", "batch"

    @abstractmethod
    def rows(self) -> Tensor | None:
        """More rows of A, (n, I), or None."""

    @abstractmethod
    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        """Logits (..., E) that broadcast over the tokens of x (..., I); z (..., n) is x times ``rows``."""

    @abstractmethod
    def active_parameters(self) -> int:
        """Parameters that work on one token."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Multiply-adds x 2 for one token; what happens once a sample or a task is not counted."""


class TaskEmbedding(Router):
    """Q e_t: a learnt embedding of each task, N(0, 1), then a linear map to logits, uniform within ``bound``."""

    reads = frozenset({"task"})

    def __init__(self, base: nn.Module, num_tasks: int, dim: int, num_experts: int, bound: float = 0.0) -> None:
        super().__init__()
        self.embedding = TaskTable(normal(base, num_tasks, dim))
        self.proj = uniform(base, num_experts, dim, bound=bound)
        self._table: Kept[Tensor] = Kept()

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        ids = site.ids(x)
        if infers() or site.per_token:
            return F.embedding(ids, self._table(None, (self,), self._of_each_task))
        return exact_linear(F.embedding(ids, self.embedding()), self.proj)

    def _of_each_task(self) -> Tensor:
        """(T, E). One small product a task: one that joins later does not even change the others' rounding."""
        return torch.stack([exact_linear(e, self.proj) for e in self.embedding.each()])

    def active_parameters(self) -> int:
        return self.embedding.row_numel() + self.proj.numel()

    def flops_per_token(self) -> int:
        return 0


class TaskLogits(Router):
    """Free logits for each task, uniform within ``bound``."""

    reads = frozenset({"task"})

    def __init__(self, base: nn.Module, num_tasks: int, num_experts: int, bound: float) -> None:
        super().__init__()
        self.logits = TaskTable(uniform(base, num_tasks, num_experts, bound=bound))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        return F.embedding(site.ids(x), self.logits())

    def active_parameters(self) -> int:
        return self.logits.row_numel()

    def flops_per_token(self) -> int:
        return 0


class LinearRouter(Router):
    """G x of each token. G as nn.Linear's default, or N(0, std^2)."""

    reads = frozenset({"token"})

    def __init__(self, base: nn.Module, num_experts: int, std: float | None = None) -> None:
        super().__init__()
        shape = num_experts, in_out_features(base)[0]
        self.weight = uniform(base, *shape) if std is None else normal(base, *shape, std=std)

    def rows(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        return z

    def active_parameters(self) -> int:
        return self.weight.numel()

    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()


class PerTaskRouter(Router):
    """One linear router of each token for each task; a mixed batch gathers the weights of its tasks."""

    reads = frozenset({"task", "token"})

    def __init__(self, base: nn.Module, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.weights = TaskTable(uniform(base, num_tasks, num_experts, in_out_features(base)[0]))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        ids, weights = site.ids(x), self.weights()  # (T, E, I)
        if site.per_token:
            every = F.linear(x, weights.flatten(0, 1).to(x.dtype)).unflatten(-1, weights.shape[:2])
            return every.gather(-2, ids[..., None, None].expand(*ids.shape, 1, every.shape[-1])).squeeze(-2)
        weights = F.embedding(ids.reshape(-1), weights.flatten(1)).unflatten(-1, weights.shape[1:])  # (B, E, I)
        rows = x.reshape(len(x), -1, x.shape[-1])
        return torch.bmm(rows, weights.to(x.dtype).transpose(1, 2)).view(*x.shape[:-1], -1)

    def active_parameters(self) -> int:
        return self.weights.row_numel()

    def flops_per_token(self) -> int:
        return 2 * self.weights.row_numel()


class TokenRouter(Router):
    """G_up f(G x): a bottleneck of each token, linear by default. G as nn.Linear's default, G_up zero at the start."""

    reads = frozenset({"token"})

    def __init__(self, base: nn.Module, dim: int, num_experts: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = nn.Identity() if activation is None else activation
        self.down = uniform(base, dim, in_out_features(base)[0])
        self.up = zeros(base, num_experts, dim)

    def rows(self) -> Tensor:
        return self.down

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        return F.linear(self.activation(z), self.up.to(z.dtype))

    def active_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def flops_per_token(self) -> int:
        return 2 * (self.down.numel() + self.up.numel())


class SampleRouter(Router):
    """G_up G mean(x): as ``TokenRouter``, on the masked mean of the prompt; one gate for all tokens of a sample."""

    reads = frozenset({"sample"})

    def __init__(self, base: nn.Module, dim: int, num_experts: int) -> None:
        super().__init__()
        self.down = uniform(base, dim, in_out_features(base)[0])
        self.up = zeros(base, num_experts, dim)

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        pooled = site.pool_prompt(x)  # (B, I)
        logits = F.linear(F.linear(pooled, self.down.to(pooled.dtype)), self.up.to(pooled.dtype))
        return for_samples(logits, x)

    def active_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def flops_per_token(self) -> int:
        return 0


def exact_linear(few: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits (..., E) of a few rows (..., I): tasks, pooled samples. Not rounded by autocast: a hard choice may follow,
    what is kept must not depend on it, and it costs nothing."""
    with torch.autocast(few.device.type, enabled=False):
        return F.linear(few.to(weight.dtype), weight, bias)


def for_samples(values: Tensor, x: Tensor) -> Tensor:
    """values (B, E) of each sample, so that they broadcast over the tokens of x (..., I)."""
    if len(values) != x.shape[0]:  # windows, beams
        values = values.repeat_interleave(x.shape[0] // len(values), 0)
    return values.view(x.shape[0], *[1] * (x.ndim - 2), -1)


class Sum(Router):
    """The sum of several routers' logits."""

    def __init__(self, *routers: Router) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.reads = frozenset().union(*(router.reads for router in routers))

    def _each(self) -> Sequence[Router]:
        return [router for router in self.routers if isinstance(router, Router)]

    def rows(self) -> Tensor | None:
        every = [router.rows() for router in self._each()]
        rows = [rows for rows in every if rows is not None]
        return torch.cat(rows) if rows else None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        total, start = None, 0
        for router in self._each():
            rows = router.rows()
            width = 0 if rows is None else len(rows)
            logits = router(x, z[..., start : start + width], site)
            start, total = start + width, logits if total is None else total + logits
        assert total is not None
        return total

    def active_parameters(self) -> int:
        return sum(router.active_parameters() for router in self._each())

    def flops_per_token(self) -> int:
        return sum(router.flops_per_token() for router in self._each())
