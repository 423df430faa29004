"""One paper, one file, one frozen dataclass. ``METHODS`` gives the names of recipes and of the command line."""

from .adalora import AdaLoRA as AdaLoRA
from .ase import ASE as ASE
from .base import Method as Method
from .c_lorae import CLoRAE as CLoRAE
from .conditional_mixlora import ConditionalMixLoRA as ConditionalMixLoRA
from .dora import DoRA as DoRA
from .dropout import Dropout as Dropout
from .emtal import EMTAL as EMTAL
from .faded import Faded as Faded
from .fgmoe import FGMoE as FGMoE
from .hydralora import HydraLoRA as HydraLoRA
from .lora import LoRA as LoRA
from .loramoe import LoRAMoE as LoRAMoE
from .malora import MALoRA as MALoRA
from .melora import MELoRA as MELoRA
from .milora import MiLoRA as MiLoRA
from .mixlora import MixLoRA as MixLoRA
from .mmolre import MMoLRE as MMoLRE
from .moa import MoA as MoA
from .mode import MoDE as MoDE
from .moelora import MOELoRA as MOELoRA
from .mola import MoLA as MoLA
from .moore import MoORE as MoORE, MoORETopK as MoORETopK
from .more import MoRE as MoRE, selected_ranks as selected_ranks
from .moslora import MoSLoRA as MoSLoRA
from .mtl_lora import MTLLoRA as MTLLoRA
from .multilora import MultiLoRA as MultiLoRA
from .omoe import OMoE as OMoE
from .pissa import PiSSA as PiSSA
from .poly import Poly as Poly
from .rslora import RsLoRA as RsLoRA
from .same import SAME as SAME
from .smola import SMoLA as SMoLA
from .smora import SMoRA as SMoRA
from .task_lora import TaskLoRA as TaskLoRA
from .teamlora import TeamLoRA as TeamLoRA
from .vb_lora import VBLoRA as VBLoRA
from .xlora import XLoRA as XLoRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "dora": DoRA,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "moslora": MoSLoRA,
    "melora": MELoRA,
    "multilora": MultiLoRA,
    "vb_lora": VBLoRA,
    "adalora": AdaLoRA,
    "task_lora": TaskLoRA,
    "more": MoRE,
    "mtl_lora": MTLLoRA,
    "moelora": MOELoRA,
    "poly": Poly,
    "moore": MoORE,
    "moore_topk": MoORETopK,
    "ase": ASE,
    "c_lorae": CLoRAE,
    "hydralora": HydraLoRA,
    "loramoe": LoRAMoE,
    "mola": MoLA,
    "malora": MALoRA,
    "mode": MoDE,
    "smora": SMoRA,
    "teamlora": TeamLoRA,
    "omoe": OMoE,
    "conditional_mixlora": ConditionalMixLoRA,
    "moa": MoA,
    "mixlora": MixLoRA,
    "emtal": EMTAL,
    "faded": Faded,
    "dropout": Dropout,
    "fgmoe": FGMoE,
    "smola": SMoLA,
    "xlora": XLoRA,
    "same": SAME,
}
