"""The adapted linear layer: y = W x + b + s * B' C(x, t) A x."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import in_out_features, runs_primitives, weight_of
from .context import RouteContext
from .dispatch import add_dispatched, pays
from .experts import Experts, LoRAExperts
from .gates import Gate
from .kept import Kept, infers
from .primitives import base_shrink, compute_dtype, expand_, thin_products, with_lora
from .routers import Router
from .site import Site

BY_TASK = frozenset({"task"})
MOST_KEPT = 8  # LoRAs that inference keeps of a layer whose gate the task decides


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


class MixtureLinear(Mixture):
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
        self._loras: Kept[tuple[frozenset[str], dict[int, tuple[Tensor, Tensor]]]] = Kept()
        self._thin: Kept[tuple[Tensor, int, Tensor]] = Kept()
        self._gates: Kept[Tensor] = Kept()

    def forward(self, x: Tensor) -> Tensor:
        if infers():
            return self._infer(x)
        if pays(self.experts, self.gate, x, compute_dtype(x)):
            return self._dispatched(x)
        a, b = self._weights()
        y, z = run(self.base, x, *a)
        return add(self.base, y, self.mix(x, z, len(a[0]), self.site), b, self.scale)

    def _dispatched(self, x: Tensor) -> Tensor:
        assert self.router is not None and self.gate is not None and isinstance(self.experts, LoRAExperts)
        rows = self.router.rows()
        y, z = run(self.base, x, self.experts.lora_A[:0] if rows is None else rows)
        k = self.gate.num_active(self.experts.num_experts)
        return add_dispatched(y, x, self._weighed(x, z, self.site), self.experts, k, self.scale)

    def _weights(self) -> tuple[list[Tensor], Tensor]:
        """A and the router's rows, and B."""
        a, rows = self.experts.down(), None if self.router is None else self.router.rows()
        return ([a] if rows is None else [a, rows]), self.experts.up(self.base)

    def _infer(self, x: Tensor) -> Tensor:
        """The forward without gradients: what does not depend on x is computed once, as long as no weight changes."""
        dtype, parts = compute_dtype(x), tuple(self._modules.values())
        reads, loras = self._loras((dtype, parts), parts, lambda: (self.reads, {}))
        if not self.training and reads <= BY_TASK:  # one linear function of each task
            task = self.site.task if reads else 0
            if task is not None:
                if task not in loras:
                    if len(loras) == MOST_KEPT:
                        loras.clear()
                    loras[task] = self._folded(task, dtype)
                return apply_lora(self.base, x, *loras[task])
        if pays(self.experts, self.gate, x, dtype):
            return self._dispatched(x)
        a, rank, b = self._thin((dtype, parts), parts, lambda: self._in_inference(dtype))
        y, z = run(self.base, x, a)
        return add(self.base, y, self.mix(x, z, rank, self.site), b)

    def _folded(self, task: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The task's LoRA in ``dtype``, without the ranks that add nothing on this task."""
        a, b = self.task_lora(task)
        used = b.any(1)
        return a[used].to(dtype), b[used].to(dtype)

    def _in_inference(self, dtype: torch.dtype) -> tuple[Tensor, int, Tensor]:
        a, b = self._weights()
        return torch.cat(a).to(dtype), len(a[0]), (self.scale * b).to(dtype)

    def mix(self, x: Tensor, z: Tensor, rank: int, site: Site) -> Tensor:
        """The rank side without the scale: q = C(x, t) z, (..., R')."""
        if self.router is None:
            return self.experts.core(z, None, site)
        if not self.training and infers() and self.router.reads == BY_TASK and site.context.tasks:
            parts = self.router, self.gate
            every = self._gates((site.context.tasks, *parts), parts, lambda: self._gate_of_each_task(x))  # (T, E)
            return self.experts.core(z, F.embedding(site.ids(x), every), site)
        z, rows = z.split((rank, z.shape[-1] - rank), -1)  # one backward pass for both parts, unlike two slices
        return self.experts.core(z, self._weighed(x, rows, site), site)

    def _weighed(self, x: Tensor, rows: Tensor, site: Site) -> Tensor:
        assert self.router is not None
        logits = self.router(x, rows, site)
        if self.gate is None:
            return logits
        gate = self.gate(logits)
        if self.training and site.listens:
            self.gate.watch(logits, gate, site)
        return gate

    def _gate_of_each_task(self, x: Tensor) -> Tensor:
        tasks = len(self.site.context.tasks)
        samples = x.new_zeros(tasks, 1, x.shape[-1])
        return self._weighed(samples, samples[..., :0], self.site.of_all(x.device)).view(tasks, -1)

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
        q = self.mix(eye, eye, len(a), site) if fixed is None else self.experts.core(eye, fixed, site)
        self.train(training)
        return a, self.scale * q @ self.experts.up(self.base).to(a.dtype)

    @torch.no_grad()
    def task_weight(self, task: int) -> Tensor:
        a, b = self.task_lora(task)
        return weight_of(self.base).to(a.dtype) + b.t() @ a

    def flops_per_token(self) -> int:
        a, b = self.experts.down(), self.experts.up(self.base)
        router = 0 if self.router is None else self.router.flops_per_token()
        return 2 * (self.in_features * self.out_features + a.numel() + b.numel()) + router


def run(base: nn.Module, x: Tensor, *a: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen layer's output (..., O) and the thin products x A' (..., R), by ``base_shrink`` where it may be.

    a: one or more parts of A whose rows stand below each other, (R, I), or (N, R, I) for N equal parts of x's first
    dimension.
    """
    if runs_primitives(base):
        return base_shrink(x, weight_of(base), base._parameters["bias"], *a)
    return base(x), thin_products(
        x, torch.cat(a, -2).to(compute_dtype(x))
    )  # quantised, sharded, wrapped, hooked: it runs as it is


def add(base: nn.Module, y: Tensor, q: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``y`` that ``run`` gave, and scale q B; in place where it may be. q: (..., R'); b: (R', O) or (N, R', O)."""
    if runs_primitives(base):
        return expand_(y, q, b, scale)
    return y + scale * thin_products(q, b.mT.to(q.dtype)).to(y.dtype)


def apply_lora(base: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The frozen layer and one LoRA, without a graph. a: (R, I) and b: (R, O), in the compute dtype."""
    if type(base) is nn.Linear and runs_primitives(base):
        return with_lora(x, base.weight, base.bias, a, b)
    y, z = run(base, x, a)
    return add(base, y, z, b)


def context_of(model: nn.Module) -> RouteContext | None:
    """The route context of an adapted model, None where it has no adapter."""
    return next((module.site.context for module in model.modules() if isinstance(module, Mixture)), None)
