"""Where layers stand in a model: they go in, and what stood there comes back."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .blocks import Block
from .mixture import Mixture, is_plain


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
def merge_into_bases(layers: Mapping[str, Mixture], task: int) -> None:
    """Write the one weight of each frozen linear layer on a task into it, all of them or none.

    Raises:
        ValueError: a gate that depends on the input, or a base that is more than its weight; nothing was changed.
    """
    for name, layer in layers.items():
        layer.refuse_if_input_routed()
        if not all(is_plain(linear) for linear in layer.frozen()):
            raise ValueError(
                f"{name}: its base is not a plain linear layer (quantised, sharded, hooked): its weight is "
                "not all of it; keep the adapter in the model, or adapt an unquantised base"
            )
    before = [(base, base.get_parameter("weight")) for layer in layers.values() for base in layer.frozen()]
    try:
        for layer in layers.values():
            for base, weight in layer.task_weights(task):
                weight = weight if isinstance(base, nn.Linear) else weight.t()
                weight = weight.to(base.get_parameter("weight").dtype).contiguous()
                base.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    except BaseException:
        for base, weight in before:
            base.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))
        raise
