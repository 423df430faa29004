"""EMTAL: Free Lunch for Multi-Task Learning by Parameter-Efficient Expert Mixtures (Zhong et al., NeurIPS 2024).

https://arxiv.org/abs/2501.06884

    y = sum_{e <= K} D_e act(w_e (U_e x + c_e)) + d,     w = a K softmax(G x / tau) + (1 - a)
    U' = U + (alpha / r) B A, cut into K groups of hidden units (U_e, c_e, D_e);  D' = D + (alpha / r) B A likewise

The hidden units of a frozen feed-forward block are its experts: balanced k-means cuts the rows of U into K groups of
one size, and the gate of each token multiplies a group *before* the activation. *Router fading* takes a from 1 to 0
while the model trains: then w = 1, the router is gone, and `merge` gives one plain weight for each layer, exactly.
Other targeted layers (attention) get a plain LoRA.

Choose it if the model must leave as a plain one, without any cost, and yet learn with a mixture. The paper adds a loss
that keeps what a task has learnt: `quality_retaining` in the training's settings.

Deviations from the released code:
- G starts at zero, so that w = 1 and the model starts as the base (theirs starts at random), and B at zero
  (`start: released` draws A and B from N(0, 0.02^2), which does not start as the base).
- The units stay where they are and the gate is spread over them (theirs permutes the weights on disk before training).
- In a gated block, act(V x) * U x, it is the rows of V that are grouped, and w multiplies V x.
- One LoRA for each whole layer, as the code and the paper's parameter counts have it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..clusters import balanced_clusters
from ..mixture import FeedForward, FeedForwardMixture, LoRAExperts, Mixture, add, place, run, weight_of, zeros
from .base import NOT_FADED, STRICT, BlockMethod, check_fade, check_plain, check_units, share_left


class GroupedFeedForward(FeedForwardMixture):
    """A frozen block with LoRAs, whose groups of hidden units are gated before the activation."""

    cure = NOT_FADED

    def __init__(self, base: FeedForward, num_experts: int, rank: int, temperature: float, scale: float) -> None:
        super().__init__(base)
        self.num_experts, self.temperature, self.scale = num_experts, temperature, scale
        self.up, self.down = LoRAExperts(base.up, 1, rank), LoRAExperts(base.down, 1, rank)
        self.side = None if base.gate is None else LoRAExperts(base.gate, 1, rank)
        self.router = zeros(base.up, num_experts, base.sizes[0])
        check_plain("feed-forward block", base.gate or base.up, "groups the rows of the weight itself")
        groups = balanced_clusters(weight_of(base.gate or base.up), num_experts)  # (H,)
        self.groups = nn.Parameter(groups, requires_grad=False)
        self.kept = nn.Parameter(torch.ones((), **place(base.up)), requires_grad=False)  # a

    def forward(self, x: Tensor) -> Tensor:
        base, rank = self.base, len(self.up.lora_A)
        h, z = run(base.up, x, torch.cat([self.up.lora_A, self.router]))
        weights = F.softmax(z[..., rank:].to(self.kept.dtype) / self.temperature, -1) * self.num_experts  # (..., K)
        weights = self.kept * weights + (1 - self.kept)
        h = add(base.up, h, z[..., :rank] * self.scale, self.up.lora_B)
        units = weights.to(h.dtype)[..., self.groups]  # (..., H)
        if base.gate is None or self.side is None:
            hidden = base.activate(units * h, None)
        else:
            v, z = run(base.gate, x, self.side.lora_A)
            hidden = base.activate(h, units * add(base.gate, v, z * self.scale, self.side.lora_B))
        y, z = run(base.down, hidden, self.down.lora_A)
        return base.outer(add(base.down, y, z * self.scale, self.down.lora_B))

    def _pairs(self) -> list[LoRAExperts]:
        return [self.up, self.down] if self.side is None else [self.up, self.side, self.down]

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"token"}) if float(self.kept) else frozenset()

    @torch.no_grad()
    def task_weights(self, task: int) -> list[tuple[nn.Module, Tensor]]:
        return [(base, weight_of(base).to(a.dtype) + b.t() @ a) for base, a, b in self.task_loras(task)]

    @torch.no_grad()
    def task_loras(self, task: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
        self.refuse_if_input_routed()
        pairs = zip(self.base.linears(), self._pairs(), strict=True)
        return [(base, pair.lora_A, self.scale * pair.lora_B) for base, pair in pairs]

    def active_parameters(self) -> int:
        return sum(p.numel() for pair in self._pairs() for p in pair.parameters()) + self.router.numel()

    def flops_per_token(self) -> int:
        return self.base_flops_per_token() + 2 * self.active_parameters()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EMTAL(BlockMethod):
    SIZE: ClassVar[str] = "rank * ((1 + G) * (I + H) + H + O) + num_experts * I"

    num_experts: PositiveInt = 16
    """K, the groups of hidden units; it divides their number"""
    rank: PositiveInt = 4
    """r"""
    alpha: PositiveFloat = 4.0
    """the scale is alpha / r"""
    temperature: PositiveFloat = 5.0
    """tau"""
    fade: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(le=1)]] = (0.0, 0.5)
    """the shares of the training between which a falls from 1 to 0"""
    start: Literal["base", "released"] = "base"
    """where the LoRAs start"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_fade(self.fade)
        return self

    @property
    def starts_as_base(self) -> bool:
        return self.start == "base"

    @property
    def settles(self) -> float:
        return self.fade[1]

    def block(self, base: FeedForward, tasks: Sequence[str]) -> GroupedFeedForward:
        check_units(self.num_experts, base)
        layer = GroupedFeedForward(base, self.num_experts, self.rank, self.temperature, self.alpha / self.rank)
        if self.start == "released":
            for pair in layer._pairs():
                nn.init.normal_(pair.lora_A, std=0.02)
                nn.init.normal_(pair.lora_B, std=0.02)
        return layer

    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        for layer in layers.values():
            if isinstance(layer, GroupedFeedForward):
                layer.kept.fill_(share_left(done, self.fade))
