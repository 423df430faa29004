"""Where layers stand in a model: they go in, and what stood there comes back."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from .blocks import Block
from .mixture import Mixture, exactly, is_plain, weight_of


class Places:
    """What stood where the layers stand now. A block also runs a linear layer that is not inside of it (BERT)."""

    def __init__(self, model: nn.Module, names: Sequence[str], blocks: Sequence[Block]) -> None:
        self.model, self.names = model, tuple(names)
        self.blocks = {block.name: block for block in blocks}
        elsewhere = [name for block in blocks for name in block.elsewhere]
        self.before = {name: model.get_submodule(name) for name in [*names, *elsewhere]}

    def linears(self) -> list[str]:
        """The names of all adapted linear layers."""
        return [one for name in self.names for one in (self.blocks[name].linears if name in self.blocks else [name])]

    def fill(self, layers: Mapping[str, Mixture]) -> None:
        for name in self.before:
            self.model.set_submodule(name, layers[name] if name in layers else nn.Identity())

    def restore(self) -> None:
        for name, module in self.before.items():
            module.train(self.model.get_submodule(name).training)
            self.model.set_submodule(name, module)


@torch.no_grad()
def lost_by_rounding(layers: Mapping[str, Mixture], task: int) -> dict[str, float]:
    """Of each layer, the share of its change that is lost when the merged weight is rounded to the base's dtype.

    ||round(W') - W'|| / ||W' - W||; of a whole weight it is always as little as the dtype's rounding. Empty where the
    base is as fine as the adapter.

    Raises:
        ValueError: a gate that depends on the input.
    """
    lost: dict[str, float] = {}
    for name, layer in layers.items():
        with exactly(weight_of(layer.frozen()[0])):
            share = _lost(layer.task_weights(task))
        if share is not None:
            lost[name] = share
    return lost


def _lost(pairs: Sequence[tuple[nn.Module, Tensor]]) -> float | None:
    finer = [(weight_of(base), weight) for base, weight in pairs if weight_of(base).dtype != weight.dtype]
    change = sum(float((weight - before.to(weight.dtype)).square().sum()) for before, weight in finer)
    wrong = sum(float((weight.to(before.dtype).to(weight.dtype) - weight).square().sum()) for before, weight in finer)
    return (wrong / change) ** 0.5 if change > 0 else None


@torch.no_grad()
def merge_into_bases(layers: Mapping[str, Mixture], task: int) -> None:
    """Write the one weight of each frozen linear layer on a task into it, all of them or none.

    Raises:
        ValueError: a gate that depends on the input, or a base that is more than its weight; nothing was changed.
    """
    for layer in layers.values():
        layer.refuse_if_input_routed()
    lost: dict[str, float] = {}

    def weights() -> Iterator[tuple[nn.Module, Tensor]]:
        for name, layer in layers.items():
            with exactly(weight_of(layer.frozen()[0])):
                pairs = layer.task_weights(task)
            if (share := _lost(pairs)) is not None:
                lost[name] = share
            yield from pairs

    write_weights(layers, weights())
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        logging.getLogger("polyrank").warning(
            "merging rounds to %s: %.1f %% of the change is lost in the median of the layers, %.1f %% in %s; "
            "model.float() before merging keeps all of it",
            layers[worst].weight.dtype,
            100 * median(lost.values()),
            100 * lost[worst],
            worst,
        )


@torch.no_grad()
def write_weights(
    layers: Mapping[str, Mixture], weights: Iterable[tuple[nn.Module, Tensor]]
) -> list[tuple[nn.Module, nn.Parameter]]:
    """Put weights (O, I) into frozen linear layers, all of them or none; returns what stood there.

    Raises:
        ValueError: a base that is more than its weight; nothing was changed.
    """
    for name, layer in layers.items():
        if not all(is_plain(linear) for linear in layer.frozen()):
            raise ValueError(
                f"{name}: its base is not a plain linear layer (quantised, sharded, hooked): its weight is "
                "not all of it; keep the adapter in the model, or adapt an unquantised base"
            )
    before = [(base, base.get_parameter("weight")) for layer in layers.values() for base in layer.frozen()]
    try:
        for base, weight in weights:
            weight = weight if isinstance(base, nn.Linear) else weight.t()
            weight = weight.to(base.get_parameter("weight").dtype).contiguous()
            base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    except BaseException:
        put_back(before)
        raise
    return before


def put_back(weights: Iterable[tuple[nn.Module, nn.Parameter]]) -> None:
    for base, weight in weights:
        base.register_parameter("weight", weight)
