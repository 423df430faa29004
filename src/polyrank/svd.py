"""Singular factors of frozen weights: computed once in fp64, kept on disk, and two measurable promises about them.

The eigenvectors of the Gram matrix of the short side, in fp64; the other side and sigma are the directions and lengths
of W's image of them. Rounding grows with the condition number c = sigma_max / sigma_min, and each range has its remedy:

    orthonormal to   eps64 c^2 at worst: left alone below a tenth of the result's eps, else one Cholesky step mends it
    U S V' = W to    eps64 c, so that in fp32 only the rounding of the result shows
    c > 1e5          LAPACK's own fp64 SVD (gesdd) takes over

Time and errors beside torch.linalg.svd: `python benchmarks/svd.py`.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

METHOD = "gram2"  # of the algorithm and its files: another name where either changes, and old files are not read
SMALLEST_CACHED = 256  # below this side a factorisation is cheaper than a file
WORST_CONDITION = 1e5  # of the Gram matrix's way
SLAB = 256  # rows
FILE_TOLERANCE = 1e-5  # of fp32 products on one vector


@dataclass(frozen=True)
class Factors:
    """W = u diag(sigma) vt, sigma descending. The largest entry of each row of vt is positive."""

    u: Tensor  # (O, K)
    sigma: Tensor  # (K,)
    vt: Tensor  # (K, I)

    def first(self, k: int) -> "Factors":
        return self._part(slice(k))

    def last(self, k: int) -> "Factors":
        return self._part(slice(-k, None))

    def _part(self, kept: slice) -> "Factors":
        """A copy, because a view would hold the whole matrices in memory."""
        if len(self.sigma[kept]) == len(self.sigma):
            return self
        return Factors(self.u[:, kept].contiguous(), self.sigma[kept].clone(), self.vt[kept].clone())


def cache_folder() -> Path:
    return Path(os.environ.get("POLYRANK_CACHE", "~/.cache/polyrank")).expanduser() / "svd"


def checksum(weight: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of ``weight``."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def numerical_rank(factors: Factors, dtype: torch.dtype) -> int:
    """How many singular values stand above rounding: sigma > sigma_max * max(O, I) * eps, eps of fp32 at the finest.

    A weight in 16 bits is judged by fp32's eps: its rounding is part of the weight, not of the factorisation.
    """
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = max(len(factors.u), factors.vt.shape[1])
    return max(1, int((factors.sigma > factors.sigma[0] * size * eps).sum()))


def cache_path(weight: Tensor) -> Path:
    """Where the factors of ``weight`` are kept: by its checksum, the algorithm, and the factors' dtype."""
    dtype = str(_dtype(weight)).removeprefix("torch.")
    return cache_folder() / f"{checksum(weight)}-{METHOD}-{dtype}.safetensors"


def factorise(weight: Tensor) -> Factors:
    """The thin SVD of ``weight`` (O, I) with K = min(O, I), on its device, in fp32 (fp64 where the weight is).

    Large weights are kept in the cache folder; a file that is broken, or not this weight's, is computed anew.

    Raises:
        ValueError: the weight has NaN or infinite entries.
    """
    weight = weight.detach()
    if min(weight.shape) < SMALLEST_CACHED:
        return compute(weight)
    here = weight.cpu()
    path = cache_path(here)
    factors = _read(path, here)
    if factors is None:
        factors = compute(weight)
        _write(path, factors)
    return Factors(*(part.to(weight.device) for part in (factors.u, factors.sigma, factors.vt)))


def compute(weight: Tensor) -> Factors:
    """As ``factorise``, without the cache."""
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):  # 8 times as fast as on every entry
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has NaN or infinite entries: it has no SVD; repair the checkpoint"
        )
    return _compute(weight, _dtype(weight))


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _compute(weight: Tensor, dtype: torch.dtype) -> Factors:
    w = weight.detach().double()
    wide = w if w.shape[0] <= w.shape[1] else w.t()  # (K, M) = short diag(sigma) long
    squared, short = torch.linalg.eigh(_gram(wide))  # ascending
    smallest, largest = float(squared[0]), float(squared[-1])
    if smallest * WORST_CONDITION**2 > largest:
        root = squared.sqrt()
        long = (short / root).t() @ wide  # of length 1 but for rounding
        sigma, order = (root * long.norm(dim=1)).sort(descending=True)  # more exact than the roots alone
        short, long = short[:, order], long[order]
        if torch.finfo(torch.float64).eps * largest > 0.1 * torch.finfo(dtype).eps * smallest:
            long = _orthonormal(long)
    else:
        short, sigma, long = torch.linalg.svd(wide, full_matrices=False)
    u, vt = (short, long) if wide is w else (long.t(), short.t())
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()  # (K, 1)
    return Factors(*(part.to(dtype).contiguous() for part in (u * sign.t(), sigma, vt * sign)))


def _gram(rows: Tensor) -> Tensor:
    """The lower triangle of rows rows', all that eigh and Cholesky read: slab by slab, in little over half the time."""
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), SLAB):
        slab = slice(start, min(start + SLAB, len(rows)))
        gram[slab, : slab.stop] = rows[slab] @ rows[: slab.stop].t()
    return gram


def _orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt of rows that are nearly orthonormal: one Cholesky step is as exact there as a QR, and cheaper."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(_gram(rows)), rows, upper=False)


def _sums(factors: Factors) -> Tensor:
    """The words of each part, added, (3,) int64: one flipped bit shows, however small its sigma. Cheaper than a CRC."""
    sums = []
    for part in (factors.u, factors.sigma, factors.vt):
        data = part.flatten().view(torch.uint8)
        whole = len(data) // 8 * 8
        sums.append(data[:whole].view(torch.int64).sum() + data[whole:].sum())
    return torch.stack(sums)


def _read(path: Path, weight: Tensor) -> Factors | None:
    """The factors of a cache file, if it is whole, and they are those of ``weight`` on one vector."""
    try:
        tensors = {name: part.clone() for name, part in load_file(path).items()}  # the file may be cut while they live
        found = Factors(tensors["u"], tensors["sigma"], tensors["vt"])
        wave = torch.cos(torch.arange(weight.shape[1], dtype=torch.float64) * 0.7 + 0.3).to(found.u.dtype)
        want = weight.to(wave.dtype) @ wave
        again = found.u @ (found.sigma * (found.vt @ wave))
        close = float((again - want).norm()) <= FILE_TOLERANCE * float(want.norm() + found.sigma.norm())
        return found if close and torch.equal(_sums(found), tensors["sums"]) else None
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return None


def _write(path: Path, factors: Factors) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    kept = Factors(factors.u.cpu(), factors.sigma.cpu(), factors.vt.cpu())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"u": kept.u, "sigma": kept.sigma, "vt": kept.vt, "sums": _sums(kept)}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError):  # a cache that cannot be written costs time, not correctness
        aside.unlink(missing_ok=True)


def expert_gram(u: Tensor, vt: Tensor) -> Tensor:
    """Frobenius products (K, K) of the rank-one experts u_k v_k': the identity where they are orthonormal."""
    return (u.t() @ u) * (vt @ vt.t())


def outside_range(weight: Tensor, change: Tensor) -> float:
    """The share ||(I - UU') D|| / ||D|| of a change D (O, I) whose columns leave Range(W); 0 for no change."""
    factors = _compute(weight, torch.float64)
    u = factors.first(numerical_rank(factors, weight.dtype)).u
    change = change.detach().double()
    norm = float(change.norm())
    return float((change - u @ (u.t() @ change)).norm()) / norm if norm > 0 else 0.0
