"""Router fading for any soft mixture, from EMTAL (Zhong et al., NeurIPS 2024).

https://arxiv.org/abs/2501.06884

    g = a gate(logits) + (1 - a) gate(0)       a from 1 to 0 while the model trains

Another method for linear layers, of which every expert answers (a soft gate): at the end the weights are those that
equal logits give, whatever the input, so that one weight stands for each layer, and `merge` gives it exactly.

Choose it if a method with a soft router serves you, and the model must leave as a plain one. It takes `hydralora`,
`loramoe`, `mode`, `teamlora`, `c_lorae`, `mtl_lora` and `moelora`.

Deviations from the paper: it fades the router of its own method, inside feed-forward blocks (`emtal`).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Around, Gate, LowRankMixture, Mixture, Site, place
from .around import FILLED, AroundMethod
from .base import NOT_FADED, Method, check_fade, share_left


class Fading(Around):
    """A soft gate that loses its sight."""

    def __init__(self, gate: Gate, num_logits: int, base: nn.Module) -> None:
        super().__init__(gate)
        self.num_logits = num_logits
        self.kept = nn.Parameter(torch.ones((), **place(base)), requires_grad=False)  # a

    def forward(self, logits: Tensor) -> Tensor:
        return self.kept * self.gate(logits) + (1 - self.kept) * self.gate(torch.zeros_like(logits))

    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        self.gate.watch(logits, weights, site)

    def fixed(self) -> Tensor | None:
        return None if float(self.kept) else self.gate(self.kept.new_zeros(self.num_logits))


@dataclass(frozen=True, kw_only=True, config=FILLED)
class Faded(AroundMethod):
    of: dict[str, Any] | str = "hydralora"
    """the method: its name, or name and fields"""
    fade: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(le=1)]] = (0.0, 0.5)
    """the shares of the training between which a falls from 1 to 0"""

    __hash__ = AroundMethod.__hash__

    @classmethod
    def refusal(cls, name: str, kind: type[Method]) -> str | None:
        fits = kind.ADAPTS == "linear layers"
        return None if fits else "adapts feed-forward blocks; `emtal` is the one of those that fades"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_fade(self.fade)
        return self

    @property
    def settles(self) -> float:
        return self.fade[1]

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers = self.method.build(sites, tasks)
        for name, layer in layers.items():
            if not isinstance(layer, LowRankMixture) or layer.gate is None or layer.router is None:
                raise ValueError(f"{name}: {self.method} has no gate beside a router, so nothing can fade")
            if layer.gate.num_active(layer.experts.num_experts) < layer.experts.num_experts:
                raise ValueError(f"{name}: the gate of {self.method} chooses experts, and only a soft one can fade")
            layer.cure = NOT_FADED
            layer.gate = Fading(layer.gate, _num_logits(layer), layer.base)
        return layers

    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        self.method.before_step(layers, done)
        for layer in layers.values():
            assert isinstance(layer, LowRankMixture) and isinstance(layer.gate, Fading)
            layer.gate.kept.fill_(share_left(done, self.fade))


def _num_logits(layer: LowRankMixture) -> int:
    """How many logits the router gives, from one row of zeros."""
    assert layer.router is not None
    rows, like = layer.router.rows(), layer.experts.down()
    z = like.new_zeros(1, 0 if rows is None else len(rows))
    with torch.no_grad():
        return layer.router(like.new_zeros(1, layer.in_features), z, Site().on(0, like.device)).shape[-1]
