"""What Polyrank is measured against: PEFT's own layers, and the papers' layers as their released code runs them.

Written from the equations and from what the released code does step by step; none of it is that code. All have the
same frozen base, start with random B (not zero), and no dropout.
"""

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from torch.nn import functional as F


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def frozen_linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False)


def randomised(module: nn.Module) -> nn.Module:
    """No B of zeros, where PEFT's and ours start."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.normal_(std=0.02)
    return module


def peft_lora(base: nn.Linear, rank: int, tasks: Sequence[str] = ("default",), *, cast: bool = False) -> nn.Module:
    """PEFT's LoRA layer. ``cast``: PEFT's default, adapters in fp32 beside a bf16 base; else its best, the base's."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], lora_dropout=0.0)
    model = get_peft_model(One(base), config, adapter_name=tasks[0], autocast_adapter_dtype=cast)
    for task in tasks[1:]:
        model.add_adapter(task, config)
        if not cast:
            model.to(base.weight.dtype)
    if len(tasks) > 1:
        model.base_model.set_adapter(list(tasks))
        model.base_model.set_adapter(tasks[0])
    layer = model.base_model.model.layer
    for p in layer.parameters():
        p.requires_grad_(True)
    base.requires_grad_(False)
    return randomised(layer)


class Arrow(nn.Module):
    """PEFT's Arrow layer over its LoRA layer with several experts."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int, k: int) -> None:
        super().__init__()
        names = [f"task_{i}" for i in range(num_experts)]
        self.inner = peft_lora(base, rank, names)
        config = ArrowConfig(top_k=k)
        config.task_adapter_names, config.gks_adapter_names = names, []
        self.arrow = ArrowLoraLinearLayer(base.in_features, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.arrow.build_prototypes(self.inner.lora_A, self.inner.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner.base_layer(x)
        return y + self.arrow(x, self.inner.lora_A, self.inner.lora_B, nn.Identity(), self.inner.scaling).to(y.dtype)


class Expert(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x))


class LoopMixture(nn.Module):
    """One expert after the other on all tokens, each output weighed on the wide side: LoRAMoE's and MoLA's way."""

    def __init__(self, base: nn.Linear, num_experts: int, rank: int, k: int | None = None) -> None:
        super().__init__()
        self.base, self.k = base, k
        self.router = nn.Linear(base.in_features, num_experts, bias=False, dtype=base.weight.dtype)
        self.experts = nn.ModuleList(Expert(base, rank) for _ in range(num_experts))
        randomised(self)

    def weights(self, x: Tensor) -> Tensor:
        logits = self.router(x).float()
        if self.k is None:
            return F.softmax(logits, -1)
        best = logits.topk(self.k, -1)
        return torch.zeros_like(logits).scatter(-1, best.indices, F.softmax(best.values, -1))

    def forward(self, x: Tensor) -> Tensor:
        y, g = self.base(x), self.weights(x).to(x.dtype)
        for i, expert in enumerate(self.experts):
            y = y + expert(x) * g[..., i : i + 1]
        return y


class IndexMixture(LoopMixture):
    """One expert after the other on the tokens that chose it, added back by index: MixLoRA's way."""

    def forward(self, x: Tensor) -> Tensor:
        y, g = self.base(x), self.weights(x).to(x.dtype)
        flat, out, g = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), g.reshape(-1, g.shape[-1])
        for i, expert in enumerate(self.experts):
            (rows,) = (g[:, i] > 0).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * g[rows, i : i + 1])
        return out.view_as(y)


class LoopTasks(nn.Module):
    """A mixed batch as one call of PEFT's single-adapter layer for each task."""

    def __init__(self, layer: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.layer, self.tasks = layer, tasks

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for task, rows in zip(self.tasks, x.chunk(len(self.tasks)), strict=True):
            self.layer._active_adapter = [task]  # set_adapter also walks all parameters: not charged
            parts.append(self.layer(rows))
        return torch.cat(parts)


class LoopRanks(nn.Module):
    """MoRE: the samples of each rank by themselves, with the first rows of A and B."""

    def __init__(self, base: nn.Linear, ranks: Sequence[int]) -> None:
        super().__init__()
        self.base, self.ranks = base, ranks
        self.lora_A = nn.Parameter(torch.randn(max(ranks), base.in_features, dtype=base.weight.dtype))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, max(ranks), dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.base(rows) + F.linear(F.linear(rows, self.lora_A[:rank]), self.lora_B[:, :rank]) * (1 / rank)
            for rank, rows in zip(self.ranks, x.chunk(len(self.ranks)), strict=True)
        ]
        return torch.cat(parts)


class ReleasedMoORE(nn.Module):
    """MoORE as its released code runs it: reflections one after the other in fp32, each saving an activation."""

    def __init__(
        self, base: nn.Linear, num_tasks: int, *, num_reflections: int = 8, router_dim: int = 128, task_dim: int = 64
    ) -> None:
        super().__init__()
        inputs, outputs, dtype = base.in_features, base.out_features, base.weight.dtype
        k = min(inputs, outputs)
        for name, shape in (("u", (outputs, k)), ("v", (inputs, k)), ("sigma", (k,))):
            self.register_buffer(name, torch.randn(shape).mul_(inputs**-0.5).to(dtype))
        half = torch.empty(inputs, num_reflections // 2).uniform_(-0.5, 0.5)
        self.reflections = nn.ParameterList(nn.Parameter(half[:, [i // 2]]) for i in range(num_reflections))
        self.embedding = nn.Embedding(num_tasks, task_dim, dtype=dtype)
        self.task_linear = nn.Linear(task_dim, k, bias=False, dtype=dtype)
        self.gate = nn.Linear(inputs, router_dim, bias=False, dtype=dtype)
        self.gate_up = nn.Linear(router_dim, k, bias=False, dtype=dtype)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        offset = self.task_linear(self.embedding(ids))[:, None] + self.gate_up(self.gate(x))
        h = x.float()
        for u in self.reflections:
            unit = u / u.norm()
            h = h - 2 * (h @ unit) @ unit.t()
        weights = F.relu(self.sigma + offset)
        return ((h.to(x.dtype) @ self.v) * weights) @ self.u.t()
