"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., NeurIPS 2024).

https://arxiv.org/abs/2405.15179

    y = W x + b + B A x,    each row of A, each column of B = concat of sub-vectors u
    u = sum_{j in the k best of l_u} p_j v_j,    p = softmax over the chosen of l_u,    v_1 .. v_h of length b

One bank of h vectors serves all layers. What a layer has of its own are the logits l_u, a choice from the bank for each
sub-vector.

Choose it if the layers' updates should be made of the same few parts; the logits train much faster than the bank.

It does not start as the base: A and B are both small mixtures of random vectors, and the first outputs differ slightly.

Deviations from PEFT's code:
- Vectors of length 64 by default (theirs 256), which divides the widths of small models too.
- A saved adapter keeps all logits, so that training can go on (theirs can keep the chosen alone, for inference).
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Experts, Mixture, MixtureLinear, Site, in_out_features, normal, uniform
from .base import STRICT, Method, check_divides


class VectorBank(nn.Module):
    """The vectors that all layers mix, and how."""

    def __init__(self, base: nn.Module, num_vectors: int, vector_length: int, k: int, bound: float) -> None:
        super().__init__()
        self.k = k
        self.vectors = uniform(base, num_vectors, vector_length, bound=bound)  # (h, b)

    def forward(self, logits: Tensor) -> Tensor:
        """Rows (R, n b) from the logits (R, n, h) of their n sub-vectors."""
        best = logits.topk(self.k, -1)
        chosen = self.vectors.to(logits)[best.indices]  # (R, n, k, b)
        return (best.values.softmax(-1).unsqueeze(-1) * chosen).sum(-2).flatten(-2)


class BankExperts(Experts):
    """One LoRA pair made of a bank's vectors. The bank counts as the first layer's."""

    num_experts = 1

    def __init__(self, base: nn.Module, rank: int, bank: VectorBank, std: float, first: bool) -> None:
        super().__init__()
        num_vectors, length = bank.vectors.shape
        in_features, out_features = in_out_features(base)
        self.logits_A = normal(base, rank, in_features // length, num_vectors, std=std)
        self.logits_B = normal(base, rank, out_features // length, num_vectors, std=std)
        self.bank, self.first = bank, first

    def down(self) -> Tensor:
        return self.bank(self.logits_A)

    def up(self, base: nn.Module) -> Tensor:
        return self.bank(self.logits_B)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return z

    def active_parameters(self, num_active: int) -> int:
        return self.logits_A.numel() + self.logits_B.numel() + self.first * self.bank.vectors.numel()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VBLoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O) // vector_length * num_vectors"
    SIZE_ONCE: ClassVar[str] = "num_vectors * vector_length"

    rank: PositiveInt = 4
    """r, the rows of A"""
    num_vectors: PositiveInt = 256
    """h, of the bank"""
    vector_length: PositiveInt = 64
    """b, a divisor of the layers' sizes"""
    k: PositiveInt = 2
    """how many vectors a sub-vector mixes"""
    bank_bound: PositiveFloat = 0.02
    """the bank starts uniform within it"""
    logits_std: PositiveFloat = 0.1
    """the logits start normal, with this deviation"""
    logits_lr: PositiveFloat = 10.0
    """the logits' learning rate, in units of the bank's, which is lr"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.num_vectors:
            raise ValueError(f"k={self.k} of num_vectors={self.num_vectors}: lower k, or add vectors")
        return self

    @property
    def starts_as_base(self) -> bool:
        return False

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        bank: VectorBank | None = None
        for name, base in sites.items():
            check_divides(self.vector_length, name, base, "vector_length")
            first = bank is None
            bank = bank or VectorBank(base, self.num_vectors, self.vector_length, self.k, self.bank_bound)
            layers[name] = MixtureLinear(base, experts=BankExperts(base, self.rank, bank, self.logits_std, first))
        return layers

    def param_groups(self, layers: Mapping[str, Mixture], lr: float, weight_decay: float) -> list[dict[str, object]]:
        modules = [module for layer in layers.values() for module in layer.modules()]
        shared = {module.vectors: None for module in modules if isinstance(module, VectorBank)}
        every = {p: None for layer in layers.values() for p in layer.parameters() if p.requires_grad}
        bank, logits = [p for p in every if p in shared], [p for p in every if p not in shared]
        return [
            {"params": bank, "lr": lr, "weight_decay": weight_decay},
            {"params": logits, "lr": self.logits_lr * lr, "weight_decay": weight_decay},
        ]
