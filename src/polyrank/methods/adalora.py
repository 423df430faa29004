"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., ICLR 2023).

https://arxiv.org/abs/2303.10512

    y = W x + b + (alpha / r) P diag(lambda) Q x
    loss += gamma * mean over layers of (|P' P - I|^2 + |Q Q' - I|^2)
    s(w) = EMA(I) EMA(|I - EMA(I)|),    I = |w dL/dw|
    s_i = s(lambda_i) + mean s(P_i) + mean s(Q_i),    triplet i of a layer: column P_i, row Q_i
    after each step    lambda_i = 0, but for the n triplets of all L layers whose s_i are the largest
    n = L (target + (r - target) (1 - u)^3),    u from 0 to 1 between `begin` and `end` of the training

The layers share a budget of ranks: all start with r, and in the end those that matter more have kept more. A triplet
that was pruned keeps P_i and Q_i and may come back until `end`.

Choose it instead of LoRA if the layers should not all have the same rank, but you do not know which needs more. P_i and
Q_i keep about unit length, so lambda alone sets the size of the change: lr may have to be larger than LoRA's.

What importance rests on is kept with the weights, so that a resumed run decides as an uninterrupted one: the saved
adapter is three times the size of its weights.

Deviations from the released code:
- The loss has the paper's squares (theirs has the norms themselves).
- Triplets are chosen after every step (theirs every 10 or 100 in the authors' examples, every one by default in PEFT).
- I is of the weights and gradients of one step, before gradients are clipped (theirs has the weights after the step).
- Exactly n triplets live (theirs cuts at a threshold, so ties go together). begin and end are shares (theirs steps).
- The scale is alpha / r (theirs alpha / (r + 1e-5)). Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Experts, LowRankMixture, Mixture, MixtureLinear, Note, Site, in_out_features, normal, place, zeros
from .base import STRICT, Method

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Triplets(Experts):
    """P diag(lambda) Q, which of its ranks live, and what importance rests on; only the weights are trained."""

    num_experts = 1

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_out_features(base)
        self.lora_A = normal(base, rank, self.in_features, std=0.02)  # Q
        self.lora_B = normal(base, rank, self.out_features, std=0.02)  # P'
        self.lora_E = zeros(base, rank)  # lambda
        self.live = nn.Parameter(torch.ones(rank, **place(base)), requires_grad=False)
        numel = 1 + self.in_features + self.out_features  # of a triplet: lambda_i, Q_i, P_i
        self.sensitivity = zeros(base, rank, numel).requires_grad_(False)  # EMA(I)
        self.uncertainty = zeros(base, rank, numel).requires_grad_(False)  # EMA(|I - EMA(I)|)

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        if self.training and site.listens:
            site.note("factors", self.lora_A)
            site.note("factors", self.lora_B)
        return z * self.lora_E.to(z.dtype)

    def measured(self) -> Tensor:
        """I of this step's gradients, (R, 1 + I + O)."""
        weights = self.lora_E, self.lora_A, self.lora_B
        products = [torch.zeros_like(w) if w.grad is None else w * w.grad for w in weights]
        return torch.column_stack(products).abs()

    def remember(self, measured: Tensor, beta1: float, beta2: float) -> None:
        self.sensitivity.lerp_(measured, 1 - beta1)
        self.uncertainty.lerp_((measured - self.sensitivity).abs(), 1 - beta2)

    def importance(self) -> Tensor:
        """s_i, (R,)."""
        of_each = self.sensitivity * self.uncertainty
        lambdas, q, p = of_each.split([1, self.in_features, self.out_features], 1)
        return lambdas.squeeze(1) + q.mean(1) + p.mean(1)

    def active_parameters(self, num_active: int) -> int:
        return int(self.live.sum()) * (1 + self.in_features + self.out_features)


def triplets(layers: Mapping[str, Mixture]) -> list[Triplets]:
    found = [layer.experts for layer in layers.values() if isinstance(layer, LowRankMixture)]
    return [experts for experts in found if isinstance(experts, Triplets)]


def together(of_layers: Sequence[Tensor]) -> Tensor:
    """One vector, on the first layer's device."""
    return torch.cat([one.to(of_layers[0].device) for one in of_layers])


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """|M M' - I|^2 of M (R, n), in its own precision."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.t() - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().sum()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaLoRA(Method):
    SIZE: ClassVar[str] = "init_rank * (I + O + 1)"

    init_rank: PositiveInt = 12
    """r, of every layer at first"""
    target_rank: PositiveInt = 8
    """of a layer in the end, on average"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    begin: Share = 0.1
    """the share of the training after which the budget falls"""
    end: Share = 0.5
    """the share of the training after which it has reached its target and the choice stays"""
    beta1: Decay = 0.85
    """how long sensitivity remembers"""
    beta2: Decay = 0.85
    """how long uncertainty remembers"""
    orthogonality: NonNegativeFloat = 0.1
    """gamma; 0 turns the loss off"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target_rank > self.init_rank:
            raise ValueError(f"target_rank={self.target_rank} is above init_rank={self.init_rank}: ranks only fall")
        if self.begin > self.end:
            raise ValueError(f"begin={self.begin} is after end={self.end}: the budget falls between the two")
        return self

    @property
    def settles(self) -> float:
        return self.end

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(base, experts=Triplets(base, self.init_rank), scale=self.alpha / self.init_rank)
            for name, base in sites.items()
        }

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        each = [distance_from_orthonormal(rows) for _, rows in notes.get("factors", ())]  # two of a layer
        return {"orthogonality": self.orthogonality * 2 * torch.stack(each).mean()} if each else {}

    def budget(self, num_layers: int, done: float) -> int:
        """How many triplets of all layers live, when ``done`` of the training lies behind."""
        first, last = num_layers * self.init_rank, num_layers * self.target_rank
        if done < self.begin:
            return first
        if done >= self.end:
            return last
        return last + int((first - last) * (1 - (done - self.begin) / (self.end - self.begin)) ** 3)

    @torch.no_grad()
    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        every = triplets(layers)
        live = together([experts.live for experts in every])
        budget = self.budget(len(every), done)
        if done >= self.end and live.sum() <= budget:
            return  # the choice stays
        measured = [experts.measured() for experts in every]
        if not together([one.sum(1) for one in measured]).isfinite().all():
            return  # such a step is not taken, and nothing of it is remembered
        for experts, one in zip(every, measured, strict=True):
            experts.remember(one, self.beta1, self.beta2)
        order = together([experts.importance() for experts in every]).argsort(descending=True, stable=True)
        live = torch.zeros_like(live).index_fill(0, order[:budget], 1.0)
        for experts, own in zip(every, live.split(self.init_rank), strict=True):
            experts.live.copy_(own)

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        for experts in triplets(layers):
            experts.lora_E.mul_(experts.live)
