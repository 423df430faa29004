"""Every method once more, written from its paper's equation: no primitive, no stacking, no batching.

A twin is ``twin(method, p, weight, bias, x, ids) -> (y, auxiliary loss)`` for one layer: ``p`` the adapter's weights by
name (a list of T tensors where each task has its own), ``weight`` (O, I), ``bias`` (O), ``x`` (B, L, I), ``ids`` (B,).
"""

from polyrank import ASE, LoRA, MoORE, MoORETopK, MoRE
from polyrank.methods import Dropout

from .by_task import BY_TASK
from .by_token import BY_TOKEN
from .given import GIVEN
from .mixed import MIXED
from .seeds import naive_ase, naive_lora, naive_moore, naive_moore_topk, naive_more, svd as svd
from .sequence import SEQUENCE

SEEDS = {LoRA: naive_lora, MoORE: naive_moore, MoORETopK: naive_moore_topk, MoRE: naive_more, ASE: naive_ase}


def naive_dropout(method, *given):
    """In evaluation: what it goes around. tests/methods/test_dropout.py has training, with a mask that is known."""
    return NAIVE[type(method.method)](method.method, *given)


NAIVE = {Dropout: naive_dropout} | SEEDS | BY_TASK | BY_TOKEN | GIVEN | MIXED | SEQUENCE


def by_name(flat):
    """Weights by name; those of a task table as one list."""
    found = {name: p for name, p in flat.items() if ".rows." not in name}
    for name in sorted((name for name in flat if ".rows." in name), key=lambda name: int(name.rpartition(".")[2])):
        found.setdefault(name.rpartition(".rows.")[0], []).append(flat[name])
    return found
