"""MoORE: SVD-based Model MoE-ization for Conflict- and Oblivion-Resistant Multi-Task Adaptation (NeurIPS 2025).

Yuan et al. https://arxiv.org/abs/2506.14436

    W = U diag(sigma) V',  thin SVD;  the experts are the rank-one u_d v_d'

    MoORE       y = U (g * V'P'x) + b,                      g = relu(sigma + Q e_t + G_up G x)
    MoORETopK   y = W P'x + b + U_k (delta * V_k'P'x),      delta = relu(sigma_k + Q e_t + G_up G x) - sigma_k

P is a product of L Householder reflections. The router reads x, not P'x. MoORE stands for W; MoORETopK keeps W and
routes the k largest directions: equal to MoORE whose other logits are zero, and P with delta at 0 is the base exactly.

Choose it if the change must stay in the range of W (the paper's second promise), and the adapter may stay in the model
or ``router="task"`` is enough. Choose MoORETopK if MoORE trains or computes too much, or a task has to leave as a LoRA.

Deviations from the released code, with the reason:
- P in compact WY form and folded into V; same product, fewer passes. The base's bias is kept (theirs is dropped).
- Directions with sigma below rounding have no expert (``null_directions="closed"``): relu(sigma + ...) would open them
  and leave Range(W), against the paper's second promise. ``"released"`` keeps them.
- U, sigma, V from an fp64 factorisation, and their fingerprint saved: router rows belong to directions in that order.
- One fp32 table of the adapter's own tasks per layer (theirs: bf16, 18 rows). ``router_dim`` D_s is 128 there for 4096
  features; ``router="sample"`` is the paper's wording (masked mean of the prompt), ``"token"`` what its code runs.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, MultipleOf
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Experts,
    Gate,
    Mixture,
    MixtureLinear,
    Reflections,
    Router,
    SampleRouter,
    Site,
    Sum,
    TaskEmbedding,
    TokenRouter,
    adapter_dtype,
    add,
    infers,
    weight_of,
)
from ..svd import Factors
from .base import STRICT, Method, singular_layers
from .singular import SingularLinear

Even = Annotated[int, Ge(2), MultipleOf(2)]
Level = Literal["token", "sample", "task"]


def _router(base: nn.Module, level: Level, num_tasks: int, task_dim: int, router_dim: int, num_experts: int) -> Router:
    by_task = TaskEmbedding(base, num_tasks, task_dim, num_experts)
    if level == "task":
        return by_task
    return Sum(by_task, {"token": TokenRouter, "sample": SampleRouter}[level](base, router_dim, num_experts))


class SingularDirections(Experts):
    """The k largest singular directions beside W, and W's own correction by P."""

    cancels = True  # at the start P = I only with all reflections

    def __init__(self, factors: Factors, reflections: Reflections) -> None:
        super().__init__()
        self.num_experts, self.reflections = len(factors.sigma), reflections
        self.u: Tensor
        self.vt: Tensor
        self.register_buffer("u", factors.u, persistent=False)  # (O, k)
        self.register_buffer("vt", factors.vt, persistent=False)  # (k, I)

    def down(self) -> Tensor:
        return torch.cat([self.reflections.factors()[0], self.vt])

    def up(self, base: nn.Module) -> Tensor:
        return torch.cat([self.correction(base, *self.reflections.factors()), self.u.t()])

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        turned, h = z.split((z.shape[-1] - self.num_experts, self.num_experts), -1)
        return torch.cat([turned, self.gated(turned, h, gate, *self.reflections.factors())], -1)

    def correction(self, base: nn.Module, rows: Tensor, core: Tensor) -> Tensor:
        """-core rows W', (L, O): what W P' adds to W."""
        weight = weight_of(base)
        return -core @ F.linear(rows.to(weight.dtype), weight).to(rows.dtype)

    def gated(self, turned: Tensor, h: Tensor, gate: Tensor, rows: Tensor, core: Tensor) -> Tensor:
        """gate * V_k'P'x of rows x and V_k'x."""
        return gate.to(h.dtype) * (h + F.linear(turned, (-core @ F.linear(rows, self.vt)).t().to(h.dtype)))


class TopSingularLinear(MixtureLinear):
    """The mixture of the k largest directions; a training step makes P once and no gradient of what is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if infers():
            return super().forward(x)
        experts, router = self.experts, self.router
        assert isinstance(experts, SingularDirections) and router is not None
        extra = router.rows()
        rows, core = experts.reflections.factors()
        y, z = self.shrink(x, rows, *([] if extra is None else [extra]), experts.vt)
        turned, read, h = z.split((len(rows), z.shape[-1] - len(rows) - len(experts.vt), len(experts.vt)), -1)
        q = experts.gated(turned, h, self._weighed(x, read, self.site), rows, core)
        y = add(self.base, y, turned, experts.correction(self.base, rows, core))
        return add(self.base, y, q, experts.u.t())


class Correction(Gate):
    """delta = relu(sigma + logits) - sigma: zero where the logits are."""

    def __init__(self, sigma: Tensor) -> None:
        super().__init__()
        self.sigma: Tensor
        self.register_buffer("sigma", sigma, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return torch.maximum(logits, -self.sigma.to(logits.dtype))

    def num_active(self, num_experts: int) -> int:
        return num_experts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoORE(Method):
    SIZE: ClassVar[str] = "num_reflections * I + task_dim * (T + K) + (router != 'task') * router_dim * (I + K)"

    num_reflections: Even = 8
    """L, an even number"""
    task_dim: PositiveInt = 64
    """the length of e_t"""
    router_dim: PositiveInt = 128
    """the rows of G"""
    router: Level = "token"
    """what g reads beside the task: each "token" (what the released code runs), the "sample" (the masked mean of the
    prompt: the paper's wording), or nothing, "task"
    """
    null_directions: Literal["closed", "released"] = "closed"
    """directions with sigma below rounding have no expert; "released" keeps them, and the change may leave Range(W)"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        def layer(base: nn.Module, factors: Factors) -> Mixture:
            weight = weight_of(base)
            turn = Reflections(weight.shape[1], self.num_reflections, weight.device, adapter_dtype(base))
            router = _router(base, self.router, len(tasks), self.task_dim, self.router_dim, len(factors.sigma))
            return SingularLinear(base, factors, turn, router)

        return singular_layers(sites, layer, closed=self.null_directions == "closed")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoORETopK(Method):
    SIZE: ClassVar[str] = (
        "num_reflections * I + task_dim * (T + min(k, K)) + (router != 'task') * router_dim * (I + min(k, K))"
    )

    k: PositiveInt = 32
    """how many directions"""
    num_reflections: Even = 8
    """L, an even number"""
    task_dim: PositiveInt = 64
    """the length of e_t"""
    router_dim: PositiveInt = 16
    """the rows of G"""
    router: Level = "token"
    """as in MoORE"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        def layer(base: nn.Module, factors: Factors) -> Mixture:
            weight, top = weight_of(base), factors.first(self.k)
            turn = Reflections(weight.shape[1], self.num_reflections, weight.device, adapter_dtype(base))
            router = _router(base, self.router, len(tasks), self.task_dim, self.router_dim, len(top.sigma))
            experts, gate = SingularDirections(top, turn), Correction(top.sigma)
            return TopSingularLinear(base, experts=experts, router=router, gate=gate)

        return singular_layers(sites, layer, closed=True)
