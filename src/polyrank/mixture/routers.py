"""Routers: who should answer? They give logits (..., E) from the layer's input and the batch's tasks.

Where a router is linear in the token, its weight is more rows of A: ``rows`` hands them over and ``forward`` gets the
product back as ``z``. So the token is read once for the base, the experts and the router.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import in_out_features, weight_of
from .context import Site
from .experts import adapter_dtype


class Router(nn.Module, ABC):
    """What every router provides."""

    reads_input: bool  # the logits depend on x: then no single weight stands for a task
    reads_task: bool

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
    """Q e_t: a learnt embedding of each task, N(0, 1), then a linear map to logits, zero at the start."""

    reads_input, reads_task = False, True

    def __init__(self, base: nn.Module, num_tasks: int, dim: int, num_experts: int) -> None:
        super().__init__()
        place = {"device": weight_of(base).device, "dtype": adapter_dtype(base)}
        self.embedding = nn.Parameter(torch.randn(num_tasks, dim, **place))
        self.proj = nn.Parameter(torch.zeros(num_experts, dim, **place))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        logits = F.linear(self.embedding, self.proj)  # (T, E): small, then each sample takes its row
        return F.embedding(site.ids(x), logits)

    def active_parameters(self) -> int:
        return self.embedding[0].numel() + self.proj.numel()

    def flops_per_token(self) -> int:
        return 0


class TokenRouter(Router):
    """G_up G x: a linear bottleneck of each token. G as nn.Linear's default, G_up zero at the start."""

    reads_input, reads_task = True, False

    def __init__(self, base: nn.Module, dim: int, num_experts: int) -> None:
        super().__init__()
        place = {"device": weight_of(base).device, "dtype": adapter_dtype(base)}
        self.down = nn.Parameter(_linear_default(dim, in_out_features(base)[0], **place))
        self.up = nn.Parameter(torch.zeros(num_experts, dim, **place))

    def rows(self) -> Tensor:
        return self.down

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        return F.linear(z, self.up.to(z.dtype))

    def active_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def flops_per_token(self) -> int:
        return 2 * (self.down.numel() + self.up.numel())


class SampleRouter(Router):
    """G_up G mean(x): as ``TokenRouter``, on the masked mean of the prompt; one gate for all tokens of a sample."""

    reads_input, reads_task = True, False

    def __init__(self, base: nn.Module, dim: int, num_experts: int) -> None:
        super().__init__()
        place = {"device": weight_of(base).device, "dtype": adapter_dtype(base)}
        self.down = nn.Parameter(_linear_default(dim, in_out_features(base)[0], **place))
        self.up = nn.Parameter(torch.zeros(num_experts, dim, **place))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        pooled = site.pool_prompt(x)  # (B, I)
        logits = F.linear(F.linear(pooled, self.down.to(pooled.dtype)), self.up.to(pooled.dtype))
        if len(logits) != x.shape[0]:
            logits = logits.repeat_interleave(x.shape[0] // len(logits), 0)
        return logits.view(x.shape[0], *[1] * (x.ndim - 2), -1)

    def active_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def flops_per_token(self) -> int:
        return 0


class Sum(Router):
    """The sum of several routers' logits."""

    def __init__(self, *routers: Router) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.reads_input = any(router.reads_input for router in routers)
        self.reads_task = any(router.reads_task for router in routers)

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


def _linear_default(out_features: int, in_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uniform as nn.Linear's default (kaiming_uniform, a = sqrt(5))."""
    bound = in_features**-0.5
    return torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
