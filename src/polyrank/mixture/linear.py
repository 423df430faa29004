"""What stands in the place of a frozen linear layer."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from .base import in_out_features, runs_primitives, weight_of
from .context import RouteContext
from .kept import drop_kept
from .primitives import base_shrink, compute_dtype, expand_, thin_products, with_lora
from .site import Site


class Mixture(nn.Module, ABC):
    """What stands in the place of a frozen linear layer: it keeps the layer as ``base`` and knows its ``site``."""

    cure = "keep the adapter in the model, or train with a task-only router"  # where merging is refused

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.site = Site()  # adapt() puts the model's own here

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            drop_kept(self)
        return super().train(mode)

    @property
    def weight(self) -> Tensor:  # some models look at their layers' weight, for its dtype
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.base._parameters["bias"]

    @property
    def in_features(self) -> int:
        return in_out_features(self.base)[0]

    @property
    def out_features(self) -> int:
        return in_out_features(self.base)[1]

    @property
    @abstractmethod
    def stands_for_base(self) -> bool:
        """Whether the layer computes without its base's weight, which may then leave memory."""

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """What the gate looks at: of "task", "sample" (pooled tokens), "token" and "batch" (its other samples)."""

    @property
    def reads_input(self) -> bool:
        """Whether the gate looks at the input: then no single weight stands for a task."""
        return bool(self.reads - {"task"})

    @abstractmethod
    def task_weight(self, task: int) -> Tensor:
        """The one weight (O, I) that equals this layer on a task, in the adapter's precision."""

    def frozen(self) -> list[nn.Module]:
        """The frozen linear layers that this one stands for."""
        return [self.base]

    def task_weights(self, task: int) -> list[tuple[nn.Module, Tensor]]:
        """``frozen()``, each with the one weight (O, I) that equals it on a task, in the adapter's precision."""
        return [(self.base, self.task_weight(task))]

    @abstractmethod
    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (R, O) whose product B' A is what this layer adds to its base on a task."""

    def task_loras(self, task: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """``frozen()``, each with the A (R, I) and B (R, O) of what is added to it on a task."""
        return [(self.base, *self.task_lora(task))]

    @abstractmethod
    def active_parameters(self) -> int:
        """Adapter parameters that work on one token."""

    @abstractmethod
    def flops_per_token(self) -> int:
        """Multiply-adds x 2 of the wide products for one token, those with the base weight included."""

    def base_flops_per_token(self) -> int:
        """Multiply-adds x 2 of the frozen layer alone."""
        return 2 * self.in_features * self.out_features

    def refuse_if_input_routed(self) -> None:
        if self.reads_input:
            raise ValueError(
                f"{self.site.name}: the gate depends on the input, so no single weight stands for a task and nothing "
                f"is approximated silently; {self.cure}"
            )


def run(base: nn.Module, x: Tensor, *a: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen layer's output (..., O) and the thin products x A' (..., R), by ``base_shrink`` where it may be.

    a: one or more parts of A whose rows stand below each other, (R, I), or (N, R, I) for N equal parts of x's first
    dimension.
    """
    if runs_primitives(base):
        return base_shrink(x, weight_of(base), base._parameters["bias"], *a)
    rows = torch.cat(a, -2).to(compute_dtype(x))
    return base(x), thin_products(x, rows)  # quantised, sharded, wrapped, hooked: it runs as it is


def add(base: nn.Module, y: Tensor, q: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``y`` that ``run`` gave, and scale q B; in place where it may be. q: (..., R'); b: (R', O) or (N, R', O)."""
    if runs_primitives(base):
        return expand_(y, q, b, scale)
    return y + scale * thin_products(q, b.mT.to(q.dtype)).to(y.dtype)


def apply_lora(base: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The frozen layer and one LoRA, without a graph. a: (R, I) and b: (R, O), in the compute dtype."""
    if type(base) is nn.Linear and base.weight.dtype == a.dtype == x.dtype and runs_primitives(base):
        return with_lora(x, base.weight, base.bias, a, b)
    y, z = run(base, x, a)
    return add(base, y, z, b)


def context_of(model: nn.Module) -> RouteContext | None:
    """The route context of an adapted model, None where it has no adapter."""
    return next((module.site.context for module in model.modules() if isinstance(module, Mixture)), None)
