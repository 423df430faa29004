"""MoRE: A Mixture of Low-Rank Experts for Adaptive Multi-Task Learning (Zhang et al., ACL Findings 2025).

https://arxiv.org/abs/2505.22694

    y = W x + b + (alpha / R) pi_t sum_{i <= r_t} s_i b_i a_i'x,    p_t = softmax(W_g e_t + b_g),  r_t = argmax p_t
    pi_t = p_t[r_t] - sg(p_t[r_t]) + 1    (straight-through on the chosen probability only),    s_i = i / R
    loss += lambda * mean over layers and samples of -log softmax_k(cos(h, e_k) / tau)[t]
            h the masked mean of the layer's input

One LoRA pair trained by all tasks; expert i is its prefix of rank i, and each task picks its own rank in each layer.
The gate is a constant of (layer, task), so each task merges exactly. Mixed batches run in one pass by a prefix mask.

Choose it if the tasks need different ranks, and each has to leave as a plain model in the end.

Deviations from the released code, with the reason:
- The selector is live: every released version freezes it at its random start (its training branch is never reached).
- The contrastive term covers all adapted layers (theirs counts the encoder twice and drops the decoder), and h is the
  masked mean; ``pooling="first"`` is the released token 0.
- Every task starts at the full rank: b_g rises with i (``start="full"``). A closed row sends no gradient to the
  selector, so a chosen-only straight-through can shrink a rank that conflicts but never see that more would help: from
  the released random start (``"released"``) ranks change as often away from the need as towards it.
- s_i on one factor, as the paper's "linear scaling"; ``scaling="released"`` puts i/R on both, ``"none"`` on neither.
- Task and rank counts are free (theirs: 8 and 8). Dropout is 0 (theirs 0.1 on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Gate,
    Kept,
    LoRAExperts,
    LowRankMixture,
    Mixture,
    MixtureLinear,
    Note,
    Router,
    Site,
    TaskTable,
    exact_linear,
    in_out_features,
    infers,
    normal,
    place,
    uniform,
)
from .base import STRICT, Method

Pooling = Literal["mean", "first"]
Scaling = Literal["row", "none", "released"]
Start = Literal["full", "released"]
STEP = 0.05  # between the first logits of neighbouring ranks: a few times their random part


class RankSelector(Router):
    """W_g e_t + b_g, and the contrastive loss that ties e_t to the inputs of task t."""

    reads = frozenset({"task"})

    def __init__(
        self, base: nn.Module, num_tasks: int, rank: int, temperature: float, pooling: Pooling, start: Start
    ) -> None:
        super().__init__()
        width = in_out_features(base)[0]
        self.embedding = TaskTable(normal(base, num_tasks, width, std=0.01))
        self.proj = uniform(base, rank, width, bound=(6 / width) ** 0.5)  # kaiming_uniform for relu, as released
        rising = STEP * torch.arange(rank, **place(base))
        self.bias = nn.Parameter(rising) if start == "full" else uniform(base, rank, bound=width**-0.5)
        self.temperature, self.pooling = temperature, pooling
        self._table: Kept[Tensor] = Kept()

    def rows(self) -> None:
        return None

    def logits(self) -> Tensor:
        return torch.stack([exact_linear(e, self.proj, self.bias) for e in self.embedding.each()])  # (T, R)

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        ids = site.ids(x)
        if self.training and site.listens and self.temperature > 0:
            site.note("contrastive", self._contrastive(x, ids, site))
        if infers() or site.per_token:
            return F.embedding(ids, self._table(None, (self,), self.logits))
        return exact_linear(F.embedding(ids, self.embedding()), self.proj, self.bias)

    def _contrastive(self, x: Tensor, ids: Tensor, site: Site) -> Tensor:
        h = site.pool(x) if self.pooling == "mean" else x.reshape(len(x), -1, x.shape[-1])[:, 0]  # (B, I)
        tasks = self.embedding()
        near = F.normalize(h.to(tasks.dtype), dim=-1) @ F.normalize(tasks, dim=-1).t()
        target = ids.reshape(-1)[:: max(1, ids.numel() // len(h))].expand(len(h))
        total = F.cross_entropy(near / self.temperature, target, reduction="sum")
        return torch.stack([total, torch.full_like(total, len(h))])

    def active_parameters(self) -> int:
        return self.embedding.row_numel() + self.proj.numel() + self.bias.numel()

    def flops_per_token(self) -> int:
        return 0


class Nested(Gate):
    """The first r rank-one experts, r the chosen one: straight-through on the chosen probability only."""

    def __init__(self, rank: int, scaling: Scaling, like: Tensor) -> None:
        super().__init__()
        steps = torch.arange(1, rank + 1, device=like.device, dtype=like.dtype)
        self.steps: Tensor
        self.scales: Tensor
        self.register_buffer("steps", steps, persistent=False)
        power = {"none": 0, "row": 1, "released": 2}[scaling]
        self.register_buffer("scales", (steps / rank) ** power, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        chosen, index = F.softmax(logits, -1).max(-1, keepdim=True)
        through = chosen - chosen.detach() + 1  # value 1, gradient of p_t[r_t]
        return through * (self.scales * (self.steps <= index + 1))

    def num_active(self, num_experts: int) -> int:
        return num_experts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoRE(Method):
    SIZE: ClassVar[str] = "rank * (I + O) + T * I + rank * (I + 1)"
    NOTES = "sums"

    rank: PositiveInt = 8
    """R, the largest rank"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / R"""
    scaling: Scaling = "row"
    """s_i: "row" is i / R on one factor, "released" puts i / R on both, "none" on neither"""
    contrastive: NonNegativeFloat = 0.1
    """lambda; 0 turns the contrastive loss off"""
    temperature: PositiveFloat = 0.05
    """tau"""
    pooling: Pooling = "mean"
    """h: the masked "mean" of the layer's input, or its "first" token, as released"""
    start: Start = "full"
    """every task starts at the full rank; "released" is the random start of the released code"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            experts = LoRAExperts(base, num_experts=self.rank, rank=1)
            temperature = self.temperature if self.contrastive else 0.0
            layers[name] = MixtureLinear(
                base,
                experts=experts,
                router=RankSelector(base, len(tasks), self.rank, temperature, self.pooling, self.start),
                gate=Nested(self.rank, self.scaling, experts.lora_A),
                scale=self.alpha / self.rank,
            )
        return layers

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        values = [value for _, value in notes.get("contrastive", ())]
        if not values:
            return {}
        total, count = torch.stack(values).unbind(-1)  # (layers,) each
        return {"contrastive": self.contrastive * (total / count).mean()}


def selected_ranks(layers: Mapping[str, Mixture]) -> dict[str, list[int]]:
    """The rank of each task, in the order of the tasks, by layer name. Layers of other methods are passed over."""
    selectors = {name: layer.router for name, layer in layers.items() if isinstance(layer, LowRankMixture)}
    return {
        name: (router.logits().argmax(-1) + 1).tolist()
        for name, router in selectors.items()
        if isinstance(router, RankSelector)
    }
