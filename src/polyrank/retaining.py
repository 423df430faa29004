"""Quality retaining: a loss that keeps a task's answers near what they were (EMTAL, Zhong et al., NeurIPS 2024).

    L_t + weight / L_t * mean over the samples of KL(softmax(z / tau) | softmax(Z_c / tau)) tau^2
    Z_c <- m Z_c + (1 - m) mean of the logits z of the samples of class c, after a step that was taken

Each task has a bank Z of the logits of its classes; c is a sample's label. A task that has been learnt well (a small
L_t) is held more tightly. https://arxiv.org/abs/2501.06884

Deviations. The paper's tasks are one space of labels with one bank; here each task of classes has its own. L_t is that
of the micro-batch, without a gradient (as the paper's equation; the released code has a running mean), and tau is 1
(the released code: 2). The released code keeps by default the last two logits of each class, and no moving average.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from polyrank.models import Answer
from polyrank.tasks import MISSING, Classification, Task


class QualityRetaining(BaseModel):
    """Keep the answers of tasks of classes near a moving average of what they were."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    weight: float = Field(default=1.0, gt=0, description="of the loss")
    momentum: float = Field(default=0.5, ge=0, lt=1, description="m: how much of the bank stays in each step")
    temperature: float = Field(default=1.0, gt=0, description="tau")


class Retaining:
    """The banks, and what the present step adds to them."""

    def __init__(self, settings: QualityRetaining, tasks: Sequence[Task]) -> None:
        """
        Raises:
            ValueError: no task has classes.
        """
        self.settings, self.names = settings, [task.name for task in tasks]
        self.classes = {task.name: len(task.names) for task in tasks if isinstance(task, Classification)}
        if not self.classes:
            raise ValueError(
                "quality_retaining keeps the answers of tasks of classes, and no task is a classification: leave it out"
            )
        self.state: dict[str, Tensor] = {}  # "bank TASK" (C, C), "seen TASK" (C,)
        self.last = torch.zeros(len(tasks))  # what the step's losses had more, of this process
        self.fresh: dict[str, Tensor] = {}  # TASK -> (C, C + 1): sums of logits by class, and how many

    def begin(self, device: torch.device) -> None:
        """A step begins, perhaps again: what an earlier try left is forgotten."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self.fresh = {name: torch.zeros(n, n + 1, device=device) for name, n in self.classes.items()}
        self.last = torch.zeros(len(self.names), device=device)

    def penalties(self, answers: Mapping[str, Answer], labels: Mapping[str, Tensor], means: Tensor) -> Tensor:
        """What to add to S_t of every task (T,) of a micro-batch. means: L_t (T,) of the micro-batch."""
        found = torch.zeros_like(means)
        for index, name in enumerate(self.names):
            if name not in self.classes or name not in answers:
                continue
            logits, classes = answers[name].logits, labels[name]
            known = classes != MISSING
            logits, classes = logits[known], classes[known]  # (n, C), (n,)
            ones = torch.ones_like(logits[:, :1])
            self.fresh[name].index_add_(0, classes, torch.cat([logits, ones], -1).detach().to(self.fresh[name]))
            if f"bank {name}" in self.state:
                tau = self.settings.temperature
                before = F.log_softmax(self.state[f"bank {name}"][classes].to(logits) / tau, -1)
                now = F.log_softmax(logits / tau, -1)
                seen = self.state[f"seen {name}"][classes].to(logits)
                apart = (F.kl_div(before, now, reduction="none", log_target=True).sum(-1) * seen).sum() * tau**2
                scale = self.settings.weight / means[index].detach().clamp_min(1e-6)
                found = found + F.one_hot(torch.tensor(index), len(means)).to(found) * scale * apart
        self.last = self.last + found.detach()
        return found

    def numbers(self) -> dict[str, Any]:
        """For the log: what was added to each task's sum of losses."""
        return {"retaining": dict(zip(self.names, self.last.tolist(), strict=True))}

    @torch.no_grad()
    def after(self) -> None:
        """The step was taken, and ``fresh`` is that of all processes: the banks move."""
        for name, fresh in self.fresh.items():
            sums, counts = fresh[:, :-1], fresh[:, -1:]
            mean = sums / counts.clamp_min(1)
            bank = self.state.setdefault(f"bank {name}", torch.zeros_like(mean))
            seen = self.state.setdefault(f"seen {name}", torch.zeros(len(mean), device=mean.device))
            m = self.settings.momentum * seen.unsqueeze(-1)  # the first mean of a class is taken whole
            bank.copy_(torch.where(counts > 0, m * bank + (1 - m) * mean, bank))
            seen.copy_(torch.maximum(seen, (counts.squeeze(-1) > 0).to(seen)))
