"""X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models (Buehler et al., 2024).

The title goes on: with Applications in Protein Mechanics and Molecular Design. By E. L. Buehler and M. J. Buehler.
https://arxiv.org/abs/2402.07148

    y = W x + b + (alpha / r) sum_e B_e A_e (s_le x)    in layer l, of each token
    s_l = softmax(Q_l h / temperature) over the LoRAs,    h the token's state in an extra forward of the base model

LoRAs that were trained alone, one for each task, the bank, are frozen; what is trained is a classifier Q, one for all
layers, or Q max(0, V h) with `hidden` units. It reads what the base model makes of the token, so every forward is
preceded by one of the base without gradient. No task is asked for.

Choose it if good LoRAs are there and must stay as they are: `adapter.load_bank({task: folder})`. A recipe trains the
bank first. With an empty bank the model is the base, and nothing can be learnt. One more task needs a new classifier.

Deviations from the released code:
- h is the input of the last adapted layer that is as wide as the first one's: the model may be any module, whose last
  hidden state (theirs) has no name. With every layer of a transformer targeted it is half a block before that.
- Every layer has scalings of its own (an option there; by default all layers have the same).
- Q starts with bias 0. Hidden units are rectified (theirs only if asked). The extra forward has no dropout.
- Encoder and decoder of one model cannot be adapted together: their tokens differ. generate() runs an encoder by
  itself, so only the decoder's own layers can be adapted for it.
- No cache of keys and values: a step of decoding sees one token, and the extra forward needs all. So `use_cache=False`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..mixture import (
    Gate,
    LowRankMixture,
    Mixture,
    MixtureLinear,
    RouteContext,
    Router,
    Site,
    Softmax,
    SoftmaxTopK,
    TaskExperts,
    compute_dtype,
    in_out_features,
    uniform,
    zeros,
)
from .base import STRICT, Method
from .lora import LoRA

HIDDEN, SCALINGS = "xlora.hidden", "xlora.scalings"  # in Route.once; the first only while the extra forward runs


class Classifier(nn.Module):
    """The scalings of all layers, from one state of each token."""

    def __init__(self, base: nn.Module, num_layers: int, num_experts: int, method: "XLoRA") -> None:
        super().__init__()
        width, hidden = in_out_features(base)[0], method.hidden
        self.num_layers, self.temperature = num_layers, method.temperature
        self.gate: Gate = SoftmaxTopK(method.k) if method.k else Softmax()
        self.context = RouteContext(())  # attach() puts the model's own here
        self.down = uniform(base, hidden, width) if hidden else None
        self.weight = uniform(base, num_layers * num_experts, hidden or width)
        self.bias = zeros(base, num_layers * num_experts)

    def forward(self, h: Tensor) -> Tensor:
        """h (..., I) -> scalings (..., L, E)."""
        dtype = compute_dtype(h)
        h = h.to(dtype)
        if self.down is not None:
            h = F.relu(F.linear(h, self.down.to(dtype)))
        logits = F.linear(h, self.weight.to(dtype), self.bias.to(dtype))
        return self.gate(logits.unflatten(-1, (self.num_layers, -1)) / self.temperature)

    def scale(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root: run the base model, and leave the scalings for this forward.

        Raises:
            ValueError: a step of decoding, or the layer that is read did not run.
        """
        route, names = self.context.route, self.context.arguments
        if route.continues:
            raise ValueError(
                "X-LoRA reads all tokens in an extra forward, and this step has a cache and only the new ones: "
                "generate with use_cache=False"
            )
        if "past_key_values" in names:
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        kwargs = {key: value for key, value in kwargs.items() if key != "past_key_values"}  # the caller's own cache
        if "use_cache" in names or "use_cache" in kwargs:
            kwargs["use_cache"] = False
        route.once[HIDDEN] = torch.empty(0)
        modes = [(part, part.training) for part in model.modules()]
        device = self.weight.device.type
        caster = torch.autocast(  # older torch would meet weights that were cast without gradient (pytorch 112583)
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        try:
            model.eval()
            with torch.no_grad(), caster:
                model.forward(*args, **kwargs)
        finally:
            for part, training in modes:
                part.training = training
        h = route.once.pop(HIDDEN)
        if h.numel() == 0:
            raise ValueError("X-LoRA: the last adapted layer did not run in this forward: target layers that always do")
        route.once[SCALINGS] = self(h)


class Scaled(Router):
    """The scalings of one layer. The classifier counts as the first one's."""

    reads = frozenset({"token"})

    def __init__(
        self, classifier: Classifier, layer: int, experts: TaskExperts, base: nn.Module, is_read: bool
    ) -> None:
        super().__init__()
        self.classifier, self.layer, self.is_read = classifier, layer, is_read
        self.num_experts = experts.num_experts
        in_features, out_features = in_out_features(base)
        self.extra = 2 * (in_features * out_features + sum(p.numel() for p in experts.parameters()))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        once = site.context.route.once
        if HIDDEN in once:  # the extra forward, of the base alone
            if self.is_read:
                once[HIDDEN] = x
            return z.new_zeros(self.num_experts)
        if SCALINGS not in once:
            raise ValueError(
                f"{site.name}: X-LoRA's scalings come from a forward of the whole model, and this layer was called "
                "outside of one: call the model that was adapted (generate() of an encoder-decoder runs its encoder "
                "alone: target the decoder's own layers)"
            )
        scalings = once[SCALINGS][..., self.layer, :]
        if scalings.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{site.name}: a layer input of shape {tuple(x.shape)} for scalings of {tuple(scalings.shape[:-1])} "
                "tokens: leave out layers that read other tokens, such as a pooler, with exclude="
            )
        return scalings

    def active_parameters(self) -> int:
        return sum(p.numel() for p in self.classifier.parameters()) if self.layer == 0 else 0

    def flops_per_token(self) -> int:
        return 2 * self.active_parameters() + self.extra  # the layer runs in the extra forward too


@dataclass(frozen=True, kw_only=True, config=STRICT)
class XLoRA(Method):
    SIZE: ClassVar[str] = "(l == 0) * (hidden * I + L * T * ((hidden or I) + 1))"

    rank: PositiveInt = 8
    """r, of each LoRA"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    temperature: PositiveFloat = 1.0
    """of the softmax"""
    k: NonNegativeInt = 0
    """how many LoRAs a token keeps, not renormalised; 0 keeps all"""
    hidden: NonNegativeInt = 0
    """units of the classifier's hidden layer; 0 is a linear classifier"""

    def bank(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=self.alpha)

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        if self.k > len(tasks):
            raise ValueError(f"k={self.k} of {len(tasks)} LoRAs: lower k, or take 0 for all of them")
        widths = [in_out_features(base)[0] for base in sites.values()]
        read = max(l for l, width in enumerate(widths) if width == widths[0])
        classifier = Classifier(next(iter(sites.values())), len(sites), len(tasks), self)
        layers: dict[str, Mixture] = {}
        for l, (name, base) in enumerate(sites.items()):
            experts = TaskExperts(base, len(tasks), self.rank)
            experts.requires_grad_(False)
            router = Scaled(classifier, l, experts, base, is_read=l == read)
            layers[name] = MixtureLinear(base, experts=experts, router=router, scale=self.alpha / self.rank)
        return layers

    def attach(self, model: nn.Module, layers: Mapping[str, Mixture]) -> Sequence[RemovableHandle]:
        """
        Raises:
            ValueError: layers of both an encoder and its decoder.
        """
        first = next(iter(layers.values()))
        for name, layer in layers.items():
            if layer.site.stream != first.site.stream:
                raise ValueError(
                    f"{name} reads the tokens of the {layer.site.stream}, {first.site.name} of the "
                    f"{first.site.stream}, and X-LoRA's scalings are of one stream: target the encoder alone, or the "
                    "decoder's own layers"
                )
        assert isinstance(first, LowRankMixture) and isinstance(first.router, Scaled)
        first.router.classifier.context = first.site.context
        return [model.register_forward_pre_hook(first.router.classifier.scale, with_kwargs=True)]
