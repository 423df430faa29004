"""The mixture of low-rank experts beside a frozen linear layer: y = W x + b + s * B' C(x, t) A x."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import weight_of
from .dispatch import add_dispatched, pays
from .experts import Experts, LoRAExperts
from .gates import Gate
from .kept import Kept, infers
from .linear import Mixture, add, apply_lora, run
from .primitives import compute_dtype, exactly
from .routers import Router
from .site import Site

BY_TASK = frozenset({"task"})
MOST_KEPT = 8  # LoRAs that inference keeps of a layer whose gate the task decides; further tasks run unfolded


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
        self._loras: Kept[tuple[frozenset[str], dict[int, tuple[Tensor, Tensor]]]] = Kept()
        self._thin: Kept[tuple[Tensor, int, Tensor]] = Kept()
        self._gates: Kept[Tensor] = Kept()

    def forward(self, x: Tensor) -> Tensor:
        if infers() and not self.training:
            return self._infer(x)
        if not torch.compiler.is_compiling():
            self._drop_kept()
        a, b = self._weights()
        y, z = self.shrink(x, *a)
        return add(self.base, y, self.mix(x, z, len(a[0]), self.site), b, self.scale)

    def _weights(self) -> tuple[list[Tensor], Tensor]:
        """A and the router's rows, and B."""
        a, rows = self.experts.down(), None if self.router is None else self.router.rows()
        return ([a] if rows is None else [a, rows]), self.experts.up(self.base)

    def _infer(self, x: Tensor) -> Tensor:
        """The forward without gradients: what does not depend on x is computed once, as long as no weight changes."""
        dtype, parts = compute_dtype(x), tuple(self._modules.values())
        reads, loras = self._loras((dtype, self.scale), parts, lambda: (self.reads, {}))
        if reads <= BY_TASK:  # one linear function of each task
            task = self.site.task(x) if reads else 0
            if task is not None and (task in loras or len(loras) < MOST_KEPT):
                if task not in loras:
                    loras[task] = self._folded(task, dtype)
                return apply_lora(self.base, x, *loras[task])
        a, rank, b = self._thin((dtype, self.scale), parts, lambda: self._in_inference(dtype))
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

    def _drop_kept(self) -> None:
        self._loras.drop()
        self._thin.drop()
        self._gates.drop()

    @abstractmethod
    def shrink(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen product (..., O), and the thin products (..., R + n) with A (R, I) and a router's rows (n, I)."""

    def mix(self, x: Tensor, z: Tensor, rank: int, site: Site) -> Tensor:
        """The rank side without the scale: q = C(x, t) z, (..., R')."""
        if self.router is None:
            return self.experts.core(z, None, site)
        if not self.training and infers() and self.router.reads == BY_TASK and site.context.tasks:
            parts = self.router, self.gate
            every = self._gates(
                (site.context.tasks, compute_dtype(x)), parts, lambda: self._gate_of_each_task(x)
            )  # (T, E)
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
        with exactly(weight_of(self.base)):
            return self._task_lora(task)

    def _task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        a, training = self.experts.down(), self.training
        eye, site = torch.eye(len(a), device=a.device, dtype=a.dtype), self.site.on(task, a.device)
        fixed = None if self.gate is None else self.gate.fixed()
        self.eval()  # no noise in a merged weight
        q = self.mix(eye, eye, len(a), site) if fixed is None else self.experts.core(eye, fixed, site)
        self.train(training)
        return a, self.scale * q @ self.experts.up(self.base).to(a.dtype)

    @torch.no_grad()
    def gate_of(self, x: Tensor) -> Tensor:
        """What the router and the gate make of an input (..., I), within a forward: the weights (..., E).

        Raises:
            ValueError: a method whose layer has none.
        """
        if self.router is None:
            raise ValueError(f"{self.site.name}: it has no gate")
        rows = self.router.rows()
        return self._weighed(x, x[..., :0] if rows is None else F.linear(x, rows.to(x.dtype)), self.site)

    @torch.no_grad()
    def lora_at(self, gate: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (R, O) of what the layer adds on a task where its gate (E,) is held fixed."""
        a = self.experts.down()
        eye = torch.eye(len(a), device=a.device, dtype=a.dtype)
        q = self.experts.core(eye, gate.to(a).expand(len(a), -1), self.site.on(task, a.device))
        return a, self.scale * q @ self.experts.up(self.base).to(a.dtype)

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

    def forward(self, x: Tensor) -> Tensor:
        if pays(self.experts, self.gate, x, compute_dtype(x)):
            return self._dispatched(x)
        return super().forward(x)

    def _dispatched(self, x: Tensor) -> Tensor:
        assert self.router is not None and self.gate is not None and isinstance(self.experts, LoRAExperts)
        rows = self.router.rows()
        y, z = run(self.base, x, self.experts.lora_A[:0] if rows is None else rows)
        k = self.gate.num_active(self.experts.num_experts)
        return add_dispatched(y, x, self._weighed(x, z, self.site), self.experts, k, self.scale)

    def shrink(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        return run(self.base, x, a, *rows)
