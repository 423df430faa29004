"""The adapted linear layer: y = W x + b + s * B' C(x, t) A x."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import in_out_features, runs_primitives, weight_of
from .context import RouteContext
from .experts import Experts
from .gates import Gate
from .primitives import base_shrink, compute_dtype, expand_
from .routers import Router
from .site import Site


class Mixture(nn.Module, ABC):
    """What stands in the place of a frozen linear layer: it keeps the layer as ``base`` and knows its ``site``."""

    cure = "keep the adapter in the model, or train with a task-only router"  # where merging is refused

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.site = Site()  # adapt() puts the model's own here

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


class LowRankMixture(Mixture, ABC):
    """A frozen linear layer and a gated mixture of low-rank experts beside it."""

    def __init__(
        self,
        base: nn.Module,
        *,
        experts: Experts,
        router: Router | None = None,
        gate: Gate | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(base)
        self.experts, self.router, self.gate, self.scale = experts, router, gate, scale

    def forward(self, x: Tensor) -> Tensor:
        a = self.experts.down()
        rank, rows = len(a), None if self.router is None else self.router.rows()
        if rows is not None:
            a = torch.cat([a, rows])
        y, z = self.shrink(x, a, rank)
        return add(self.base, y, self.mix(x, z, rank, self.site), self.experts.up(self.base))

    @abstractmethod
    def shrink(self, x: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The frozen product (..., O) and the thin products (..., R + n): ``rank`` R rows of a are the experts', n a
        router's.
        """

    def mix(self, x: Tensor, z: Tensor, rank: int, site: Site) -> Tensor:
        """The rank side: q = s C(x, t) z, (..., R')."""
        gate = None
        if self.router is not None:
            gate = logits = self.router(x, z[..., rank:], site)
            if self.gate is not None:
                gate = self.gate(logits)
                if self.training and site.listens:
                    self.gate.watch(logits, gate, site)
        q = self.experts.core(z[..., :rank], gate, site)
        return q if self.scale == 1 else q * self.scale

    @property
    def stands_for_base(self) -> bool:
        return False

    @property
    def reads(self) -> frozenset[str]:
        asked = self.router is not None and (self.gate is None or self.gate.fixed() is None)
        return self.experts.reads | (self.router.reads if asked and self.router is not None else frozenset())

    def active_parameters(self) -> int:
        experts = self.experts.active_parameters(
            self.experts.num_experts if self.gate is None else self.gate.num_active(self.experts.num_experts)
        )
        gate = 0 if self.gate is None else sum(p.numel() for p in self.gate.parameters() if p.requires_grad)
        return experts + gate + (0 if self.router is None else self.router.active_parameters())

    @torch.no_grad()
    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        """The core is linear in z, so it is its value on the identity: minimal rank, whatever the method."""
        self.refuse_if_input_routed()
        a, training = self.experts.down(), self.training
        eye, site = torch.eye(len(a), device=a.device, dtype=a.dtype), self.site.on(task, a.device)
        fixed = None if self.gate is None else self.gate.fixed()
        self.eval()  # no noise in a merged weight
        q = self.mix(eye, eye, len(a), site) if fixed is None else self.scale * self.experts.core(eye, fixed, site)
        self.train(training)
        return a, q @ self.experts.up(self.base).to(a.dtype)

    @torch.no_grad()
    def task_weight(self, task: int) -> Tensor:
        a, b = self.task_lora(task)
        return weight_of(self.base).to(a.dtype) + b.t() @ a

    def flops_per_token(self) -> int:
        a, b = self.experts.down(), self.experts.up(self.base)
        router = 0 if self.router is None else self.router.flops_per_token()
        return 2 * (self.in_features * self.out_features + a.numel() + b.numel()) + router


class MixtureLinear(LowRankMixture):
    """The formula as it stands: experts and router read the layer's input."""

    def shrink(self, x: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return run(self.base, x, a)


def run(base: nn.Module, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen layer's output (..., O) and the thin products x A' (..., R), by ``base_shrink`` where it may be."""
    if runs_primitives(base):
        return base_shrink(x, weight_of(base), base._parameters["bias"], a)
    return base(x), F.linear(x, a.to(compute_dtype(x)))  # quantised, sharded, wrapped, hooked: it runs as it is


def add(base: nn.Module, y: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """``y`` that ``run`` gave, and q B (..., O); in place where it may be. q: (..., R'); b: (R', O)."""
    return expand_(y, q, b) if runs_primitives(base) else y + F.linear(q, b.t().to(q.dtype)).to(y.dtype)


def context_of(model: nn.Module) -> RouteContext | None:
    """The route context of an adapted model, None where it has no adapter."""
    return next((module.site.context for module in model.modules() if isinstance(module, Mixture)), None)
