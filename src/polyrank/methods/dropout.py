"""Dropout in the adapter of any method for linear layers, as LoRA has it (Hu et al., ICLR 2022; PEFT).

https://arxiv.org/abs/2106.09685

    at="ranks"    y = W x + b + s B' C(x, t) (m * A x)       m (R) of each token: 0 with probability p, else 1 / (1 - p)
    at="input"    y = W x + b + s B' C(x, t) A (m * x)       m (I) of each token

Only in training; afterwards, and where it merges, the layer is the other method's. The mean over m is the layer
without dropout, as C is linear in A x (but OMoE's). Routers read x as it is: what is dropped is the experts' share.

Choose it if a method fits the training examples and not the others. It takes every method whose layers have the
formula: all but those for feed-forward blocks, `dora`, `moore` and `task_lora`; and `pissa`, `milora` and
`moore_topk` with `at: input` alone: their ranks start as a difference, of which a part would be as large as W.

`at: ranks` is a mask of (tokens, R) numbers, 1.01 to 1.07 times the time of a training step on one layer. `at: input`
is what the papers' code has: one more x and a mask of its size in memory, and 1.3 (fp32) to 1.9 (bf16) times the step
(`python benchmarks/extras.py`, d 768, 1024 tokens, one thread of a processor).

Deviations from PEFT's code:
- `at: ranks` is not theirs. One m serves all experts of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import LowRankMixture, Mixture, MixtureLinear, compute_dtype, run
from .around import FILLED, AroundMethod, described
from .base import Method


class Dropped(LowRankMixture, ABC):
    """Another method's layer, with dropout in training."""

    def __init__(self, of: MixtureLinear, p: float) -> None:
        super().__init__(of.base, experts=of.experts, router=of.router, gate=of.gate, scale=of.scale)
        self.cure, self.p = of.cure, p

    def shrink(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.drop(x, a, *rows) if self.training and self.p else run(self.base, x, a, *rows)

    @abstractmethod
    def drop(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """As ``shrink``, in training."""


class DroppedRanks(Dropped):
    """Dropout between A and the core: a mask of (tokens, R) numbers."""

    def drop(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        y, z = run(self.base, x, a, *rows)
        z, routed = z.split((len(a), z.shape[-1] - len(a)), -1)
        return y, _beside(F.dropout(z, self.p), routed)


class DroppedInput(Dropped):
    """Dropout on what the experts read. The frozen product reads x itself, so x is not read once for both.

    One more x and a mask of its size are kept for the backward pass: 1.3 times the training step in fp32, 1.9 in bf16
    (``benchmarks/extras.py``).
    """

    def drop(self, x: Tensor, a: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        y, routed = run(self.base, x, *(rows or [a[:0]]))
        dtype = compute_dtype(x)
        return y, _beside(F.linear(F.dropout(x.to(dtype), self.p), a.to(dtype)), routed)


def _beside(z: Tensor, routed: Tensor) -> Tensor:
    """The experts' and the router's products side by side; there may be none of a router."""
    return torch.cat([z, routed], -1) if routed.shape[-1] else z


LAYERS: dict[str, type[Dropped]] = {"ranks": DroppedRanks, "input": DroppedInput}


@dataclass(frozen=True, kw_only=True, config=FILLED)
class Dropout(AroundMethod):
    of: dict[str, Any] | str = "lora"
    """the method: its name, or name and fields"""
    p: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """the share that is dropped"""
    at: Literal["ranks", "input"] = "ranks"
    """what is dropped: of each token, numbers of A x, or of x itself"""

    __hash__ = AroundMethod.__hash__

    @classmethod
    def refusal(cls, name: str, kind: type[Method]) -> str | None:
        if kind is cls:
            return "is dropout already: set its p, and leave out the one around it"
        if kind.ADAPTS != "linear layers":
            return "adapts feed-forward blocks, where it has no place: take a method for linear layers, such as mola"
        return None

    def bank(self) -> Method | None:
        """The other's, under the same dropout: it is there that those experts learn most."""
        first = self.method.bank()
        return None if first is None else replace(self, of=described(first))

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {name: self._dropped(name, layer) for name, layer in self.method.build(sites, tasks).items()}

    def _dropped(self, name: str, layer: Mixture) -> Mixture:
        if not isinstance(layer, MixtureLinear):
            raise ValueError(
                f"{name}: {self.method} has a layer of its own, with no place for dropout: take a method that is a "
                "mixture beside the weight, such as lora, or moore_topk with at='input'"
            )
        if self.at == "ranks" and layer.experts.cancels:
            raise ValueError(
                f"{name}: the ranks of {self.method} start as a difference, and what is left when one is dropped is as "
                "large as the weight: take at='input', or another method"
            )
        return LAYERS[self.at](layer, self.p)
