"""MoORE's layer: the singular directions of W, gated, stand for W. Its two products with V and U are all that is wide.

    h = V'P'x,   y = U (relu(sigma + logits) * h) + b

P is folded into V where there are more tokens than directions, and into x where there are fewer; in inference V'P' is
kept. Of the gate, the backward pass keeps only what it is made of: the offset of each sample and the router's
bottleneck; a thin product makes it again. So one (tokens, K) tensor is kept beside x, where plain autograd keeps four.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..mixture import (
    BY_TASK,
    Kept,
    Mixture,
    Reflections,
    Router,
    Sum,
    TokenRouter,
    base_shrink,
    compute_dtype,
    exactly,
    expand_,
    infers,
    weight_of,
)
from ..svd import Factors


class SingularLinear(Mixture):
    """The singular directions of W, gated, in the place of W."""

    def __init__(self, base: nn.Module, factors: Factors, reflections: Reflections, router: Router) -> None:
        super().__init__(base)
        self.reflections, self.router = reflections, router
        dtype = weight_of(base).dtype
        self.u: Tensor
        self.vt: Tensor
        self.sigma: Tensor
        self.register_buffer("u", factors.u.to(dtype), persistent=False)  # (O, K)
        self.register_buffer("vt", factors.vt.to(dtype), persistent=False)  # (K, I)
        self.register_buffer("sigma", factors.sigma, persistent=False)  # (K,)
        self._folded: Kept[tuple[Tensor, Tensor | None, Tensor | None]] = Kept()

    def forward(self, x: Tensor) -> Tensor:
        if infers():
            return self._infer(x)
        h, z = self._directions(x)
        of_sample, up = self._parts()
        offset = self.sigma + of_sample(x, z, self.site)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return gated_product(h, offset, None if up is None else z, up, self.u, bias)

    def _infer(self, x: Tensor) -> Tensor:
        """The forward without gradients: P is folded into V, and the offset of each task is computed once."""
        dtype = compute_dtype(x)
        thin, up, offsets = self._folded((dtype, self.site.context.tasks), (self,), lambda: self._fold(dtype))
        h = F.linear(x, thin)
        h, z = h.split((len(self.vt), len(thin) - len(self.vt)), -1)
        if offsets is None:  # it reads the sample
            offset = self.sigma + self.router(x, z, self.site)
        else:
            task = self.site.task(x)
            offset = F.embedding(self.site.ids(x), offsets) if task is None else offsets[task]
        bias = None if self.bias is None else self.bias.to(dtype)
        return gated_product(h, offset, None if up is None else z, up, self.u, bias)

    def _directions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """V'P'x (..., K), and the thin products of the router's rows with x."""
        rows, core = self.reflections.factors()
        extra = self.router.rows()
        a, sizes = [rows] if extra is None else [rows, extra], (len(rows), 0 if extra is None else len(extra))
        if x.numel() // x.shape[-1] < len(self.vt):  # turn x: V is larger
            x = x.to(compute_dtype(x))
            thin, z = F.linear(x, torch.cat(a).to(x.dtype)).split(sizes, -1)
            turned = expand_(x.clone(memory_format=torch.contiguous_format), thin, -core @ rows)
            return base_shrink(turned, self.vt, None, rows[:0])[0], z
        h, z = base_shrink(x, self.vt, None, *a)
        thin, z = z.split(sizes, -1)
        return expand_(h, thin, -core @ F.linear(rows.to(self.vt.dtype), self.vt).to(rows.dtype)), z  # P folded into V

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """V'P' with the router's rows below, its second matrix, and sigma + the logits of each task, (T, K)."""
        vt, extra = self.experts()[1], self.router.rows()
        thin = vt if extra is None else torch.cat([vt, extra.to(vt.dtype)])
        of_sample, up = self._parts()
        offsets = None
        if of_sample.reads == BY_TASK and self.site.context.tasks:
            samples = vt.new_zeros(len(self.site.context.tasks), 1, vt.shape[1])
            offsets = self.sigma + of_sample(samples, samples[..., :0], self.site.of_all(vt.device)).flatten(0, -2)
            offsets = offsets.to(dtype)
        return thin.to(dtype), None if up is None else up.to(dtype), offsets

    def _parts(self) -> tuple[Router, Tensor | None]:
        """The router that is one for all tokens of a sample, and the second matrix (K, D) of one that reads each."""
        if isinstance(self.router, Sum):
            first, second = self.router.routers
            if isinstance(first, Router) and isinstance(second, TokenRouter):
                return first, second.up
        return self.router, None

    @property
    def stands_for_base(self) -> bool:
        return True

    @property
    def reads(self) -> frozenset[str]:
        return self.router.reads

    def experts(self) -> tuple[Tensor, Tensor]:
        """U (O, K) and V'P' (K, I): expert d is their d-th column and row."""
        rows, core = self.reflections.factors()
        vt = self.vt.to(rows.dtype)
        return self.u, vt - F.linear(vt, rows) @ core.t() @ rows

    @torch.no_grad()
    def task_weight(self, task: int) -> Tensor:
        self.refuse_if_input_routed()
        with exactly(self.vt):
            vt = self.vt[:1].to(self.sigma.dtype)
            gate = F.relu(self.sigma + self.router(vt, vt[:, :0], self.site.on(task, vt.device)))
            return self.weight_at(gate.view(-1))

    @torch.no_grad()
    def gate_of(self, x: Tensor) -> Tensor:
        """The gate (..., K) of an input (..., I), within a forward."""
        rows = self.router.rows()
        z = x[..., :0] if rows is None else F.linear(x, rows.to(x.dtype))
        return F.relu(self.sigma + self.router(x, z, self.site))

    @torch.no_grad()
    def weight_at(self, gate: Tensor) -> Tensor:
        """The weight (O, I) that the layer is where its gate (K,) is held fixed."""
        u, vt = self.experts()
        return (u.to(vt.dtype) * gate) @ vt

    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"{self.site.name}: MoORE changes every singular direction, so its delta has full rank and is no LoRA; "
            "merge the task into a dense weight, or train MoORETopK with router='task', whose delta has rank k + L"
        )

    def active_parameters(self) -> int:
        return self.reflections.vectors.numel() + self.router.active_parameters()

    def flops_per_token(self) -> int:
        thin = self.reflections.vectors.numel() + len(self.reflections.vectors) * len(self.vt)
        return 2 * (self.u.numel() + self.vt.numel() + thin) + self.router.flops_per_token()


