"""LoRAMoE: Alleviating World Knowledge Forgetting in Large Language Models via MoE-Style Plugin (Dou et al., ACL 2024).

https://arxiv.org/abs/2312.09979

    y = W x + b + (alpha / r) sum_{i <= N} g_i B_i A_i x,    g = softmax(G x)
    loss += balance * mean over layers of var(Z) / mean(Z)^2
            Z[i, n] = (1 - delta if expert i and sample n are of one kind, else 1 + delta) * mean over n's tokens of g_i

Every token asks all experts. The localized balance loss ties one half of the experts to the tasks of one kind (world
knowledge) and the other half to the rest: at its minimum a sample's own half has (1 + delta) / 2 of the weight.

Choose it if some tasks are there to keep what the model knows. The paper adapts the feed-forward layers alone.

Deviations from the released code:
- The balance loss is on (their script sets its coefficient to 0), the mean over layers, over all processes.
- Their delta has the other sign, which at the minimum gives a sample's own half less weight, not more.
- g_i is averaged over a sample's tokens, padding left out (theirs sums over all, so that lengths count as imbalance).
  The variance is the population's (theirs divides by one less).
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import (
    Gate,
    LinearRouter,
    LoRAExperts,
    Mixture,
    MixtureLinear,
    Note,
    Site,
    Softmax,
    weight_of,
)
from .base import STRICT, Method


class Localized(Gate):
    """Dense softmax that notes number, sum and sum of squares of Z."""

    def __init__(self, kinds: Tensor | None, num_experts: int, delta: float, device: torch.device) -> None:
        """kinds: (T,), 0 or 1 for each task; None where tasks have no kinds."""
        super().__init__()
        self.softmax, self.delta = Softmax(), delta
        self.kinds: Tensor | None
        self.second: Tensor
        self.register_buffer("kinds", None if kinds is None else kinds.to(device), persistent=False)
        second = torch.arange(num_experts, device=device) >= (num_experts + 1) // 2
        self.register_buffer("second", second, persistent=False)  # (E,)

    def forward(self, logits: Tensor) -> Tensor:
        return self.softmax(logits)

    def num_active(self, num_experts: int) -> int:
        return num_experts

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        if site.per_token:  # requests flattened into a row: no sample to speak of
            return
        samples, mask = site.samples(weights), site.mask(weights)
        weights = weights.reshape(samples, -1, weights.shape[-1])  # (B, L, E)
        counts = torch.ones_like(weights[..., :1]) if mask is None else mask.reshape(samples, -1, 1).to(weights)
        z = (weights * counts).sum(1) / counts.sum(1).clamp_min(1)  # (B, E)
        if self.kinds is not None:
            if site.context.route.task_ids is None:
                raise ValueError(f"{site.name}: LoRAMoE's `knowledge` names tasks: give task_ids in training")
            kinds = self.kinds.to(z.device)[site.ids(weights).reshape(-1)]
            agree = (kinds.unsqueeze(1) == self.second.to(z.device)).to(z.dtype)
            z = z * (1 + self.delta - 2 * self.delta * agree)
        site.note("importance", torch.stack([torch.full_like(z, 1).sum(), z.sum(), z.square().sum()]))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRAMoE(Method):
    SIZE: ClassVar[str] = "num_experts * (rank * (I + O) + I)"
    NOTES = "sums"

    num_experts: PositiveInt = 8
    """N"""
    rank: PositiveInt = 4
    """r, of each expert"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / r"""
    balance: NonNegativeFloat = 0.01
    """the weight of the localized balance loss; 0 turns it off"""
    delta: NonNegativeFloat = 0.1
    """how far the loss lets the two halves of the experts differ"""
    knowledge: tuple[str, ...] = ()
    """the tasks of the first kind, for the first half of the experts; without any the loss is a plain balance"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        unknown = set(self.knowledge) - set(tasks)
        if unknown:
            raise ValueError(f"knowledge names {sorted(unknown)}, the tasks are {list(tasks)}: name some of them")
        kinds = torch.tensor([task not in self.knowledge for task in tasks]) if self.knowledge else None

        def gate(base: nn.Module) -> Gate:
            return Localized(kinds, self.num_experts, self.delta, weight_of(base).device) if self.balance else Softmax()

        return {
            name: MixtureLinear(
                base,
                experts=LoRAExperts(base, self.num_experts, self.rank),
                router=LinearRouter(base, self.num_experts),
                gate=gate(base),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        values = [value for _, value in notes.get("importance", ())]
        if not values:
            return {}
        count, total, squares = torch.stack(values).unbind(-1)  # (layers,) each
        mean = total / count
        spread = (squares / count - mean**2).clamp_min(0) / mean.clamp_min(1e-9) ** 2
        return {"balance": self.balance * spread.mean()}
