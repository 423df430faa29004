"""ASE: Adaptive Shared Experts with LoRA-Based Mixture of Experts for Multi-Task Learning (Yang et al., 2025).

https://arxiv.org/abs/2510.00570

    z = W_t x: S shared and N - S routed logits, one router for each task and layer;   K = top-k of the routed ones
    g = softmax over K and all shared ones, jointly;    y = W x + b + (alpha / r) sum_{e in K, shared} g_e B_e A_e x
    loss += 0.005 * sum over layers of -I(task; expert)     (Mod-Squad: experts should tell the tasks apart)

Adaptive shared experts beside sparse ones: every token of a task works with all shared experts and the k best others.
Choose it if tokens of one task need different experts, and the adapter may stay in the model: it never merges.

(N / k / S / r) counts N with the shared experts and k without them: 16/3/1/4 has 4 active. The paper's text also says
TopK(z, k - S); its table and ablations count as here. There is no released code.

``gate`` has the controls that the paper lacks, all at the same parameters:
- "joint": ASE.  "renormalised": top-k, then softmax over the chosen, no shared expert (num_shared = 0).
- "baseline": the paper's LoRA-MoE, softmax over all, then top-k: active gates sum to less than 1 (num_shared = 0).
- "naive_shared": the baseline, and shared experts with gate 1.

Choices where the paper is silent: A and the routers as nn.Linear's default, B zero; alpha = r (no scaling is
mentioned); the mutual information is over the routed experts, on softmax(z), padding left out. Deviations: experts
bracket each adapted linear layer, where the paper has them beside a whole feed-forward network; the task embedding
added to the image is the dense model's part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Around,
    Gate,
    JointTopK,
    LoRAExperts,
    Mixture,
    MixtureLinear,
    NaiveShared,
    Note,
    PerTaskRouter,
    Site,
    SoftmaxTopK,
    mutual_information,
)
from .base import STRICT, Method


class JointWatched(Around):
    """Another gate that notes the softmax mass of the routed experts by task, summed over the tokens: (T, E - S)."""

    def __init__(self, gate: Gate, num_tasks: int, num_shared: int) -> None:
        super().__init__(gate)
        self.num_tasks, self.num_shared = num_tasks, num_shared

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        if site.per_token:  # requests flattened into a row
            return
        ids, mask = site.ids(logits).reshape(-1), site.mask(logits)
        p = F.softmax(logits[..., self.num_shared :], -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        p = p.reshape(len(ids), -1, p.shape[-1])
        if mask is not None:
            p = p * mask.reshape(len(ids), -1, 1).to(p)
        site.note("joint", p.new_zeros(self.num_tasks, p.shape[-1]).index_add(0, ids, p.sum(1)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ASE(Method):
    SIZE: ClassVar[str] = "num_experts * (rank * (I + O) + T * I)"
    NOTES = "sums"

    num_experts: PositiveInt = 16
    """N, the shared ones included"""
    k: PositiveInt = 3
    """how many routed experts are active"""
    num_shared: NonNegativeInt = 1
    """S"""
    rank: PositiveInt = 4
    """r, of each expert"""
    alpha: PositiveFloat = 4.0
    """the scale is alpha / r"""
    gate: Literal["joint", "renormalised", "baseline", "naive_shared"] = "joint"
    """the paper's gate, or one of its controls"""
    mutual_information: NonNegativeFloat = 0.005
    """the weight of the loss; 0 turns it off"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.num_experts - self.num_shared:
            raise ValueError(
                f"k={self.k} of {self.num_experts - self.num_shared} routed experts: lower k or num_shared, or add "
                "experts"
            )
        if (self.num_shared > 0) != (self.gate in ("joint", "naive_shared")):
            raise ValueError(
                f"gate={self.gate!r} with num_shared={self.num_shared}: 'joint' and 'naive_shared' need shared "
                "experts, the others have none"
            )
        return self

    def finer(self, factor: int) -> "ASE":
        """The same budget in finer grains: 16/3/1/4 becomes 32/6/2/2 and 64/12/4/1. ``factor`` divides the rank."""
        if factor < 1 or self.rank % factor:
            raise ValueError(f"rank {self.rank} is not divisible by {factor}")
        return replace(
            self, num_experts=self.num_experts * factor, k=self.k * factor, num_shared=self.num_shared * factor,
            rank=self.rank // factor, alpha=self.alpha / factor,
        )  # fmt: skip

    def _gate(self, num_tasks: int) -> Gate:
        gate: Gate = JointTopK(self.k, self.num_shared)
        if self.gate == "baseline":
            gate = SoftmaxTopK(self.k)
        elif self.gate == "naive_shared":
            gate = NaiveShared(self.k, self.num_shared)
        return JointWatched(gate, num_tasks, self.num_shared) if self.mutual_information else gate

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base,
                experts=LoRAExperts(base, self.num_experts, self.rank),
                router=PerTaskRouter(base, len(tasks), self.num_experts),
                gate=self._gate(len(tasks)),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        joints = [joint for _, joint in notes.get("joint", ())]
        if not joints:
            return {}
        stacked = torch.stack(joints)  # (layers, T, E - S)
        stacked = stacked / stacked.sum((-2, -1), keepdim=True).clamp_min(1e-9)
        return {"mutual_information": -self.mutual_information * mutual_information(stacked).sum()}
