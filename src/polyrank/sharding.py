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
from typing import Any

import torch
from torch import distributed as dist, nn


def is_sharded(model: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # here and below, because few need it and it takes a while

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
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    kept = set(whole)
    if kept and "ignored_params" not in signature(fully_shard).parameters:
        raise ValueError(f"sharding: fsdp2 needs torch 2.7 or newer, this is {torch.__version__}: upgrade torch")
    options: dict[str, Any] = {"mesh": mesh} | ({"ignored_params": kept} if kept else {})
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
