"""A method is a frozen dataclass of its paper's hyper-parameters, the configuration, and how it builds its layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..mixture import (
    FeedForward,
    FeedForwardMixture,
    Gate,
    JointTopK,
    LoRAExperts,
    Mixture,
    MixtureLinear,
    Note,
    Watched,
    in_out_features,
    is_plain,
    load_balance,
    weight_of,
)
from ..svd import Factors, factorise, numerical_rank
from ..waiting import Waiting

# an unknown hyper-parameter is an error, not a default; a string below a field says what it is
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


Hears = Literal["nothing", "sums", "batch"]

NOT_FADED = "its router has not faded: train to the end of `fade`, with adapter.before_step(done) in a loop of your own"


class Method(ABC):
    """What every method provides. Concrete methods are frozen, validated dataclasses whose ``repr`` is their recipe.

    The header of its file is the first half of its card: title, authors and year in its first lines, the equation as an
    indented block, when to choose it, and the deviations; "Reconstruction" opens the paragraph of a method of which not
    everything was published.
    """

    SIZE: ClassVar[str]  # trained weights of layer l of L: of the fields, I, O, T tasks, K = rank of W
    SIZE_ONCE: ClassVar[str] = "0"  # of all layers together

    # what it adapts; beside a block's, other linear layers that are targeted come as they are
    ADAPTS: ClassVar[Literal["linear layers", "feed-forward blocks"]] = "linear layers"

    # what its layers note for `losses`: "sums" over samples, so that the notes of a batch's parts add up to its own, or
    # what only the "batch" as a whole tells
    NOTES: ClassVar[Literal["sums", "batch"]] = "batch"

    @property
    def starts_as_base(self) -> bool:
        """Whether the adapted model is the base before training."""
        return True

    @property
    def settles(self) -> float:
        """The share of the training after which the layers are what they will be: no earlier state is the best one."""
        return 0.0

    @property
    def hears(self) -> Hears:
        """What ``losses`` looks at: nothing, where there are none, or ``NOTES``."""
        return "nothing" if type(self).losses is Method.losses else self.NOTES

    @abstractmethod
    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        """One layer for each site: name -> frozen linear layer, or ``FeedForward``. The model is not changed yet."""

    def attach(self, model: nn.Module, layers: Mapping[str, Mixture]) -> Sequence[RemovableHandle]:
        """Called before the layers are put in: may refuse the model (ValueError), or hook what no layer can see."""
        return ()

    def bank(self) -> "Method | None":
        """What each task is first trained with alone, for this method to mix; None where nothing comes first."""
        return None

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        """Auxiliary losses, weighted, by name, from what the layers noted in one forward."""
        return {}

    def param_groups(self, layers: Mapping[str, Mixture], lr: float, weight_decay: float) -> list[dict[str, object]]:
        """Parameter groups for an optimiser."""
        # a dict, because layers may share a router
        every = {p: None for layer in layers.values() for p in layer.parameters() if p.requires_grad}
        return [{"params": [*every], "lr": lr, "weight_decay": weight_decay}]

    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        """Called when the gradients of a step are complete, before they are clipped and used: may change them.

        done: the share of the training that is done with this step, 1 at the last one.
        """
        return

    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        """Called after each step of the optimiser."""
        return

    def after_task(self, layers: Mapping[str, Mixture]) -> None:
        """Called when one task of several that are trained one after the other is over."""
        return


class BlockMethod(Method):
    """A method for feed-forward blocks. SIZE: of a block of I inputs, H hidden units, O outputs; G = 1 if gated."""

    ADAPTS = "feed-forward blocks"
    SIZE_BESIDE: ClassVar[str] = "rank * (I + O)"  # of another linear layer
    rank: int
    alpha: float

    @abstractmethod
    def block(self, base: FeedForward, tasks: Sequence[str]) -> FeedForwardMixture:
        """The layer in the place of one block."""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        """Other linear layers, such as those of attention, get a plain LoRA."""
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            if isinstance(base, FeedForward):
                try:
                    layers[name] = self.block(base, tasks)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            else:
                experts = LoRAExperts(base, 1, self.rank)
                layers[name] = MixtureLinear(base, experts=experts, scale=self.alpha / self.rank)
        return layers


def check_units(num_experts: int, base: FeedForward) -> None:
    """
    Raises:
        ValueError: a block's hidden units cannot be cut into so many experts.
    """
    if base.sizes[1] % num_experts:
        raise ValueError(
            f"the block has {base.sizes[1]} hidden units, which num_experts={num_experts} does not divide: take a "
            "divisor"
        )


def check_plain(name: str, base: nn.Module, why: str) -> None:
    """
    Raises:
        ValueError: the layer is more than its weight (quantised, sharded, hooked), or has none in memory.
    """
    if not is_plain(base):
        raise ValueError(
            f"{name}: the method {why}, and this layer is not a plain linear layer (quantised, sharded, hooked or with "
            "its own forward): load the base unquantised and unhooked, or take another method"
        )


def singular_layers(
    sites: Mapping[str, nn.Module], layer: Callable[[nn.Module, Factors], Mixture], *, closed: bool
) -> dict[str, Mixture]:
    """``layer(site, the singular factors of its weight)`` for each site; what takes long shows how far it is.

    closed: leave out directions whose sigma is below rounding.

    Raises:
        ValueError: a site is not its weight alone, or its weight is not finite.
    """
    for name, base in sites.items():  # all of them first: factorising may take minutes
        check_plain(name, base, "decomposes the weight itself")
    layers: dict[str, Mixture] = {}
    with Waiting("factorising weights", len(sites)) as waiting:
        for name, base in sites.items():
            weight = weight_of(base)
            try:
                factors = factorise(weight)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            # one at a time: the factors of all are several times the model
            layers[name] = layer(base, factors.first(numerical_rank(factors, weight.dtype)) if closed else factors)
            waiting.done_one()
    return layers


def check_divides(parts: int, name: str, base: nn.Module, field: str) -> None:
    """
    Raises:
        ValueError: the layer's features cannot be cut into ``parts``.
    """
    sizes = in_out_features(base)
    if any(size % parts for size in sizes):
        raise ValueError(
            f"{name} has {sizes[0]} inputs and {sizes[1]} outputs, which {field}={parts} does not divide: take a "
            "common divisor of the layers' sizes"
        )


def balanced_top_k(k: int, weight: float) -> Gate:
    """The renormalised top-k, watched if a balance loss of that weight is wanted."""
    return Watched(JointTopK(k)) if weight else JointTopK(k)


def balance_loss(notes: Mapping[str, Sequence[Note]], weight: float) -> dict[str, Tensor]:
    """``weight`` times the mean balance loss of all layers whose gates are ``Watched``."""
    loads = [load_balance(load) for _, load in notes.get("load", ())]
    return {"balance": weight * torch.stack(loads).mean()} if loads else {}


def check_fade(fade: tuple[float, float]) -> None:
    """
    Raises:
        ValueError: it does not begin before it ends.
    """
    if fade[0] >= fade[1]:
        raise ValueError(f"fade={list(fade)}: give the shares of the training between which it falls, such as [0, 0.5]")


def share_left(done: float, fade: tuple[float, float]) -> float:
    """How much of a router counts: 1 before ``fade`` begins, 0 from its end on, linear between."""
    begin, end = fade
    return min(1.0, max(0.0, (end - done) / (end - begin)))
