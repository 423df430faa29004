"""TaskLoRA: One LoRA for Each Task, LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022).

https://arxiv.org/abs/2106.09685        batches of several LoRAs: Punica (Chen et al., 2023), arXiv:2310.18547

    y = W x + b + (alpha / r) B_t A_t x

The tasks have nothing in common but the frozen model. A mixed batch runs in one pass: each sample's own A and B are
gathered, and its tokens are multiplied with no other.

Choose it as the reference that tasks trained together have to beat, or to serve LoRAs that were trained apart (put
there with `load_bank`) in one model. Every task leaves as a LoRA, or as a plain model.

Deviations from the released code:
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import Mixture, TaskExperts, TaskTable, add, run, weight_of
from .base import STRICT, Method


class TaskLinear(Mixture):
    """A frozen linear layer and one LoRA for each task beside it; each sample meets its own task's alone."""

    def __init__(self, base: nn.Module, num_tasks: int, rank: int, scale: float) -> None:
        super().__init__(base)
        self.experts, self.scale = TaskExperts(base, num_tasks, rank), scale

    def forward(self, x: Tensor) -> Tensor:
        ids, experts = self.site.ids(x), self.experts
        if self.site.per_token:  # all tasks' products, of which each token keeps its own
            y, z = run(self.base, x, experts.down())
            gate = F.embedding(ids, torch.eye(experts.num_experts, dtype=z.dtype, device=z.device))
            return add(self.base, y, experts.core(z, gate, self.site), experts.up(self.base), self.scale)
        y, z = run(self.base, x, _gathered(experts.lora_A, ids))
        return add(self.base, y, z, _gathered(experts.lora_B, ids), self.scale)

    @property
    def stands_for_base(self) -> bool:
        return False

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"task"})

    def active_parameters(self) -> int:
        return self.experts.active_parameters(1)

    @torch.no_grad()
    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        return self.experts.lora_A.each()[task], self.scale * self.experts.lora_B.each()[task]

    @torch.no_grad()
    def task_weight(self, task: int) -> Tensor:
        a, b = self.task_lora(task)
        return weight_of(self.base).to(a.dtype) + b.t() @ a

    def flops_per_token(self) -> int:
        pair = self.experts.lora_A.row_numel() + self.experts.lora_B.row_numel()
        return self.base_flops_per_token() + 2 * pair


def _gathered(table: TaskTable, ids: Tensor) -> Tensor:
    """Each sample's own (B, R, ...), for ids (B, 1, ...)."""
    every = table()  # (T, R, ...)
    return F.embedding(ids.reshape(-1), every.flatten(1)).unflatten(-1, every.shape[1:])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskLoRA(Method):
    SIZE: ClassVar[str] = "T * rank * (I + O)"

    rank: PositiveInt = 8
    """r, of each task's LoRA"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {name: TaskLinear(base, len(tasks), self.rank, self.alpha / self.rank) for name, base in sites.items()}
