"""How tasks are combined into one update: what solves for weights from the gradients, and what weighs the losses."""

from .achievement import Achievement as Achievement
from .aligned_mtl import AlignedMTL as AlignedMTL
from .base import Combiner as Combiner, State as State, Step as Step
from .cagrad import CAGrad as CAGrad
from .dwa import DWA as DWA
from .famo import FAMO as FAMO
from .gls import GLS as GLS
from .gradnorm import GradNorm as GradNorm
from .imtl_g import IMTLG as IMTLG
from .mgda import MGDA as MGDA
from .nash_mtl import NashMTL as NashMTL
from .pcgrad import PCGrad as PCGrad
from .rlw import RLW as RLW
from .uncertainty import Uncertainty as Uncertainty
from .uniform import Uniform as Uniform
from .upgrad import UPGrad as UPGrad

COMBINERS: dict[str, type[Combiner]] = {
    "nash_mtl": NashMTL,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "imtl_g": IMTLG,
    "aligned_mtl": AlignedMTL,
    "upgrad": UPGrad,
    "uniform": Uniform,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "rlw": RLW,
    "gls": GLS,
    "famo": FAMO,
    "gradnorm": GradNorm,
    "achievement": Achievement,
}
