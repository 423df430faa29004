"""Experts own the thin maps A and B, and how a gate acts on the ranks between them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

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
        gate = gate.to(z.dtype)
        if self.rank == 1:
            return z * gate
        return (z.unflatten(-1, (self.num_experts, self.rank)) * gate.unsqueeze(-1)).flatten(-2)


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
        return (z.unflatten(-1, (self.num_experts, self.rank)) * gate.to(z.dtype).unsqueeze(-1)).flatten(-2)

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
        self.register_buffer("start_B", root * u.t(), persistent=False)  # (R, O)
        self.lora_A, self.lora_B = nn.Parameter(self.start_A.clone()), nn.Parameter(self.start_B.clone())

    def down(self) -> Tensor:
        return torch.cat([self.lora_A, self.start_A])

    def up(self, base: nn.Module) -> Tensor:
        return torch.cat([self.lora_B, -self.start_B])

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return z
