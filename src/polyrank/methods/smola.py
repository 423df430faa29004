"""Omni-SMoLA: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank Experts (Wu et al., CVPR 2024).

https://arxiv.org/abs/2312.00968

    y_s = W x_s + b + (alpha / r) sum_{groups g of s} sum_{e, p} C_g[s, e, p] B_e A_e u_ep
    u_ep = sum_{t in g} D_g[t, e, p] x_t
    D_g = softmax over the tokens t of group g,    C_g = softmax over the slots (e, p) of g,    both of Phi_g x

Nothing is routed: an expert has slots, a slot holds a mean of the sample's tokens, and each token takes a mean of what
the experts made of the slots. The group "omni" has all tokens of a sample. With `modalities` the tokens of each one are
a group too, with experts of its own: call the model with `modality_ids` (B, L), where a token with an id below 0 has
the omni group alone. Padding is in no group: it changes nothing and gets the frozen layer's output. As A is linear, its
ranks are mixed, never the tokens themselves.

Choose it for images, or encoders that read several modalities: every adapted layer lets each token see all of its
sample, so models whose attention or configuration says that it is causal are refused. Some text towers do not say it
(CLIP's, OwlViT's, GroupViT's, XCLIP's): leave those out.

Reconstruction: no code was released and the paper's text was not read in full.
- The slots are those of Soft MoE, of which nothing is normalised here: neither x nor Phi.
- The numbers of experts and slots, the scale and the start of Phi (as nn.Linear's default) are choices.
- Windows that a model folds into its batch have slots of their own.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..mixture import LinearRouter, Mixture, MixtureLinear, Pairs, Site
from .base import STRICT, Method


class SlotExperts(Pairs):
    """Pairs that work on slots: means of a sample's tokens, group by group."""

    reads = frozenset({"sample"})

    def __init__(self, base: nn.Module, num_experts: int, rank: int, slots: int, modalities: int) -> None:
        """num_experts: of each group."""
        super().__init__(base, (1 + modalities) * num_experts, rank)
        self.slots, self.modalities = slots, modalities

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        inside = self._groups(z, site)  # (B, S, G), S all tokens of a row
        shape = *inside.shape, self.num_experts // inside.shape[-1]
        logits = gate.reshape(*shape, self.slots)  # (B, S, G, E, P)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        inside = inside[..., None, None]
        # a finite low value: gradients stay finite in a group without a token; ``combine`` makes nothing of its slots
        dispatch = logits.masked_fill(~inside, torch.finfo(logits.dtype).min).softmax(1)
        combine = logits.flatten(-2).softmax(-1).view_as(logits) * inside
        ranks = z.reshape(*shape, self.rank)  # (B, S, G, E, r)
        slots = torch.einsum("bsgep,bsger->bgepr", dispatch.to(z.dtype), ranks)
        return torch.einsum("bsgep,bgepr->bsger", combine.to(slots.dtype), slots).reshape(z.shape)

    def _groups(self, z: Tensor, site: Site) -> Tensor:
        """Which groups each token is in."""
        if site.per_token:
            raise ValueError(
                f"{site.name}: ids of each token flatten several requests into a row, and slots would mix their "
                "tokens: give each request a row of its own"
            )
        mask = site.mask(z)
        omni = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask.to(z.device) != 0
        omni = omni.reshape(z.shape[0], -1, 1)
        if not self.modalities:
            return omni
        ids = site.modalities(z)
        if not torch.compiler.is_compiling() and ids.device.type == "cpu" and int(ids.max()) >= self.modalities:
            raise ValueError(
                f"{site.name}: modality_ids go up to {int(ids.max())}, and there are {self.modalities} groups: give "
                f"ids in 0..{self.modalities - 1}, or raise modalities"
            )
        own = ids.reshape(*omni.shape) == torch.arange(self.modalities, device=z.device)
        return torch.cat([omni, own & omni], -1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SMoLA(Method):
    SIZE: ClassVar[str] = "(1 + modalities) * num_experts * (rank * (I + O) + slots * I)"

    num_experts: PositiveInt = 8
    """of each group"""
    slots: PositiveInt = 1
    """P, of each expert"""
    rank: PositiveInt = 4
    """r, of each expert"""
    alpha: PositiveFloat = 8.0
    """the scale is alpha / r"""
    modalities: NonNegativeInt = 0
    """groups beside omni, one for each modality; 0 needs no `modality_ids`"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        groups = 1 + self.modalities
        return {
            name: MixtureLinear(
                base,
                experts=SlotExperts(base, self.num_experts, self.rank, self.slots, self.modalities),
                router=LinearRouter(base, groups * self.num_experts * self.slots),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    def attach(self, model: nn.Module, layers: Mapping[str, Mixture]) -> Sequence[RemovableHandle]:
        """
        Raises:
            ValueError: a layer stands where tokens may not see later ones.
        """
        for name in layers:
            if (causal := _causal_place(model, name)) is not None:
                raise ValueError(
                    f"{name}: this method lets a token see all others of its sample, and {causal}: target an encoder "
                    r"alone, such as targets=r'encoder\..*' of T5, or take a method that reads each token by itself, "
                    "such as hydralora"
                )
        return ()


def _causal_place(model: nn.Module, name: str) -> str | None:
    """Why a layer's tokens may not see later ones; None if they may.

    What counts is the attention of the layer's block, an item of the model's outermost list. A layer beside the lists
    belongs to the nearest module that has attention.
    """
    parts = name.split(".")
    above = [".".join(parts[:n]) for n in range(len(parts))]  # from the root down
    inside = [path for path, before in zip(above[1:], above, strict=False) if _is_list(model.get_submodule(before))]
    for place in inside[:1] or reversed(above):
        prefix = f"{place}." if place else ""
        modules = model.get_submodule(place).named_modules()
        says = {prefix + path: flag for path, part in modules if (flag := vars(part).get("is_causal")) is not None}
        if any(says.values()):
            return f"{next(path for path, flag in says.items() if flag)} is causal"
        if says:
            return None
    return _causal_config(model)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _causal_config(model: nn.Module) -> str | None:
    """Of a model whose attention does not say what it is: its configuration, or whether it can go on from a cache."""
    config = vars(model).get("config")
    decodes = None if config is None else vars(config).get("is_decoder")
    if decodes:
        return "the model's config has is_decoder=True"
    caches = {"past_key_values", "cache_params"} & inspect.signature(model.forward).parameters.keys()
    if decodes is None and caches:
        return f"the model takes {min(caches)} and does not say that it is no decoder"
    return None
