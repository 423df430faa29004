"""Balanced k-means: vectors in clusters of equal size."""

import torch
from torch import Tensor

ROUNDS = 20


@torch.no_grad()
def balanced_clusters(rows: Tensor, count: int) -> Tensor:
    """Ids (N,) of ``count`` clusters of N / count rows each that lie near each other. rows: (N, D).

    Lloyd's rounds from fixed random rows, each row going to the nearest cluster that has room, the nearest rows first;
    the best round counts. The same rows give the same clusters.

    Raises:
        ValueError: ``count`` does not divide N.
    """
    if len(rows) % count:
        raise ValueError(f"{len(rows)} rows cannot be cut into {count} clusters of one size: take a divisor")
    x = rows.detach().double()
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count].to(x.device)
    centres, best, least = x[start], torch.arange(len(x), device=x.device) % count, float("inf")
    for _ in range(ROUNDS):
        ids = _assign(torch.cdist(x, centres), len(x) // count)
        centres = torch.zeros_like(centres).index_add_(0, ids, x) * (count / len(x))
        spread = float((x - centres[ids]).square().sum())
        if spread >= least:
            break
        best, least = ids, spread
    return best


def _assign(distance: Tensor, room: int) -> Tensor:
    """Each row's cluster. distance: (N, K). Rows ask their nearest open cluster; it takes the nearest, until full."""
    ids = torch.full((len(distance),), -1, device=distance.device)
    left = [room] * distance.shape[1]
    distance = distance.clone()
    while bool((ids < 0).any()):
        nearest, wish = distance.min(1)
        for cluster, free in enumerate(left):
            asking = ((wish == cluster) & (ids < 0)).nonzero().flatten()
            taken = asking[nearest[asking].argsort(stable=True)[:free]]
            ids[taken] = cluster
            left[cluster] -= len(taken)
            if left[cluster] == 0:
                distance[:, cluster] = torch.inf
    return ids
