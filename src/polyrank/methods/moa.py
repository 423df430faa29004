"""MoA: Mixture-of-LoRAs: An Efficient Multitask Tuning for Large Language Models (Feng et al., COLING 2024).

https://arxiv.org/abs/2403.03432

    y = W x + b + (alpha / r) B_e A_e x,    e = argmax G mean(prompt)  of each layer;  in training e = the task
    loss += router_loss * mean over layers and samples of cross-entropy(G mean(prompt), task)

Two stages. Each task first trains a LoRA alone, the bank. Then the bank is put side by side, and every layer learns to
tell from the prompt which task a sample is of, while the LoRAs train on. So no task is asked for at inference; only to
generate with a cache, stand inside `adapter.on(task)`, which keeps the prompt's choice whatever task is named.

Choose it if the tasks are not named at inference, or LoRAs are there already: `adapter.load_bank({task: folder})`.
A recipe trains the bank first (its heads are not kept). `add_task` lets one more LoRA join.

Reconstruction: no code was released and the paper's text was not read in full.
- The router is linear and of each layer, its choice the layer's own (a majority vote of the layers is also described).
- ``router_loss`` and the LoRAs' sizes are choices. The router's gradient reaches the layers below it.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Mixture,
    MixtureLinear,
    Note,
    Router,
    Site,
    TaskExperts,
    TaskTable,
    exact_linear,
    for_samples,
    in_out_features,
    uniform,
)
from .base import STRICT, Method
from .lora import LoRA


class TaskGuess(Router):
    """The one expert of a sample: its task's in training, afterwards the one that the prompt looks like."""

    reads = frozenset({"task", "sample"})

    def __init__(self, base: nn.Module, num_tasks: int) -> None:
        super().__init__()
        self.weight = TaskTable(uniform(base, num_tasks, in_out_features(base)[0]))

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        if self.training and site.per_token:  # requests flattened into rows have no prompts to pool
            return F.one_hot(site.ids(x), len(self.weight))
        pooled = site.pool_prompt(x)  # (B, I)
        logits = exact_linear(pooled, self.weight())
        if not self.training:
            return F.one_hot(for_samples(logits, x).argmax(-1), len(self.weight))
        ids = site.ids(x)
        if site.listens:
            own = ids.reshape(-1)[:: max(1, ids.numel() // len(logits))]
            total = F.cross_entropy(logits, own, reduction="sum")
            site.note("router", torch.stack([total, torch.full_like(total, len(own))]))
        return F.one_hot(ids, len(self.weight))

    def active_parameters(self) -> int:
        return sum(p.numel() for p in self.weight.parameters())

    def flops_per_token(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoA(Method):
    SIZE: ClassVar[str] = "T * (rank * (I + O) + I)"
    NOTES = "sums"

    rank: PositiveInt = 8
    """r, of each LoRA"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    router_loss: NonNegativeFloat = 0.1
    """the weight of the routers' cross-entropy"""

    def bank(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=self.alpha)

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base,
                experts=TaskExperts(base, len(tasks), self.rank),
                router=TaskGuess(base, len(tasks)),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        values = [value for _, value in notes.get("router", ())]
        if not values:
            return {}
        total, count = torch.stack(values).unbind(-1)  # (layers,) each
        return {"router": self.router_loss * (total / count).mean()}
