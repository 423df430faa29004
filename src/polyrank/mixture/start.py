"""How adapter weights start: fp32 masters whatever the base is stored in (fp64 where the base is), on its device."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import weight_of


def adapter_dtype(base: nn.Module) -> torch.dtype:
    return torch.float64 if weight_of(base).dtype == torch.float64 else torch.float32


def place(base: nn.Module) -> dict[str, Any]:
    """Device and dtype of an adapter weight beside ``base``."""
    return {"device": weight_of(base).device, "dtype": adapter_dtype(base)}


def zeros(base: nn.Module, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, **place(base)))


def uniform(base: nn.Module, *shape: int, bound: float | None = None) -> nn.Parameter:
    """As nn.Linear's default, kaiming_uniform(a=sqrt(5)): within 1 / sqrt(the last dimension)."""
    limit = float(shape[-1]) ** -0.5 if bound is None else bound
    return nn.Parameter(torch.empty(shape, **place(base)).uniform_(-limit, limit))


def normal(base: nn.Module, *shape: int, std: float = 1.0) -> nn.Parameter:
    return nn.Parameter(std * torch.randn(shape, **place(base)))


class TaskTable(nn.Module):
    """One parameter for each task, not rows of one: so a task can join, freeze or be left out of a combination alone.

    Whatever belongs to one task stands in a table; every other adapter weight is shared by the tasks.
    """

    def __init__(self, start: Tensor) -> None:
        """start: (T, ...)."""
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(row.clone()) for row in start.detach().unbind(0))

    def each(self) -> list[Tensor]:
        return list(self.rows)

    def forward(self) -> Tensor:
        """All tasks', (T, ...)."""
        return torch.stack(self.each())

    def __len__(self) -> int:
        return len(self.rows)

    def row_numel(self) -> int:
        return self.rows[0].numel()
