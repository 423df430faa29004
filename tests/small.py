"""Small models and the small size of every method: what the contract runs over."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from polyrank import ASE, Adapter, LoRA, Method, MoORE, MoORETopK, MoRE, adapt

TASKS = ("a", "b", "c")
IDS = torch.tensor([0, 2, 1, 2])

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "moore-token": MoORE(num_reflections=4, task_dim=6, router_dim=5),
    "moore-sample": MoORE(num_reflections=4, task_dim=6, router_dim=5, router="sample"),
    "moore-task": MoORE(num_reflections=4, task_dim=6, router="task"),
    "moore-released": MoORE(num_reflections=4, task_dim=6, router_dim=5, null_directions="released"),
    "moore_topk-token": MoORETopK(k=5, num_reflections=4, task_dim=6, router_dim=5),
    "moore_topk-sample": MoORETopK(k=5, num_reflections=4, task_dim=6, router_dim=5, router="sample"),
    "moore_topk-task": MoORETopK(k=5, num_reflections=4, task_dim=6, router="task"),
    "more": MoRE(rank=6, alpha=6),
    "more-none": MoRE(rank=6, alpha=6, scaling="none", pooling="first"),
    "more-released": MoRE(rank=6, alpha=6, scaling="released", contrastive=0, start="released"),
    "ase": ASE(num_experts=6, k=2, num_shared=1, rank=2, alpha=2),
    "ase-baseline": ASE(num_experts=6, k=3, num_shared=0, rank=2, alpha=2, gate="baseline"),
    "ase-renormalised": ASE(
        num_experts=6, k=3, num_shared=0, rank=2, alpha=2, gate="renormalised", mutual_information=0
    ),
    "ase-naive_shared": ASE(num_experts=6, k=2, num_shared=2, rank=2, alpha=2, gate="naive_shared"),
}
# What each method declares to be, written down by hand: the contract's rows follow from the layers' own declaration.
STATIC = {"lora", "moore-task", "moore_topk-task", "more", "more-none", "more-released"}  # the gate ignores the input
TASKLESS = {"lora"}  # routes by no task
FULL_RANK = {"moore-task"}  # static, but its delta is no LoRA


class Net(nn.Module):
    """Wide, tall, and without a bias; optionally checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(16, 24), nn.Linear(24, 12, bias=False), nn.Linear(12, 3)
        self.checkpointed, self.use_reentrant, self.context_fn = checkpointed, False, noop_context_fn

    def body(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if not self.checkpointed:
            return self.out(self.body(x))
        how = {} if self.use_reentrant else {"context_fn": self.context_fn}
        return self.out(checkpoint(self.body, x, use_reentrant=self.use_reentrant, **how))


def adapted(
    method: Method,
    *,
    trained: bool = True,
    checkpointed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Net, Adapter]:
    """A seeded net under ``method``; ``trained`` moves every adapter weight off its start."""
    torch.manual_seed(seed)
    net = Net(checkpointed).to(dtype)
    adapter = adapt(net, method, tasks=TASKS, targets=["q", "v"])
    if trained:
        disturb(adapter)
    return net, adapter


def disturb(adapter: Adapter, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p))


def inputs(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train_steps(net: nn.Module, adapter: Adapter, steps: int, lr: float = 0.05) -> None:
    """A few SGD steps towards random targets, auxiliary losses included."""
    optimizer = torch.optim.SGD(adapter.param_groups(lr))
    dtype = next(net.parameters()).dtype
    for step in range(steps):
        x, y = inputs(4, 5, 16, seed=step, dtype=dtype), inputs(4, 5, 3, seed=100 + step, dtype=dtype)
        optimizer.zero_grad()
        loss = (net(x, task_ids=IDS) - y).square().mean()
        loss = loss + sum(adapter.losses().values(), torch.zeros((), dtype=dtype))
        loss.backward()
        optimizer.step()
        adapter.after_step()
