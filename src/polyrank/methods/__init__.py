"""One paper, one file, one frozen dataclass. ``METHODS`` gives the names of recipes and of the command line."""

from .ase import ASE as ASE
from .base import Method as Method
from .lora import LoRA as LoRA
from .moore import MoORE as MoORE, MoORETopK as MoORETopK
from .more import MoRE as MoRE, selected_ranks as selected_ranks

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "moore": MoORE,
    "moore_topk": MoORETopK,
    "more": MoRE,
    "ase": ASE,
}
