"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-Based Mixture of Experts (Li et al., 2024).

https://arxiv.org/abs/2404.15159

    y = sum_{i <= N} g_i FFN_i(x),    g = gate(softmax(G x))
    FFN_i(x) = D_i act(U_i x)  or  D_i (act(V_i x) * U_i x),   with  U_i = U + (alpha / r) B_i A_i, so D_i and V_i
    loss += balance N sum_i f_i P_i + z_loss mean(logsumexp(G x)^2)

N copies of a frozen feed-forward block, each with LoRAs of its own, behind one router: they join after the
nonlinearity. Other targeted layers (attention) get a plain LoRA. The gate keeps the k best experts and makes their
weights sum to 1 (`top_k`); or as many as reach the probability p together (`top_p`); or the best one (`switch`). The
last two leave the softmax's weights as they are, so that the block starts as a part of itself.

The frozen products run once a token, not once an expert: U x and V x are common, and D is linear, so that it is
multiplied with the weighted sum of the experts' hidden units.

Choose it if updates beside single layers are too weak, and merging is not needed. The paper has N = 8, k = 2.

Deviations from the released code:
- No capacity of an expert (`switch` there lets 32 tokens a row through, and the others skip the block): a token would
  depend on its neighbours. No jitter, no temperature of `top_p`.
- `switch` weighs with the probability in evaluation too (theirs only in training).
- The balance loss is the mean over layers of each layer's own, its f sums to 1 and counts the experts that were chosen
  by any of the three gates (theirs sums to k, and pools all layers' tokens first). Dropout is 0.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from ..mixture import (
    Around,
    FeedForward,
    FeedForwardMixture,
    Gate,
    JointTopK,
    LinearRouter,
    LoRAExperts,
    Note,
    Site,
    Softmax,
    SoftmaxTopK,
    Watched,
    add,
    run,
)
from .base import STRICT, BlockMethod, balance_loss


