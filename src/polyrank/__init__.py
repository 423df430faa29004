"""Polyrank: adapt one frozen pretrained model to many tasks with a mixture of low-rank experts.

adapter = polyrank.adapt(model, polyrank.MoRE(rank=8), tasks=["news", "mood"], targets="all-linear")
logits = model(**batch, task_ids=task_ids)
"""

from importlib.metadata import version as _version

from .adapt import Adapter as Adapter, adapt as adapt
from .methods import (
    ASE as ASE,
    METHODS as METHODS,
    LoRA as LoRA,
    Method as Method,
    MoORE as MoORE,
    MoORETopK as MoORETopK,
    MoRE as MoRE,
)

__version__ = _version("polyrank")
