"""How to train: the settings of a run, each checked and with its default."""

import difflib
import math
from dataclasses import asdict
from typing import Any, Literal

from accelerate.tracking import filter_trackers
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from polyrank.combine import COMBINERS, Combiner
from polyrank.mixing import Mixing
from polyrank.retaining import QualityRetaining

TRACKERS = "trackers"  # the folder of their files, in the run's
HARMLESS = (
    "checkpoint_every",
    "eval_batch_size",
    "trackers",
    "sharding",
)  # settings that change no weight: a run may go on with others


class Training(BaseModel):
    """How to train. batch_size counts the examples of one step over all processes and micro-batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1, description="micro-batches that one step is split into, on each process")
    lr: float = Field(default=1e-3, gt=0, description="learning rate of the adapter")
    head_lr: float = Field(default=3e-3, gt=0, description="learning rate of the heads")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(
        default=0.06, ge=0, lt=1, description="share of the steps over which the rate rises from zero"
    )
    schedule: Literal["linear", "cosine"] = "linear"
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    precision: Literal["fp32", "bf16"] = "fp32"
    sharding: Literal["none", "fsdp2"] = Field(
        default="none",
        description="of several processes, whether each holds the frozen model whole, or a part of each weight (FSDP2)",
    )
    checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    eval_every: int = Field(default=100, ge=1, description="steps between two looks at the held-out examples")
    eval_batch_size: int = Field(default=64, ge=1, description="rows of a batch when held-out examples are scored")
    holdout: float = Field(
        default=0.1, ge=0, lt=1, description="share of each task's training examples held out to choose the step"
    )
    checkpoint_every: int = Field(
        default=100, ge=0, description="steps between two checkpoints in the run folder; 0: only when interrupted"
    )
    max_holdout: int = Field(default=100, ge=0, description="at most this many held-out examples per task")
    mixing: Mixing = Mixing()
    trackers: list[str] = Field(
        default=[], description="where else to log: tensorboard, wandb, mlflow, ... (what accelerate knows and finds)"
    )
    task_weights: dict[str, float] | None = Field(
        default=None, description="w_t of each task; default: its share of the labels"
    )
    combine: dict[str, Any] | None = Field(
        default=None,
        description="how the tasks' gradients or losses are combined: a name, or name and settings; default: the "
        "sampler decides",
    )
    quality_retaining: QualityRetaining | None = Field(
        default=None,
        description="a loss that keeps each task's answers near what they were, from EMTAL; {} turns it on",
    )
    seed: int = Field(default=0, ge=0)

    @field_validator("combine", mode="before")
    @classmethod
    def _combine(cls, given: object) -> object:
        """The combiner with every setting filled in; `combine: nash_mtl` is short for `combine: {name: nash_mtl}`."""
        if given is None:
            return None
        fields = {"name": given} if isinstance(given, str) else given
        name = fields.get("name") if isinstance(fields, dict) else None
        if not isinstance(fields, dict) or name not in COMBINERS:
            close = difflib.get_close_matches(str(name), COMBINERS, 1, 0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown combiner {name!r}{hint} (known: {', '.join(sorted(COMBINERS))})")
        settings = {key: value for key, value in fields.items() if key != "name"}
        resolved: Any = TypeAdapter(COMBINERS[name]).validate_python(settings)
        return {"name": name, **asdict(resolved)}

    @model_validator(mode="after")
    def _one_decides(self) -> "Training":
        if self.combine is not None and self.task_weights is not None:
            raise ValueError("task_weights and combine both say how much a task counts: give one of them")
        combiner = self.combiner()
        if self.mixing.order == "sequence" and (self.combine is not None or self.task_weights is not None):
            raise ValueError(
                "mixing.order: sequence gives each step one task, so that there is nothing to weigh: leave out combine "
                "and task_weights"
            )
        if combiner is not None and combiner.needs != "nothing" and self.mixing.batches == "one_task":
            raise ValueError(
                "mixing.batches: one_task gives each step one task, so that there is nothing to combine: take mixed"
            )
        return self

    def combiner(self) -> Combiner | None:
        if self.combine is None:
            return None
        settings = {key: value for key, value in self.combine.items() if key != "name"}
        return COMBINERS[self.combine["name"]](**settings)

    def check_trackers(self) -> None:
        """
        Raises:
            ValueError: a tracker that accelerate does not know, or whose package is not here.
        """
        found = [str(one) for one in filter_trackers([*self.trackers], TRACKERS)] if self.trackers else []
        for name in self.trackers:
            if name not in found:
                raise ValueError(f"the tracker {name!r} is not installed: pip install {name}, or leave it out")

    def rate(self, step: int, stage: range | None = None) -> float:
        """The factor on the learning rates at a step counted from 0: a pure function, so resuming needs no state.

        stage: the steps over which it rises and falls; all of them by default.
        """
        steps = self.steps if stage is None else len(stage)
        step -= 0 if stage is None else stage.start
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        left = (steps - step) / max(1, steps - rise)  # 1 -> 0
        return left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
