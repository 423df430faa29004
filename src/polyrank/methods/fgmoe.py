"""FGMoE: Fine-Grained Mixture of Experts for Parameter-Efficient Multi-Task Learning (ACM MM 2025).

https://arxiv.org/abs/2507.19077

    a = act(U x + c + s [m * (B_t A_t x) + f B_0 A_0 x])
    y = D a + d + s [B'_t A'_t (m * a) + f B'_0 A'_0 a]            s = alpha / r
    m = 1 on the first S of E slices of hidden units; on the others the gate of the slice:
        g = softmax over the k best of G_t x, 0 elsewhere;         f = sigmoid(w_t x)

Each task has its own low-rank update of a frozen feed-forward block, and the hidden axis of that update is cut into
fine-grained experts: S of them work always (the task's *shared* ones), of the others each token chooses k. One *global*
update belongs to all tasks; how much of it a token takes, f, depends on the token and on its task.

Reconstruction: of the paper only the abstract could be read. It has experts along the hidden dimension inside a task,
shared experts of each task, and one global expert whose transfer adapts to feature and task; the equations above, and
that the frozen block itself stays whole, are ours. No loss beside the tasks' is known to us, so there is none.

Choose it if tasks need much that is their own, and a little of each other.

Deviations from the paper: it trains the decoder of a dense-prediction network; here any feed-forward block is adapted,
and other targeted layers get a plain LoRA. In a gated block, act(V x) * U x, V is updated as U is.
"""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    FeedForward,
    FeedForwardMixture,
    JointTopK,
    LoRAExperts,
    PerTaskRouter,
    TaskExperts,
    add,
    run,
)
from .base import STRICT, BlockMethod, check_units


class Update(nn.Module):
    """What the tasks and all of them together add to one frozen layer: A and B of each task, and of all."""

    def __init__(self, base: nn.Module, num_tasks: int, rank: int) -> None:
        super().__init__()
        self.task, self.all = TaskExperts(base, num_tasks, rank), LoRAExperts(base, 1, rank)

    def down(self) -> Tensor:
        return torch.cat([self.task.down(), self.all.down()])  # (T r + r, I)

    def split(self, z: Tensor, own: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Of z (..., T r + r): the tasks' part (..., T r), zero but for one's own, and a share of the rest (..., r)."""
        mine, common = z[..., : -self.all.rank], z[..., -self.all.rank :]
        mine = (mine.unflatten(-1, (own.shape[-1], -1)) * own.to(z.dtype).unsqueeze(-1)).flatten(-2)
        return mine, common * share.to(z.dtype)

    def active_parameters(self) -> int:
        return self.task.active_parameters(1) + self.all.active_parameters(1)


class FineGrainedFeedForward(FeedForwardMixture):
    """A frozen block whose low-rank updates are cut along the hidden axis."""

    def __init__(
        self, base: FeedForward, num_tasks: int, num_experts: int, k: int, num_shared: int, rank: int, scale: float
    ) -> None:
        super().__init__(base)
        self.num_tasks, self.num_experts, self.num_shared, self.scale = num_tasks, num_experts, num_shared, scale
        self.up, self.down = Update(base.up, num_tasks, rank), Update(base.down, num_tasks, rank)
        self.side = None if base.gate is None else Update(base.gate, num_tasks, rank)
        self.router, self.gate = PerTaskRouter(base.up, num_tasks, num_experts - num_shared), JointTopK(k)
        self.transfer = PerTaskRouter(base.up, num_tasks, 1)

    def forward(self, x: Tensor) -> Tensor:
        base, site = self.base, self.site
        own = F.one_hot(site.ids(x), self.num_tasks)  # broadcasts to (..., T)
        share = torch.sigmoid(self.transfer(x, x[..., :0], site))  # (..., 1)
        weights = self.gate(self.router(x, x[..., :0], site))  # (..., E - S)
        always = torch.ones_like(weights[..., :1]).expand(*weights.shape[:-1], self.num_shared)
        units = torch.cat([always, weights], -1)  # (..., E)

        def updated(layer: nn.Module, update: Update) -> Tensor:
            h, z = run(layer, x, update.down())
            mine, common = update.split(z * self.scale, own, share)
            h = add(layer, h, common, update.all.up(layer))
            return h + self._sliced(mine @ update.task.up(layer).to(mine.dtype), units)

        up = updated(base.up, self.up)
        gate = None if base.gate is None or self.side is None else updated(base.gate, self.side)
        a = base.activate(up, gate)  # (..., H)
        down = self.down
        y, common = run(base.down, a, down.all.down())
        mine = F.linear(self._sliced(a, units), down.task.down().to(a.dtype))
        mine, common = down.split(torch.cat([mine, common], -1) * self.scale, own, share)
        b = torch.cat([down.task.up(base.down), down.all.up(base.down)])
        return base.outer(add(base.down, y, torch.cat([mine, common], -1), b))

    def _sliced(self, hidden: Tensor, units: Tensor) -> Tensor:
        """hidden (..., H), each of E slices times its weight (..., E)."""
        return (hidden.unflatten(-1, (self.num_experts, -1)) * units.to(hidden.dtype).unsqueeze(-1)).flatten(-2)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"task", "token"})

    def active_parameters(self) -> int:
        updates = [self.up, self.down] if self.side is None else [self.up, self.side, self.down]
        routers = self.router.active_parameters() + self.transfer.active_parameters()
        return sum(update.active_parameters() for update in updates) + routers

    def flops_per_token(self) -> int:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        routers = (self.router.active_parameters() + self.transfer.active_parameters()) * (self.num_tasks - 1)
        return self.base_flops_per_token() + 2 * (trained - routers)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FGMoE(BlockMethod):
    SIZE: ClassVar[str] = "(T + 1) * rank * ((1 + G) * (I + H) + H + O) + T * (num_experts - num_shared + 1) * I"

    num_experts: PositiveInt = 8
    """E, the slices of the hidden units; it divides their number"""
    k: PositiveInt = 2
    """how many of the routed slices a token takes"""
    num_shared: NonNegativeInt = 1
    """S, the slices that always work"""
    rank: PositiveInt = 4
    """r, of each update"""
    alpha: PositiveFloat = 8.0
    """the scale is alpha / r"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.num_experts - self.num_shared:
            raise ValueError(
                f"k={self.k} of {self.num_experts - self.num_shared} routed slices: lower k or num_shared, or raise "
                "num_experts"
            )
        return self

    def block(self, base: FeedForward, tasks: Sequence[str]) -> FineGrainedFeedForward:
        check_units(self.num_experts, base)
        return FineGrainedFeedForward(
            base, len(tasks), self.num_experts, self.k, self.num_shared, self.rank, self.alpha / self.rank
        )
