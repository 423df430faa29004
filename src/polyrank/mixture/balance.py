"""Losses over routing statistics, summed over all processes first: a mean of products is not a product of means."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed as dist

from .route import Note


def global_sum(local: Tensor) -> Tensor:
    """``local`` summed over the processes, for a loss that every process has and that is averaged over them.

    The local part's gradient is multiplied by their number: the mean over processes is that of the whole.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (local - local.detach())


def global_notes(notes: Mapping[str, Sequence[Note]]) -> dict[str, list[Note]]:
    """Notes that are sums over samples, each summed over the processes (``global_sum``), in one exchange."""
    every = [value for of_kind in notes.values() for _, value in of_kind]
    if not every or not (dist.is_available() and dist.is_initialized()):
        return {kind: [*of_kind] for kind, of_kind in notes.items()}
    flat = global_sum(torch.cat([value.reshape(-1).to(every[0].device) for value in every]))
    parts = iter(flat.split([value.numel() for value in every]))
    return {
        kind: [(name, next(parts).view(value.shape).to(value)) for name, value in of_kind]
        for kind, of_kind in notes.items()
    }


def mutual_information(joint: Tensor) -> Tensor:
    """Mutual information, in nats, between tasks and experts of a joint distribution (..., T, E) that sums to 1.

    Source: Mod-Squad (Chen et al., CVPR 2023), whose released code adds 1e-4 inside the logarithm.
    """
    by_task, by_expert = joint.sum(-1, keepdim=True), joint.sum(-2, keepdim=True)
    ratio = joint / (by_task * by_expert).clamp_min(torch.finfo(joint.dtype).tiny)
    return (joint * torch.log(ratio + 1e-4)).sum((-2, -1))


def load_balance(load: Tensor) -> Tensor:
    """E sum_e f_e P_e, at least 1: f the shares of the choices that fell on each expert, P the mean probabilities.

    ``load`` is (..., 2, E), choices and probability mass summed over the tokens, as ``Watched`` notes them. Returns
    (...). Source: Switch Transformer (Fedus et al., JMLR 2022).
    """
    shares = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    return load.shape[-1] * (shares[..., 0, :].detach() * shares[..., 1, :]).sum(-1)
