"""SAME: Stabilized Mixture-of-Experts for Multimodal Continual Instruction Tuning (Xie et al., ICML 2026).

https://arxiv.org/abs/2602.01990

    y = W x + b + (alpha / r) sum_i w_i B_i A_i x,    w = softmax(G x)

    routing       grad G   <-  grad G (I - V'V + V' diag(g) V),            g_j = sqrt(floor / lambda_j)
    scaling       grad A   <-  grad A (I - V'V + V' diag(mu / (lambda_j + mu)) V)
    activation    A_i, B_i stay as they are for the rest of the task once  f_i - u_i < tau

    C = sum x x' / n over the tokens of all tasks before the present one; V its leading eigenvectors (rows), lambda
    their values, as many as have a share delta of its trace; floor the mean of the values that are left out.
    u, f: how much of w the expert i had in the tasks before, and in the present one; least 0 and most 1.

Tasks come one after the other (``training.mixing.order: sequence``). The layer is a plain mixture of LoRAs; what keeps
old tasks are three changes to its training. With no task before, all three do nothing.

Choose it if tasks arrive in turn and old data is gone. The released code adapts the feed-forward layers alone.

Reconstruction: the code was read, the paper only as secondary sources describe it; the sign of the score is the
code's. g, which they leave open, is ours: 1 for a direction as weak as those left out, and 0 if those are empty.

Deviations from the released code:
- C is the uncentred covariance of all tasks so far, a running one, as secondary sources describe it (theirs: centred,
  of the last batch that was looked at, one in twenty steps). Of wide layers a sketch of 2 * components columns is kept
  (Tropp et al., 2017), which is exact where the layer has no more inputs than that.
- Routing damps what the tasks before used (theirs: what the present task uses, from the tenth step on);
  ``damping="released"`` has their factors: sqrt(lambda_k / lambda_j), averaged over three neighbours, at least 0.8.
- Scaling has lambda (theirs: its root), and the factor mu, so that without old tasks the gradient is the plain one.
- Experts are frozen, not left out of the training forward; the best score stays. Their score weighs u by the tokens'
  energy and forgets by 5 % a forward; here both count tokens. A frozen expert is put back after the step, bit for bit.
- ``mixing="parameters"`` and ``gate="batch"`` have their forward. Its other arithmetic in inference (logits / E, the
  two best) is left out, as are dropout on x, A's start as N(0, 0.01^2), and as many experts as tasks.
- Nothing is done about AdamW, which divides by the gradient's size and so undoes a part of routing and scaling.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    LoRAExperts,
    LowRankMixture,
    Mixture,
    MixtureLinear,
    Pairs,
    Router,
    Site,
    Softmax,
    global_sum,
    in_out_features,
    place,
    uniform,
)
from .base import STRICT, Method


class MixedPairs(Pairs):
    """(sum_j w_j B_j)(sum_i w_i A_i) x."""

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        gate = gate.to(z.dtype).unsqueeze(-1)  # (..., E, 1)
        mixed = (gate * z.unflatten(-1, (self.num_experts, self.rank))).sum(-2, keepdim=True)  # (..., 1, r)
        return (gate * mixed).flatten(-2)


class RememberingRouter(Router):
    """G x of each token, and what its layer read: all of it in parameters that no gradient trains."""

    def __init__(self, base: nn.Module, num_experts: int, components: int, gate: str) -> None:
        super().__init__()
        features = in_out_features(base)[0]
        kept, columns = min(components, features), min(2 * components, features)
        self.gate, self.reads = gate, frozenset({gate})
        self.weight = uniform(base, num_experts, features)
        self.onto = _state(torch.eye(features) if columns == features else _columns(features, columns), base)  # (I, q)
        self.sketch = _state(torch.zeros(features, columns), base)  # sum of x x' onto, (I, q)
        self.totals = _state(torch.zeros(2), base)  # tokens, and their energy x'x
        self.values = _state(torch.zeros(kept), base)  # lambda of the tasks before; 0 where none was kept
        self.vectors = _state(torch.zeros(kept, features), base)  # V
        self.floor = _state(torch.zeros(()), base)
        self.usage, self.present, self.frozen = (_state(torch.zeros(num_experts), base) for _ in range(3))
        self.heard = torch.zeros(0)  # of the forwards since the last step
        self.ready: Tensor | None = None  # of the step under way: a step that is refused never comes to after_step
        self.held: tuple[Tensor, Tensor, Tensor] | None = None  # rows, and A and B there

    def rows(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        p = F.softmax(z.to(torch.promote_types(z.dtype, torch.float32)), -1)
        if self.training and site.listens and not site.replays:
            self._listen(x.detach(), p.detach(), site)
        if self.gate == "token":
            return z
        mask = site.mask(z)  # a softmax of the mean's logarithm is the mean
        counts = torch.ones_like(p[..., :1]) if mask is None else (mask != 0).to(p).reshape(*z.shape[:-1], 1)
        mean = (p * counts).flatten(0, -2).sum(0) / counts.sum().clamp_min(1)
        return mean.clamp_min(torch.finfo(p.dtype).tiny).log().view(*[1] * (z.ndim - 1), -1)

    @torch.no_grad()
    def _listen(self, x: Tensor, p: Tensor, site: Site) -> None:
        tokens, mask = x.flatten(0, -2).to(self.sketch.dtype), site.mask(x)
        counts = torch.ones_like(tokens[:, :1]) if mask is None else (mask != 0).reshape(-1, 1).to(tokens)
        tokens, p = tokens * counts, p.flatten(0, -2) * counts
        with torch.autocast(x.device.type, enabled=False):
            moment = tokens.t() @ (tokens @ self.onto)
        totals = torch.stack([counts.sum(), tokens.square().sum()])
        here = torch.cat([moment.flatten(), totals, p.sum(0).to(totals)])
        self.heard = here if self.heard.numel() == 0 else self.heard.to(here.device) + here

    @torch.no_grad()
    def hear(self) -> None:
        """What the forwards of this step left, of all processes, is ready to be counted if the step is taken."""
        size = self.sketch.numel() + len(self.totals) + len(self.usage)
        here = self.heard if self.heard.numel() else torch.zeros(size)
        self.ready, self.heard, self.held = global_sum(here.to(self.sketch)), torch.zeros(0), None

    @torch.no_grad()
    def count(self) -> None:
        if self.ready is not None:
            parts = [self.sketch, self.totals, self.present]
            for p, more in zip(parts, self.ready.split([p.numel() for p in parts]), strict=True):
                p += more.view_as(p)
            self.ready = None

    @torch.no_grad()
    def turn(self, delta: float) -> None:
        """The present task is now one of those before."""
        tokens, energy = self.totals.double().unbind()
        if tokens == 0:
            return
        values, vectors = eigenpairs(self.sketch.double() / tokens, self.onto.double())
        share = values.cumsum(0) / (energy / tokens)
        count = min(int((share < delta).sum()) + 1, len(self.values), int((values > 0).sum()))
        for p in (self.values, self.vectors, self.present, self.frozen):
            if p is self.present:
                self.usage += p
            p.zero_()
        self.values[:count], self.vectors[:count] = values[:count].to(self.values), vectors[:count].to(self.values)
        left = self.vectors.shape[1] - count
        self.floor.copy_(((energy / tokens - values[:count].sum()) / max(1, left)).clamp_min(0))

    @property
    def remembers(self) -> bool:
        return bool(self.values.any())

    def damped(self, gradient: Tensor, factors: Tensor) -> Tensor:
        """gradient (n, I), each direction of V times its factor."""
        along = gradient @ self.vectors.t() * (factors - 1)
        return gradient + along @ self.vectors

    def routing_factors(self, damping: str) -> Tensor:
        """g (c,), 1 where no direction was kept."""
        kept = self.values > 0
        if damping == "full":
            return torch.where(kept, self.floor / self.values, 1.0).clamp_max(1).sqrt()
        roots = self.values[kept].sqrt()
        smooth = torch.stack([roots[max(0, j - 2) : j + 1].mean() for j in range(len(roots))])
        factors = torch.ones_like(self.values)
        factors[kept] = (smooth.min() / smooth).clamp(0.8, 1.2)
        return factors

    def now_frozen(self, tau: float) -> Tensor:
        """Which experts (E,) stay as they are in this step: all but the best, as soon as they are below tau."""
        assert self.ready is not None
        scores = _spread(self.present + self.ready[-len(self.present) :]) - _spread(self.usage)
        frozen = (self.frozen > 0) | (scores < tau)
        if frozen.all():  # of those that still learn, one goes on
            best = scores.masked_fill(self.frozen > 0, -torch.inf).argmax()
            frozen[best] = False
        return frozen

    def active_parameters(self) -> int:
        return self.weight.numel()

    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAME(Method):
    SIZE: ClassVar[str] = "num_experts * (rank * (I + O) + I)"

    num_experts: PositiveInt = 8
    """E"""
    rank: PositiveInt = 8
    """r, of each expert"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    routing: Literal["spectral", "plain"] = "spectral"
    """whether the router's gradient spares the directions that the tasks before used"""
    scaling: Literal["curvature", "plain"] = "curvature"
    """whether the gradient of A is scaled by the inverse covariance of the tasks before"""
    activation: Literal["adaptive", "all"] = "adaptive"
    """whether experts that the tasks before use more than the present one are frozen while it lasts"""
    components: PositiveInt = 64
    """how many eigenvectors of the covariance are kept, at most"""
    delta: Annotated[float, Field(gt=0, le=1)] = 0.9
    """the share of the covariance's trace that V has"""
    mu: PositiveFloat = 0.9
    """added to the eigenvalues in `scaling`: the larger, the plainer"""
    tau: float = 0.1
    """the score below which an expert is frozen, -1 to 1; at -1 none is"""
    damping: Literal["full", "released"] = "full"
    """g of `routing`: as above, or the released code's, between 0.8 and 1"""
    mixing: Literal["outputs", "parameters"] = "outputs"
    """sum_i w_i B_i A_i x (the paper), or (sum_j w_j B_j)(sum_i w_i A_i) x (the released code)"""
    gate: Literal["token", "batch"] = "token"
    """w of each token, or its mean over all tokens of the batch (the released code), which makes answers depend on what
    else stands in the batch"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        experts = LoRAExperts if self.mixing == "outputs" else MixedPairs
        return {
            name: MixtureLinear(
                base,
                experts=experts(base, self.num_experts, self.rank),
                router=RememberingRouter(base, self.num_experts, self.components, self.gate),
                gate=Softmax(),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    @torch.no_grad()
    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        for router, experts in _parts(layers):
            router.hear()
            a, b, g = experts.lora_A, experts.lora_B, router.weight
            if not router.remembers or a.grad is None or b.grad is None or g.grad is None:
                continue
            if self.routing == "spectral":
                g.grad.copy_(router.damped(g.grad, router.routing_factors(self.damping)))
            if self.scaling == "curvature":
                a.grad.copy_(router.damped(a.grad, self.mu / (router.values + self.mu)))
            if self.activation == "adaptive":
                frozen = router.now_frozen(self.tau)
                rows = frozen.repeat_interleave(experts.rank)
                a.grad[rows], b.grad[rows] = 0, 0
                router.held = frozen, a[rows].clone(), b[rows].clone()

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        for router, experts in _parts(layers):
            router.count()
            if router.held is not None:  # the optimiser's momentum and weight decay moved them
                frozen, a, b = router.held
                rows = frozen.repeat_interleave(experts.rank)
                experts.lora_A[rows], experts.lora_B[rows] = a, b
                router.frozen.copy_(frozen)
                router.held = None

    def after_task(self, layers: Mapping[str, Mixture]) -> None:
        for router, _ in _parts(layers):
            router.turn(self.delta)


def eigenpairs(sketch: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Values (q,), from the largest, and vectors (q, I) of the C whose ``sketch`` is C onto, (I, q).

    C is taken to be sketch (onto' sketch)^-1 sketch', which is exact up to rank q.
    """
    inner = onto.t() @ sketch
    values, vectors = torch.linalg.eigh((inner + inner.t()) / 2)
    sure = values > 1e-12 * values[-1]
    root = sketch @ (vectors[:, sure] / values[sure].sqrt())
    found, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return singular.square(), found.t()


def _parts(layers: Mapping[str, Mixture]) -> Iterator[tuple[RememberingRouter, Pairs]]:
    for layer in layers.values():
        if isinstance(layer, LowRankMixture) and isinstance(layer.router, RememberingRouter):
            assert isinstance(layer.experts, Pairs)
            yield layer.router, layer.experts


def _state(start: Tensor, base: nn.Module) -> nn.Parameter:
    return nn.Parameter(start.to(**place(base)), requires_grad=False)  # parameters are saved, buffers are not


def _columns(rows: int, count: int) -> Tensor:
    """Orthonormal columns (rows, count) that say nothing of the data."""
    start = torch.randn(rows, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(start).Q


def _spread(mass: Tensor) -> Tensor:
    """Shifted and scaled so that the least is 0 and the most is 1; all 0 where they are equal."""
    low, high = mass.aminmax()
    return (mass - low) / (high - low).clamp_min(torch.finfo(mass.dtype).tiny)