def gated_product(
    h: Tensor, offset: Tensor, z: Tensor | None, up: Tensor | None, u: Tensor, bias: Tensor | None
) -> Tensor:
    """U (g * h) + b with the gate g = relu(offset + up z), which is computed again in the backward pass.

    Args:
        h: (..., K). offset: broadcasts to h. z: (..., D) and up: (K, D), or None and None. u: (O, K), in any dtype, and
            bias: (O,), frozen.

    Its gradients are not differentiable once more.
    """
    offset, up = offset.to(h.dtype), None if up is None else up.to(h.dtype)
    if not torch.is_grad_enabled():
        return F.linear(_gate(offset, z, up).mul(h), u.to(h.dtype), bias)
    return _GatedProduct.apply(h, offset, z, up, u, bias)  # type: ignore[return-value]


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        offset: Tensor,
        z: Tensor | None,
        up: Tensor | None,
        u: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(h, offset, z, up, u)
        gate = _gate(offset, z, up)
        return F.linear(gate * h if z is None else gate.mul_(h), u.to(h.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, offset, z, up, u = ctx.saved_tensors
        (dy,) = grads
        with torch.autocast(dy.device.type, enabled=False):
            gate = _gate(offset, z, up)
            dq = (dy.reshape(-1, dy.shape[-1]) @ u.to(dy.dtype)).view(h.shape)
            dlogits = torch.ops.aten.threshold_backward(dq * h, gate.expand(h.shape), 0)
            dh = dq.mul_(gate)
            doffset = dlogits.sum_to_size(offset.shape) if ctx.needs_input_grad[1] else None
            dz = dup = None
            if z is not None and up is not None:
                flat = dlogits.view(-1, dlogits.shape[-1])
                dz, dup = (flat @ up).view(z.shape), flat.t() @ z.reshape(-1, z.shape[-1])
        return dh, doffset, dz, dup, None, None


def _gate(offset: Tensor, z: Tensor | None, up: Tensor | None) -> Tensor:
    return F.relu(offset) if z is None or up is None else F.linear(z, up).add_(offset).relu_()
