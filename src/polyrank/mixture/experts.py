"""Experts own the thin maps A and B, and how a gate acts on the ranks between them."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .base import in_out_features
from .site import Site
from .start import TaskTable, uniform, zeros


class Experts(nn.Module, ABC):
    """What every parametrisation of the experts provides."""

    num_experts: int
    reads: frozenset[str] = frozenset()  # beside what the router reads: "task" where the experts have parts of a task
    cancels = False  # whether ranks start as a difference that is zero only with all of them: none may be left out

    @abstractmethod
    def down(self) -> Tensor:
        """A: the rows of all experts, (R, I)."""

    @abstractmethod
    def up(self, base: nn.Module) -> Tensor:
        """B: (R', O). ``base`` is for experts that stand on the frozen weight."""

    @abstractmethod
    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        """q = C(gate, task) z: (..., R) -> (..., R'), linear in z. ``gate`` (..., E), or None."""

    def active_parameters(self, num_active: int) -> int:
        """Trained parameters that work on one token of which ``num_active`` experts take care."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained * num_active // self.num_experts


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(z, gate)
        return z * _over_ranks(gate, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, gate = ctx.saved_tensors
        (dq,) = grads
        dz = dgate = None
        with torch.autocast(z.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dz = dq * _over_ranks(gate, z)
            if ctx.needs_input_grad[1]:
                dgate = (dq * z).sum_to_size(*gate.shape[:-1], z.shape[-1]) @ _ones(gate, z).t()
        return dz, dgate


def weigh(z: Tensor, gate: Tensor) -> Tensor:
    """z (..., E r) with the ranks of each expert times its weight. gate: (..., E), broadcasts over the tokens.

    The weights are spread over the ranks by a product with ones and zeros: it is exact, and its backward pass is a
    product too, not a sum over short rows. It is not kept for the backward pass, but done again.
    """
    gate = gate.to(z.dtype)
    if gate.shape[-1] == z.shape[-1]:
        return z * gate
    return _Weighed.apply(z, gate) if torch.is_grad_enabled() else z * _over_ranks(gate, z)  # type: ignore[return-value]


def _over_ranks(gate: Tensor, z: Tensor) -> Tensor:
    return gate @ _ones(gate, z)


def _ones(gate: Tensor, z: Tensor) -> Tensor:
    """(E, E r): row e has ones where expert e has its ranks."""
    num = gate.shape[-1]
    return torch.eye(num, device=z.device, dtype=z.dtype).repeat_interleave(z.shape[-1] // num, 1)


class Pairs(Experts):
    """E pairs (A_e, B_e) of one rank, stacked. A as nn.Linear's default, B zero: starts as the base."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank = num_experts, rank
        self.lora_A = uniform(base, num_experts * rank, in_features)
        self.lora_B = zeros(base, num_experts * rank, out_features)

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B


class LoRAExperts(Pairs):
    """Pairs that are gated each by itself."""

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        if gate is None:
            return z
        return weigh(z, gate)


class TaskExperts(Experts):
    """One pair for each task, a part of its own: others join or freeze without it."""

    def __init__(self, base: nn.Module, num_tasks: int, rank: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank = num_tasks, rank
        self.lora_A = TaskTable(uniform(base, num_tasks, rank, in_features))
        self.lora_B = TaskTable(zeros(base, num_tasks, rank, out_features))

    def down(self) -> Tensor:
        return self.lora_A().flatten(0, 1)

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B().flatten(0, 1)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        return weigh(z, gate)

    @torch.no_grad()
    def put(self, task: int, a: Tensor, b: Tensor) -> None:
        """Let the pair of a task be A (R, I) and B (R, O). Ranks that it has not keep their A and have a B of zero.

        Raises:
            ValueError: more ranks than the experts have.
        """
        if len(a) > self.rank:
            raise ValueError(f"a LoRA of rank {len(a)} does not fit experts of rank {self.rank}: raise their rank")
        mine = self.lora_A.each()[task], self.lora_B.each()[task]
        mine[0][: len(a)] = a
        mine[1].zero_()
        mine[1][: len(b)] = b

    def active_parameters(self, num_active: int) -> int:
        pairs = zip(self.lora_A.each(), self.lora_B.each(), strict=True)  # some may train while others rest
        return max(sum(p.numel() for p in pair if p.requires_grad) for pair in pairs)


class SharedDownExperts(Experts):
    """One A for all experts, E alternatives of B. Each block of ``block`` ranks is gated by itself.

    The gate is (..., rank / block * E): the weights of one block's alternatives stand together.
    """

    def __init__(self, base: nn.Module, num_experts: int, rank: int, block: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank, self.block = num_experts, rank, block
        self.lora_A = uniform(base, rank, in_features)
        self.lora_B = zeros(base, num_experts * rank, out_features)

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        blocks = self.rank // self.block
        weights = gate.to(z.dtype).unflatten(-1, (blocks, self.num_experts)).transpose(-1, -2)  # (..., E, blocks)
        return (weights.unsqueeze(-1) * z.unflatten(-1, (1, blocks, self.block))).flatten(-3)  # (..., E * R)


class SingularExperts(Experts):
    """One LoRA pair that starts as a part of W itself: the pair's start is taken off again, so W need not change.

    y = W x + s (B A - B_0 A_0) x equals (W - s B_0 A_0) x + s B A x, and starts as the base.
    """

    cancels = True

    def __init__(self, base: nn.Module, u: Tensor, sigma: Tensor, vt: Tensor, scale: float) -> None:
        """A_0 = sqrt(sigma / s) vt and B_0 = u sqrt(sigma / s), for u (O, R), sigma (R,), vt (R, I)."""
        super().__init__()
        self.num_experts = 1
        root = (sigma / scale).sqrt().unsqueeze(-1)
        self.start_A: Tensor
        self.start_B: Tensor
        self.register_buffer("start_A", root * vt, persistent=False)  # (R, I)
        self.register_buffer("start_B", (root * u.t()).contiguous(), persistent=False)  # (R, O)
        self.lora_A, self.lora_B = nn.Parameter(self.start_A.clone()), nn.Parameter(self.start_B.clone())

    def down(self) -> Tensor:
        return torch.cat([self.lora_A, self.start_A])

    def up(self, base: nn.Module) -> Tensor:
        return torch.cat([self.lora_B, -self.start_B])

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return z
