"""One task of an adapted model as files that engines and libraries read without Polyrank: a LoRA, or a plain model."""

from .approximate import gate_means as gate_means, task_weights as task_weights
from .check import Difference as Difference, check as check, outputs as outputs, refuse as refuse
from .lora import (
    CONFIG as CONFIG,
    LoRA as LoRA,
    beside as beside,
    common_rank as common_rank,
    fitted as fitted,
    of_change as of_change,
    read_lora as read_lora,
    write_lora as write_lora,
)
from .task import (
    Exported as Exported,
    Format as Format,
    export as export,
    loras_of as loras_of,
    truncation as truncation,
)
