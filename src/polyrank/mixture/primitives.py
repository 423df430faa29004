"""The two primitives of the wide side. Between them, on (tokens, R) tensors, everything is ordinary autograd.

    y, z = base_shrink(x, W, b, A)    y = x W' + b,  z = x A'    dx = dy W + dz A (accumulated in place),  dA = dz' x
    y    = expand_(y, q, B)           y += q B, in place         dq = dy B',  dB = q' dy,  dy passes through

A (R, I) and B (R, O) are all samples'; A (N, R, I) and B (N, R, O) are each sample's own, which stands in a row of x.
W and b are frozen: they get no gradient. No tokens x width temporary exists beside y and dx, and x is saved once for
both products. Both are made of differentiable operations, so second derivatives are right too. Under autocast the thin
matrices and the weight are cast down, activations never up; a 64-bit input stays what it is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


class _BaseShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, a)
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        # autograd forbids changing a view among several outputs; aten's unsafe view is the same memory and no view
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return y, thin_products(x, a)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a = ctx.saved_tensors
        dy, dz = grads
        dy = dy.reshape(-1, dy.shape[-1])
        dx = da = None
        with torch.autocast(x.device.type, enabled=False):  # the dtypes were settled in the forward
            if ctx.needs_input_grad[0]:
                dx = _add_products_((dy @ weight.to(dy.dtype)).view(x.shape), dz, a)
            if ctx.needs_input_grad[3]:
                da = _outer(dz, x, a)
        return dx, None, None, da


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, q: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(q, b)
        ctx.mark_dirty(y)
        return _add_products_(y, q, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, b = ctx.saved_tensors
        (dy,) = grads
        with torch.autocast(dy.device.type, enabled=False):
            dq = thin_products(dy, b) if ctx.needs_input_grad[1] else None
            db = _outer(q, dy, b) if ctx.needs_input_grad[2] else None
        return dy, dq, db


def thin_products(x: Tensor, rows: Tensor) -> Tensor:
    """x rows': (..., I) with rows (R, I), or (N, R, I) of N equal parts of x."""
    if rows.ndim == 3:
        z = torch.bmm(x.reshape(len(rows), -1, x.shape[-1]), rows.transpose(1, 2))
    else:
        z = F.linear(x.reshape(-1, x.shape[-1]), rows)
    return z.view(*x.shape[:-1], rows.shape[-2])


def _add_products_(y: Tensor, q: Tensor, rows: Tensor) -> Tensor:
    """y + q rows in place: y (..., O), contiguous; q (..., R); rows (R, O) or (N, R, O)."""
    if rows.ndim == 3:
        parts = y.view(len(rows), -1, y.shape[-1])
        parts.baddbmm_(q.reshape(*parts.shape[:2], q.shape[-1]), rows)
    else:
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(q.reshape(len(flat), q.shape[-1]), rows)
    return y


def _outer(q: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """q' x over all tokens, (R, I), or over each part's own, (N, R, I), as ``like`` is."""
    if like.ndim == 3:
        parts = x.reshape(len(like), -1, x.shape[-1])
        return torch.bmm(q.reshape(*parts.shape[:2], q.shape[-1]).transpose(1, 2), parts)
    flat = x.reshape(-1, x.shape[-1])
    return q.reshape(len(flat), q.shape[-1]).t() @ flat


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply ``x`` here: autocast's, unless x is 64-bit."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def base_shrink(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen product and all thin products of ``x``.

    Args:
        x: (..., I). weight: (O, I), frozen. bias: (O,) or None, frozen. a: (R, I), or (N, R, I) for N equal parts of
            x's first dimension.

    Returns:
        y (..., O), contiguous and safe to change in place, and z (..., R), both in the compute dtype.
    """
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled():
        x = x.to(dtype)
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y.contiguous(), thin_products(x, a.to(dtype))
    return _BaseShrink.apply(x.to(dtype), weight, bias, a.to(dtype))  # type: ignore[return-value]


def with_lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """x W' + b + (x A') B without a graph, in as few calls as there can be; a and b in the compute dtype."""
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(F.linear(x, a).view(-1, len(a)), b)
    return y


def expand_(y: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """Add ``q b`` to ``y`` in place and return it. y: (..., O), contiguous; q: (..., R); b: (R, O) or (N, R, O)."""
    q, b = q.to(y.dtype), b.to(y.dtype)
    if not torch.is_grad_enabled():  # the same product: without a graph, torch.compile cannot trace a change in place
        return _add_products_(y, q, b)
    return _Expand.apply(y, q, b)  # type: ignore[return-value]
