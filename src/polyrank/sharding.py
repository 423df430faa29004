"""A frozen base that no process holds whole: FSDP2 on its blocks, and on what is left of it.

Every process keeps a part of each frozen weight; a block's weights are put together when the block runs, forward and
backward, and let go afterwards. The adapter's and the heads' weights are whole everywhere: their gradients are summed
in one exchange (step.py), as without sharding, so the same training comes out. Since the processes meet in every block,
each of them has to go through the same forward and backward passes.

MoORE's layers stand for W and hold U, sigma and V: those are buffers, whole in every process; what is left to shard is
W itself, which they do not use, and the layers that are not adapted. A base that was sharded first has no whole weight
to decompose, and the methods that need it refuse.
"""

from collections.abc import Iterable, Iterator
from inspect import signature

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost lists of a model, which run one after the other."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks(child)


def shard(model: nn.Module, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shard a frozen model over all processes, in place. ``whole``: the parameters in it that are not to be sharded.

    Raises:
        ValueError: this version of torch cannot leave parameters out.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", (torch.distributed.get_world_size(),)
    )
    kept = set(whole)
    if kept and "ignored_params" not in signature(fully_shard).parameters:
        raise ValueError(f"sharding: fsdp2 needs torch 2.7 or newer, this is {torch.__version__}: upgrade torch")
    options = {"mesh": mesh} | ({"ignored_params": kept} if kept else {})
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
