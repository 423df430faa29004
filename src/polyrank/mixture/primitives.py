"""The two primitives of the wide side. Between them, on (tokens, R) tensors, everything is ordinary autograd.

    y, z = base_shrink(x, W, b, A)    y = x W' + b,  z = x A'    dx = dy W + dz A (accumulated in place),  dA = dz' x
    y    = expand_(y, q, B)           y += q B, in place         dq = dy B',  dB = q' dy,  dy passes through

A (R, I) and B (R, O) are all samples'; A (N, R, I) and B (N, R, O) are each sample's own, which stands in a row of x.
W and b are frozen: they get no gradient. No tokens x width temporary exists beside y and dx, and x is saved once for
both products. Both are made of differentiable operations, so second derivatives are right too. Under autocast the thin
matrices and the weight are cast down, activations never up; a 64-bit input stays what it is.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


class _BaseShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, *a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, *a)
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        # autograd forbids changing a view among several outputs; aten's unsafe view is the same memory and no view
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return y, thin_products(x, _stacked(a, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parts = ctx.saved_tensors
        dy, dz = grads
        dy = dy.reshape(-1, dy.shape[-1])
        dx, da = None, [None] * len(parts)
        with exactly(x):  # the dtypes were settled in the forward
            a = _stacked(parts, x.dtype)
            if ctx.needs_input_grad[0]:
                dx = _add_products_((dy @ weight.to(dy.dtype)).view(x.shape), dz, a)
            sizes = [part.shape[-2] for part in parts]
            if all(trained := ctx.needs_input_grad[3:]):
                da = [one.to(part.dtype) for one, part in zip(_outer(dz, x, a).split(sizes, -2), parts, strict=True)]
            elif any(trained):
                each = zip(dz.split(sizes, -1), parts, trained, strict=True)
                da = [_outer(one, x, part).to(part.dtype) if wanted else None for one, part, wanted in each]
        return dx, None, None, *da


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, q: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, b)
        ctx.scale = scale  # type: ignore[attr-defined]
        ctx.mark_dirty(y)
        return _add_products_(y, q, b.to(y.dtype), scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, b = ctx.saved_tensors
        (dy,) = grads
        with exactly(dy):  # the scale on what has the size of a weight
            dq = thin_products(dy, _scaled(b, ctx.scale).to(dy.dtype)) if ctx.needs_input_grad[1] else None
            db = _scaled(_outer(q, dy, b).to(b.dtype), ctx.scale) if ctx.needs_input_grad[2] else None
        return dy, dq, db, None


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """No autocast. Turning it off takes longer than asking whether it is on."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _scaled(b: Tensor, scale: float) -> Tensor:
    return b if scale == 1 else b * scale


def _stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return a[0].to(dtype) if len(a) == 1 else torch.cat([part.to(dtype) for part in a], -2)


def thin_products(x: Tensor, rows: Tensor) -> Tensor:
    """x rows': (..., I) with rows (R, I), or (N, R, I) of N equal parts of x."""
    if rows.ndim == 2:
        return F.linear(x, rows)
    z = torch.bmm(x.reshape(len(rows), -1, x.shape[-1]), rows.transpose(1, 2))
    return z.view(*x.shape[:-1], rows.shape[-2])


def _add_products_(y: Tensor, q: Tensor, rows: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale q rows in place: y (..., O), contiguous; q (..., R); rows (R, O) or (N, R, O)."""
    if rows.ndim == 3:
        parts = y.view(len(rows), -1, y.shape[-1])
        parts.baddbmm_(q.reshape(*parts.shape[:2], q.shape[-1]), rows, alpha=scale)
    else:
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(q.reshape(len(flat), q.shape[-1]), rows, alpha=scale)
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


def base_shrink(x: Tensor, weight: Tensor, bias: Tensor | None, *a: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen product and all thin products of ``x``.

    Args:
        x: (..., I). weight: (O, I), frozen. bias: (O,) or None, frozen. a: one or more parts of A whose rows stand
            below each other, (R, I), or (N, R, I) for N equal parts of x's first dimension. They are put together and
            cast in here, so that nothing but the weights themselves is kept for the backward pass.

    Returns:
        y (..., O), contiguous and safe to change in place, and z (..., R), both in the compute dtype.
    """
    x = x.to(compute_dtype(x))
    if not torch.is_grad_enabled():
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y.contiguous(), thin_products(x, _stacked(a, x.dtype))
    return _BaseShrink.apply(x, weight, bias, *a)  # type: ignore[return-value]


def with_lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """x W' + b + (x A') B without a graph, in as few calls as there can be; a and b in the compute dtype."""
    y = F.linear(x, weight, bias)
    tokens = x.numel() // x.shape[-1]
    y.view(tokens, len(weight)).addmm_(F.linear(x, a).view(tokens, len(a)), b)  # there may be no token and no rank
    return y


def expand_(y: Tensor, q: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``scale q b`` to ``y`` in place and return it.

    y: (..., O), contiguous; q: (..., R); b: (R, O) or (N, R, O).
    """
    q = q.to(y.dtype)
    if not torch.is_grad_enabled():  # the same product: without a graph, torch.compile cannot trace a change in place
        return _add_products_(y, q, b.to(y.dtype), scale)
    return _Expand.apply(y, q, b, scale)  # type: ignore[return-value]
