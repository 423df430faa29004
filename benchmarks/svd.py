"""Our factorisation beside torch.linalg.svd in fp32: time, time from the cache, and errors against fp64.

    python benchmarks/svd.py --threads 1 [--large]

Process CPU time; the three run in turn in one process, and the ratios are medians of those of one round. The weights
are Gaussian, but the last two, whose singular values fall over 4 and 7 decades: for the Cholesky step, and for gesdd.
Errors are measured in fp64: of W as ||U S V' - W|| / ||W||, of U and V as the largest entry of U'U - I and V'V - I.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from polyrank.svd import Factors, cache_path, compute, factorise

SHAPES = ((768, 768), (1024, 4096), (2048, 2048))
DECADES = ((768, 768, 4.0), (768, 768, 7.0))


@dataclass(frozen=True)
class Figures:
    """Seconds, medians of same-round ratios, and errors in fp64."""

    lapack: float
    ours: float
    cached: float
    ours_over_lapack: float
    cached_over_lapack: float
    cached_over_ours: float
    reconstruction: float
    lapack_reconstruction: float
    orthogonality_u: float
    orthogonality_v: float
    lapack_orthogonality: float


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5


def spread(rows: int, columns: int, decades: float) -> Tensor:
    """A weight whose singular values fall from 1 to 10^-decades, evenly on a logarithmic scale."""
    u, _, vt = torch.linalg.svd(gaussian(rows, columns).double(), full_matrices=False)
    return ((u * torch.logspace(0, -decades, len(vt), dtype=torch.float64)) @ vt).float()


def errors(weight: Tensor, u: Tensor, sigma: Tensor, vt: Tensor) -> tuple[float, float, float]:
    """Of W, U and V."""
    w, u, sigma, vt = (part.double() for part in (weight, u, sigma, vt))
    eye = torch.eye(len(sigma), dtype=torch.float64)
    off = ((u.t() @ u - eye).abs().max(), (vt @ vt.t() - eye).abs().max())
    return float(((u * sigma) @ vt - w).norm() / w.norm()), float(off[0]), float(off[1])


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(weight: Tensor, cache: Path, rounds: int = 5) -> Figures:
    """``cache``: an empty folder, which becomes POLYRANK_CACHE while this runs."""
    before = os.environ.get("POLYRANK_CACHE")
    os.environ["POLYRANK_CACHE"] = str(cache)
    try:
        found: Factors = factorise(weight)
        assert cache_path(weight).is_file(), "nothing was cached: the third column would be a lie"
        theirs = torch.linalg.svd(weight, full_matrices=False)
        times = []
        for turn in range(rounds):
            work = [
                lambda: torch.linalg.svd(weight, full_matrices=False),
                lambda: compute(weight),
                lambda: factorise(weight),
            ]
            order = range(3) if turn % 2 else range(2, -1, -1)
            spent = {i: seconds(work[i]) for i in order}
            times.append((spent[0], spent[1], spent[2]))
    finally:
        if before is None:
            del os.environ["POLYRANK_CACHE"]
        else:
            os.environ["POLYRANK_CACHE"] = before
    ours, lapack = errors(weight, found.u, found.sigma, found.vt), errors(weight, *theirs)
    return Figures(
        lapack=median(t[0] for t in times),
        ours=median(t[1] for t in times),
        cached=median(t[2] for t in times),
        ours_over_lapack=median(t[1] / t[0] for t in times),
        cached_over_lapack=median(t[2] / t[0] for t in times),
        cached_over_ours=median(t[2] / t[1] for t in times),
        reconstruction=ours[0],
        lapack_reconstruction=lapack[0],
        orthogonality_u=ours[1],
        orthogonality_v=ours[2],
        lapack_orthogonality=max(lapack[1:]),
    )


def row(name: str, weight: Tensor, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as cache:
        f = measure(weight, Path(cache), rounds)
    return (
        f"| {name} | {f.lapack:.3f} | {f.ours:.3f} | {f.cached:.4f} | {f.ours_over_lapack:.2f} "
        f"| {f.cached_over_lapack:.3f} | {f.cached_over_ours:.3f} | {f.reconstruction:.1e} "
        f"({f.lapack_reconstruction:.1e}) | {f.orthogonality_u:.1e}, {f.orthogonality_v:.1e} "
        f"({f.lapack_orthogonality:.1e}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096, about 2 minutes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| weight | torch fp32, s | ours, s | cached, s | ours / torch | cached / torch | cached / ours ", end="")
    print("| error of W (torch) | of U, V (torch) |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in (*SHAPES, (4096, 4096)) if given.large else SHAPES:
        print(row(f"{shape[0]} x {shape[1]}", gaussian(*shape), given.rounds), flush=True)
    for rows, columns, decades in DECADES:
        print(row(f"{rows} x {columns}, 1e{decades:.0f}", spread(rows, columns, decades), given.rounds), flush=True)


if __name__ == "__main__":
    main()
