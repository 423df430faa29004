"""MoRE: A Mixture of Low-Rank Experts for Adaptive Multi-Task Learning (Zhang et al., ACL Findings 2025).

https://arxiv.org/abs/2505.22694

    y = W x + b + (alpha / R) pi_t sum_{i <= r_t} s_i b_i a_i'x,    p_t = softmax(W_g e_t + b_g),  r_t = argmax p_t
    pi_t = p_t[r_t] - sg(p_t[r_t]) + 1    (straight-through on the chosen probability only),    s_i = i / R
    loss += lambda * mean over layers and samples of -log softmax_k(cos(h, e_k) / tau)[t]
            h the masked mean of the layer's input

One LoRA pair trained by all tasks; expert i is its prefix of rank i. The gate is a constant of (layer, task), so each
task merges exactly. Mixed-task batches run in one pass by a prefix mask.

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
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import Gate, LoRAExperts, Mixture, MixtureLinear, Router, Site, adapter_dtype, in_out_features, weight_of
from ..mixture.context import Note
from .base import STRICT, Method

Pooling = Literal["mean", "first"]
Scaling = Literal["row", "none", "released"]
Start = Literal["full", "released"]
STEP = 0.05  # between the first logits of neighbouring ranks: a few times their random part


class RankSelector(Router):
    """W_g e_t + b_g, and the contrastive loss that ties e_t to the inputs of task t."""

    reads_input, reads_task = False, True

    def __init__(
        self, base: nn.Module, num_tasks: int, rank: int, temperature: float, pooling: Pooling, start: Start
    ) -> None:
        super().__init__()
        width = in_out_features(base)[0]
        place = {"device": weight_of(base).device, "dtype": adapter_dtype(base)}
        bound = (6 / width) ** 0.5  # kaiming_uniform for relu, as released
        self.embedding = nn.Parameter(0.01 * torch.randn(num_tasks, width, **place))
        self.proj = nn.Parameter(torch.empty(rank, width, **place).uniform_(-bound, bound))
        rising = STEP * torch.arange(rank, **place)
        self.bias = nn.Parameter(
            rising if start == "full" else torch.empty(rank, **place).uniform_(-(width**-0.5), width**-0.5)
        )
        self.temperature, self.pooling = temperature, pooling

    def rows(self) -> None:
        return None

    def logits(self) -> Tensor:
        return F.linear(self.embedding, self.proj, self.bias)  # (T, R)

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        ids = site.ids(x)
        if self.training and site.listens and self.temperature > 0:
            site.note("contrastive", self._contrastive(x, ids, site))
        return F.embedding(ids, self.logits())

    def _contrastive(self, x: Tensor, ids: Tensor, site: Site) -> Tensor:
        h = site.pool(x) if self.pooling == "mean" else x.reshape(len(x), -1, x.shape[-1])[:, 0]  # (B, I)
        near = F.normalize(h.to(self.embedding.dtype), dim=-1) @ F.normalize(self.embedding, dim=-1).t()
        target = ids.reshape(-1)[:: max(1, ids.numel() // len(h))].expand(len(h))
        return F.cross_entropy(near / self.temperature, target)

    def active_parameters(self) -> int:
        return self.embedding[0].numel() + self.proj.numel() + self.bias.numel()

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
    rank: PositiveInt = 8
    alpha: PositiveFloat = 32.0
    scaling: Scaling = "row"
    contrastive: NonNegativeFloat = 0.1
    temperature: PositiveFloat = 0.05
    pooling: Pooling = "mean"
    start: Start = "full"

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
        return {"contrastive": self.contrastive * torch.stack(values).mean()} if values else {}


def selected_ranks(layers: Mapping[str, Mixture]) -> dict[str, list[int]]:
    """The rank of each task, in the order of the tasks, by layer name. Layers of other methods are passed over."""
    selectors = {name: layer.router for name, layer in layers.items() if isinstance(layer, MixtureLinear)}
    return {
        name: (router.logits().argmax(-1) + 1).tolist()
        for name, router in selectors.items()
        if isinstance(router, RankSelector)
    }
