"""DWA: End-to-End Multi-Task Learning with Attention (Liu, Johns, Davison, CVPR 2019), dynamic weight average.
https://arxiv.org/abs/1803.10704

    w_t = T softmax_t(r_t / temperature),   r_t = L_t(last window) / L_t(the window before);   w_t = 1 at first

L_t of a window is its mean loss. The weights sum to the number of live tasks, as in the paper.

Deviations: the paper's window is an epoch, which a mixture of tasks does not have; here it is ``window`` steps (25 as
in AvivNavon/nash-mtl), and of each task the steps in which it was live. A task without two windows has r_t = 1.
"""

from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DWA(PerTask):
    window: PositiveInt = 25
    """steps over which a task's loss is averaged"""
    temperature: PositiveFloat = 2.0
    """of the softmax over the ratios; higher is more even"""

    needs = "nothing"
    memory: ClassVar = {"sum": 0.0, "steps": 0.0, "last": 0.0, "before": 0.0}

    def solve(self, step: Step, memory: State) -> Tensor:
        before = memory["before"]
        rate = torch.where(before == 0, 1.0, memory["last"] / before)
        return len(rate) * (rate / self.temperature).softmax(0)

    def learn(self, step: Step, losses: Tensor, memory: State) -> None:
        total, steps = memory["sum"] + losses, memory["steps"] + 1
        full = steps == self.window
        memory["before"] = torch.where(full, memory["last"], memory["before"])
        memory["last"] = torch.where(full, total / steps, memory["last"])
        memory["sum"], memory["steps"] = total.where(~full, 0.0), steps.where(~full, 0.0)