class TopP(Gate):
    """The most probable experts, as few as reach the probability p together, with the softmax's weights."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.softmax = p, Softmax()

    def forward(self, logits: Tensor) -> Tensor:
        ordered, places = self.softmax(logits).sort(-1, descending=True)
        enough = ordered.cumsum(-1) - ordered >= self.p  # those before it are enough
        return torch.zeros_like(ordered).scatter(-1, places, ordered.masked_fill(enough, 0))

    def num_active(self, num_experts: int) -> int:
        return num_experts


class LogitsWatched(Around):
    """Another gate that also notes how large its logits are: sum and number of logsumexp(z)^2; padding is left out."""

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        self.gate.watch(logits, weights, site)
        squares = logits.to(weights.dtype).logsumexp(-1).square()  # (...)
        mask = site.mask(logits)
        counts = torch.ones_like(squares) if mask is None else mask.reshape(squares.shape).to(squares)
        site.note("z", torch.stack([(squares * counts).sum(), counts.sum()]))


class MixtureFeedForward(FeedForwardMixture):
    """E copies of a frozen block with LoRAs of their own; the frozen products run once a token."""

    def __init__(self, base: FeedForward, num_experts: int, rank: int, gate: Gate, scale: float, std: float) -> None:
        super().__init__(base)
        self.num_experts, self.scale, self.gate = num_experts, scale, gate
        self.up, self.down = LoRAExperts(base.up, num_experts, rank), LoRAExperts(base.down, num_experts, rank)
        self.side = None if base.gate is None else LoRAExperts(base.gate, num_experts, rank)
        self.router = LinearRouter(base.up, num_experts, std)

    def forward(self, x: Tensor) -> Tensor:
        base, rank = self.base, len(self.up.lora_A)
        h, z = run(base.up, x, torch.cat([self.up.lora_A, self.router.weight]))  # (..., H), (..., R + E)
        g, v = (None, None) if base.gate is None or self.side is None else run(base.gate, x, self.side.lora_A)
        logits, z = z[..., rank:], z[..., :rank] * self.scale
        weights = self.gate(logits)  # (..., E)
        if self.training and self.site.listens:
            self.gate.watch(logits, weights, self.site)
        best = weights.topk(self.gate.num_active(self.num_experts), -1)
        hidden, thin = torch.zeros_like(h), z.new_zeros(*z.shape[:-1], len(self.down.lora_A))
        for one, weight in zip(best.indices.unbind(-1), best.values.to(h.dtype).unsqueeze(-2).unbind(-1), strict=True):
            chosen = F.one_hot(one, self.num_experts)  # (..., E): one expert a token
            up = h + self.up.core(z, chosen, self.site) @ self.up.lora_B.to(h.dtype)
            gate = None
            if g is not None and v is not None and self.side is not None:
                gate = g + self.side.core(v * self.scale, chosen, self.site) @ self.side.lora_B.to(h.dtype)
            a = weight * base.activate(up, gate)  # (..., H)
            hidden = hidden + a
            thin = thin + self.down.core(F.linear(a, self.down.lora_A.to(a.dtype)), chosen, self.site)
        return base.outer(self._project(hidden, thin * self.scale, weights))

    def _project(self, hidden: Tensor, thin: Tensor, weights: Tensor) -> Tensor:
        """D hidden, with the bias as often as the weights say; thin (..., R)."""
        down, bias, b = self.base.down, self.bias, self.down.lora_B
        if bias is not None:
            thin = torch.cat([thin, weights.sum(-1, keepdim=True).to(thin.dtype) - 1], -1)
            b = torch.cat([b, bias.to(b.dtype).unsqueeze(0)])
        y, _ = run(down, hidden, self.down.lora_A[:0])  # the frozen product alone
        return add(down, y, thin, b)

    @property
    def reads(self) -> frozenset[str]:
        return self.router.reads

    def active_parameters(self) -> int:
        active = self.gate.num_active(self.num_experts)
        pairs = [self.up, self.down] if self.side is None else [self.up, self.side, self.down]
        return sum(one.active_parameters(active) for one in pairs) + self.router.active_parameters()

    def flops_per_token(self) -> int:
        slots, first = self.gate.num_active(self.num_experts), [self.up] if self.side is None else [self.up, self.side]
        once = [pairs.lora_A for pairs in first] + [self.router.weight, self.down.lora_B]
        each = [pairs.lora_B for pairs in first] + [self.down.lora_A]
        return self.base_flops_per_token() + 2 * (sum(p.numel() for p in once) + slots * sum(p.numel() for p in each))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixLoRA(BlockMethod):
    SIZE: ClassVar[str] = "num_experts * (rank * ((1 + G) * (I + H) + H + O) + I)"
    NOTES = "sums"

    num_experts: PositiveInt = 8
    """N"""
    rank: PositiveInt = 8
    """r, of each expert's LoRAs and of those beside the blocks"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    routing: Literal["top_k", "top_p", "switch"] = "top_k"
    """which experts answer"""
    k: PositiveInt = 2
    """of top_k"""
    p: Annotated[float, Field(gt=0, le=1)] = 0.8
    """of top_p"""
    balance: NonNegativeFloat = 0.001
    """the weight of the balance loss; 0 turns it off"""
    z_loss: NonNegativeFloat = 0.0
    """the weight of the loss on the router's logits; 0.001 in the released switch"""
    std: PositiveFloat = 0.02
    """G starts as N(0, std^2); 1 in the released switch"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.routing == "top_k" and self.k > self.num_experts:
            raise ValueError(f"k={self.k} of {self.num_experts} experts: lower k, or add experts")
        return self

    @property
    def starts_as_base(self) -> bool:
        return self.routing == "top_k"  # the others' weights sum to less than 1

    def block(self, base: FeedForward, tasks: Sequence[str]) -> MixtureFeedForward:
        gates = {"top_k": JointTopK(self.k), "top_p": TopP(self.p), "switch": SoftmaxTopK(1)}
        gate: Gate = gates[self.routing]
        gate = Watched(gate) if self.balance else gate
        gate = LogitsWatched(gate) if self.z_loss else gate
        return MixtureFeedForward(base, self.num_experts, self.rank, gate, self.alpha / self.rank, self.std)

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        sizes = [value for _, value in notes.get("z", ())]
        means = [total / count.clamp(min=1) for total, count in sizes]
        z = {"z": self.z_loss * torch.stack(means).mean()} if means else {}
        return balance_loss(notes, self.balance) | z
