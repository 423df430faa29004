"""MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning (Yang et al., AAAI 2025).

https://arxiv.org/abs/2410.09437

    y = W x + b + (alpha / r) sum_{i <= n} g_i B_i Lambda_t A x,    g = softmax(w_t / tau)

A and the B_i are shared; each task has its own transform Lambda_t between them, and its own mixture of the B_i.

Choose it if the tasks are known, differ, and each has to leave as a plain model in the end.

Deviations from the released code:
- Dropout is 0 (theirs acts on x). The temperature has the script's value 0.1 (the constructor's default divides by 0).
- w_t starts within +-1 / sqrt(n) as theirs; with tau = 0.1 each task therefore begins close to one of the B_i.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import Experts, Mixture, MixtureLinear, SharedDownExperts, Site, Softmax, TaskLogits, TaskTable, place
from .base import STRICT, Method


class TaskTransform(Experts):
    """Shared experts behind a transform of the ranks that belongs to the task."""

    reads = frozenset({"task"})

    def __init__(self, base: nn.Module, num_tasks: int, num_experts: int, rank: int, diagonal: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.shared = SharedDownExperts(base, num_experts, rank, block=rank)
        start = torch.ones(rank, **place(base))
        start = start if diagonal else start.diag()
        self.transform = TaskTable(start.expand(num_tasks, *start.shape))

    def down(self) -> Tensor:
        return self.shared.down()

    def up(self, base: nn.Module) -> Tensor:
        return self.shared.up(base)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        every = self.transform().to(z.dtype)  # (T, r) or (T, r, r)
        own = F.embedding(site.ids(z), every.flatten(1)).unflatten(-1, every.shape[1:])
        if every.ndim == 2:
            z = own * z
        elif site.per_token:
            z = (own @ z.unsqueeze(-1)).squeeze(-1)
        else:  # a product for each sample
            rows, transforms = z.reshape(len(z), -1, z.shape[-1]), own.reshape(len(z), *every.shape[1:])
            z = torch.bmm(rows, transforms.transpose(1, 2)).view_as(z)
        return self.shared.core(z, gate, site)

    def active_parameters(self, num_active: int) -> int:
        return self.shared.active_parameters(num_active) + self.transform.row_numel()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MTLLoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + num_experts * O) + T * (rank ** (2 if transform == 'full' else 1) + num_experts)"

    num_experts: PositiveInt = 3
    """n, the alternatives of B"""
    rank: PositiveInt = 8
    """r"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    temperature: PositiveFloat = 0.1
    """tau"""
    transform: Literal["full", "diagonal"] = "full"
    """Lambda_t: an (r, r) matrix that starts as the identity, or its diagonal alone"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        diagonal = self.transform == "diagonal"
        return {
            name: MixtureLinear(
                base,
                experts=TaskTransform(base, len(tasks), self.num_experts, self.rank, diagonal),
                router=TaskLogits(base, len(tasks), self.num_experts, bound=self.num_experts**-0.5),
                gate=Softmax(temperature=self.temperature),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }
