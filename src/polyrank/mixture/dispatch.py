"""Top-k mixtures of many ranks: each token meets the pairs of its own experts alone, in grouped products.

    sum_e g_e B_e A_e x over the k experts of a token, sorted by expert:  z_e = X_e A_e',  q_e = g_e z_e,  q_e B_e

The masked dense form multiplies all experts and is the naive twin of this one. Up to some rank it is faster
nevertheless, because it moves no tokens: measured, it wins while E r <= ``DENSE_UP_TO`` k.
"""

import torch
from torch import Tensor

from .experts import Experts, LoRAExperts
from .gates import Gate

try:
    from torch.nn.functional import grouped_mm
except ImportError:  # torch before 2.10
    grouped_mm = None

# ranks of all experts for each active one, by dtype: `python -m benchmarks.speed --only dispatch`, on a CPU with AMX
DENSE_UP_TO = {torch.float32: 64, torch.bfloat16: 400, torch.float16: 400}


def pays(experts: Experts, gate: Gate | None, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether grouped products in ``dtype`` are faster than the masked dense ones, and possible.

    They want rows of 16 bytes, no fp64, and elsewhere than on an eager CPU bf16.
    """
    if gate is None or grouped_mm is None or not isinstance(experts, LoRAExperts) or dtype not in DENSE_UP_TO:
        return False
    if dtype != torch.bfloat16 and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return False
    ranks = experts.num_experts * experts.rank
    sizes = experts.rank, experts.lora_A.shape[1], experts.lora_B.shape[1]
    aligned = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    return aligned and ranks > DENSE_UP_TO[dtype] * gate.num_active(experts.num_experts)


def add_dispatched(y: Tensor, x: Tensor, weights: Tensor, experts: LoRAExperts, k: int, scale: float) -> Tensor:
    """y + scale * sum_e g_e B_e A_e x over each token's k experts of the largest weights.

    Args:
        y: (..., O). x: (..., I). weights: (..., E), of which at most k are not zero; broadcasts over the tokens.
    """
    shape, num = (experts.num_experts, experts.rank, -1), experts.num_experts
    a, b = experts.lora_A.to(y.dtype).view(shape), experts.lora_B.to(y.dtype).view(shape)
    weights = weights.expand(*x.shape[:-1], num).reshape(-1, num)
    chosen = weights.detach().abs().topk(k, -1).indices  # (N, k)
    order = chosen.flatten().argsort()
    tokens = order // k
    ends = torch.searchsorted(chosen.flatten()[order], torch.arange(num, device=y.device), right=True).int()
    gate = (scale * weights.gather(-1, chosen)).flatten()[order].to(y.dtype)
    z = _grouped(x.to(y.dtype).reshape(-1, x.shape[-1]).index_select(0, tokens), a.transpose(1, 2), ends)
    updates = _grouped(z * gate.unsqueeze(-1), b, ends)  # (N k, O)
    return y.reshape(-1, y.shape[-1]).index_add(0, tokens, updates).view(y.shape)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    assert grouped_mm is not None
    return grouped_mm(x, weights, offs=ends)
