"""C-LoRAE: Collaborative Multi-LoRA Experts with Achievement-based Multi-Tasks Loss (Yuan et al., IJCAI 2025).

https://arxiv.org/abs/2505.06303

    y = W x + b + (alpha / r) (g_1 U(x) + g_2 D_t(x)),    g = softmax(G x) over the two
    U = B_u A_u of rank r for all tasks,    D_t = B_t A_t of rank r / T for each task
    loss += mutual_information * mean over layers of InfoNCE(U, D_t)

A universal expert beside one small expert for each task; every token decides how much of either it takes.

Choose it if the tasks are known, share much, and new ones will join: `add_task` adds one small expert.

Reconstruction: no code was released, and the formula of the information term was not found.
- The term is InfoNCE, whose fall raises a lower bound of the information that U and D_t give of each other: the mean
  outputs of both on one sample, before the gate, belong together, those of other samples of the batch do not. The
  critic is their inner product / sqrt(O), which is finite where B is 0. It sees the samples
  of one micro-batch: one alone has no such loss.
- ``task_rank`` is a field, so that a task can join later; the paper's value is r / T.
- The paper's achievement-based weights of the losses are a combiner, `achievement`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Experts,
    LinearRouter,
    LoRAExperts,
    Mixture,
    MixtureLinear,
    Note,
    Site,
    Softmax,
    TaskExperts,
    in_out_features,
)
from .base import STRICT, Method


class UniversalAndTask(Experts):
    """One expert for all, and one of each task."""

    num_experts = 2
    reads = frozenset({"task"})

    def __init__(self, base: nn.Module, num_tasks: int, rank: int, task_rank: int, informs: bool) -> None:
        super().__init__()
        self.universal, self.task = LoRAExperts(base, 1, rank), TaskExperts(base, num_tasks, task_rank)
        self.informs, self.out_features = informs, in_out_features(base)[1]

    def down(self) -> Tensor:
        return torch.cat([self.universal.down(), self.task.down()])

    def up(self, base: nn.Module) -> Tensor:
        return torch.cat([self.universal.up(base), self.task.up(base)])

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        own = F.one_hot(site.ids(z), self.task.num_experts)
        shared, mine = z.split([self.universal.rank, z.shape[-1] - self.universal.rank], -1)
        mine = self.task.core(mine, own, site)
        if self.training and self.informs and site.listens and not site.per_token:
            site.note("information", self._information(shared, mine, site))
        gate = gate.to(z.dtype)
        return torch.cat([gate[..., :1] * shared, gate[..., 1:] * mine], -1)

    def _information(self, shared: Tensor, mine: Tensor, site: Site) -> Tensor:
        u = site.pool(shared) @ self.universal.lora_B.to(shared.dtype)  # (B, O)
        d = site.pool(mine) @ self.task.lora_B().flatten(0, 1).to(mine.dtype)
        same = torch.arange(len(u), device=u.device)
        critic = u @ d.t() / self.out_features**0.5  # (B, B)
        return F.cross_entropy(critic.to(torch.promote_types(critic.dtype, torch.float32)), same)

    def active_parameters(self, num_active: int) -> int:
        own = self.task.lora_A.row_numel() + self.task.lora_B.row_numel()
        return own + self.universal.active_parameters(1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CLoRAE(Method):
    SIZE: ClassVar[str] = "(rank + T * task_rank) * (I + O) + 2 * I"

    rank: PositiveInt = 8
    """r, of the universal expert"""
    task_rank: PositiveInt = 2
    """of each task's expert; the paper's is r / T"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    mutual_information: NonNegativeFloat = 0.01
    """the weight of the information term; 0 turns it off"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        informs = self.mutual_information > 0
        return {
            name: MixtureLinear(
                base,
                experts=UniversalAndTask(base, len(tasks), self.rank, self.task_rank, informs),
                router=LinearRouter(base, 2),
                gate=Softmax(),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        values = [value for _, value in notes.get("information", ())]
        return {"mutual_information": self.mutual_information * torch.stack(values).mean()} if values else {}
