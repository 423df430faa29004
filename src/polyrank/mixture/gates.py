"""Gates turn logits (..., E) into weights (..., E). Shared experts stand first."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .site import Site


class Gate(nn.Module, ABC):
    """What every gate provides."""

    @abstractmethod
    def forward(self, logits: Tensor) -> Tensor: ...

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        """Called in training with what ``forward`` read and gave: leave notes for losses, or count."""
        return

    def fixed(self) -> Tensor | None:
        """The weights (E,) of a gate that no longer looks at its logits; None as long as it does."""
        return None

    @abstractmethod
    def num_active(self, num_experts: int) -> int:
        """How many of the experts work on one token, at most."""


def _softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Softmax(Gate):
    """Dense softmax over groups of neighbouring logits; all of them are one group by default."""

    def __init__(self, group: int | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.group, self.temperature = group, temperature

    def forward(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.group is None:
            return _softmax(logits)
        return _softmax(logits.unflatten(-1, (-1, self.group))).flatten(-2)

    def num_active(self, num_experts: int) -> int:
        return num_experts


class SoftmaxTopK(Gate):
    """Softmax over all experts, then the k best, not renormalised: the active weights sum to less than 1."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits: Tensor) -> Tensor:
        p = _softmax(logits)
        best = p.topk(self.k, -1)  # exactly k, ties broken by topk
        return torch.zeros_like(p).scatter(-1, best.indices, best.values)

    def num_active(self, num_experts: int) -> int:
        return self.k


class JointTopK(Gate):
    """One softmax over the k best routed experts and all shared ones: the active weights sum to 1.

    With ``num_shared=0`` it is the renormalised top-k.
    """

    def __init__(self, k: int, num_shared: int = 0) -> None:
        super().__init__()
        self.k, self.num_shared = k, num_shared

    def forward(self, logits: Tensor) -> Tensor:
        if self.num_shared == 0:
            best = logits.topk(self.k, -1)
            p = _softmax(best.values)
            return torch.zeros_like(logits, dtype=p.dtype).scatter(-1, best.indices, p)
        shared, routed = logits.split((self.num_shared, logits.shape[-1] - self.num_shared), -1)
        best = routed.topk(self.k, -1)
        p = _softmax(torch.cat([shared, best.values], -1))
        chosen = torch.zeros_like(routed, dtype=p.dtype).scatter(-1, best.indices, p[..., self.num_shared :])
        return torch.cat([p[..., : self.num_shared], chosen], -1)

    def num_active(self, num_experts: int) -> int:
        return self.k + self.num_shared


class NaiveShared(Gate):
    """``SoftmaxTopK`` over the routed experts; every shared expert has weight 1 and its logit is not used."""

    def __init__(self, k: int, num_shared: int) -> None:
        super().__init__()
        self.num_shared, self.routed = num_shared, SoftmaxTopK(k)

    def forward(self, logits: Tensor) -> Tensor:
        routed = self.routed(logits[..., self.num_shared :])
        return torch.cat([torch.ones_like(routed[..., :1]).expand(*routed.shape[:-1], self.num_shared), routed], -1)

    def num_active(self, num_experts: int) -> int:
        return self.routed.k + self.num_shared


class Around(Gate, ABC):
    """Another gate, whose weights it gives, and something beside."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, logits: Tensor) -> Tensor:
        return self.gate(logits)

    @abstractmethod
    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None: ...

    def num_active(self, num_experts: int) -> int:
        return self.gate.num_active(num_experts)


class Watched(Around):
    """Another gate whose load is noted for a balance loss (``load_balance``); padding is left out."""

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        p, chosen = _softmax(logits).flatten(0, -2), (weights.detach() > 0).flatten(0, -2)  # (N, E)
        mask = site.mask(logits)
        counts = torch.ones_like(p[:, :1]) if mask is None else mask.reshape(-1, 1).to(p)
        site.note("load", torch.stack([(chosen * counts).sum(0), (p * counts).sum(0)]))  # (2, E)
