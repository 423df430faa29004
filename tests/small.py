"""Small models and the small size of every method: what the contract runs over."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from polyrank import ASE, Adapter, LoRA, Method, MoORE, MoORETopK, MoRE, adapt
from polyrank.methods import (
    SAME,
    CLoRAE,
    ConditionalMixLoRA,
    DoRA,
    HydraLoRA,
    LoRAMoE,
    MALoRA,
    MELoRA,
    MiLoRA,
    MoA,
    MoDE,
    MOELoRA,
    MoLA,
    MoSLoRA,
    MTLLoRA,
    MultiLoRA,
    OMoE,
    PiSSA,
    Poly,
    RsLoRA,
    SMoRA,
    TeamLoRA,
)

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
    "rslora": RsLoRA(rank=4),
    "dora": DoRA(rank=4),
    "pissa": PiSSA(rank=4, alpha=6),
    "milora": MiLoRA(rank=4, alpha=6),
    "moslora": MoSLoRA(rank=4, alpha=8),
    "melora": MELoRA(num_experts=2, rank=2, alpha=4),
    "multilora": MultiLoRA(num_experts=3, rank=2, alpha=4),
    "mtl_lora": MTLLoRA(num_experts=3, rank=2, alpha=4, temperature=0.5),
    "mtl_lora-diagonal": MTLLoRA(num_experts=3, rank=2, alpha=4, temperature=0.5, transform="diagonal"),
    "moelora": MOELoRA(num_experts=2, rank=4, alpha=8, task_dim=5),
    "moelora-layer": MOELoRA(num_experts=2, rank=4, alpha=8, task_dim=5, gate="layer"),
    "poly": Poly(num_experts=3, rank=2),
    "poly-splits": Poly(num_experts=3, rank=2, splits=2),
    "c_lorae": CLoRAE(rank=4, task_rank=2, alpha=4),
    "hydralora": HydraLoRA(num_experts=3, rank=2, alpha=4),
    "loramoe": LoRAMoE(num_experts=3, rank=2, alpha=4),
    "loramoe-kinds": LoRAMoE(num_experts=4, rank=2, alpha=4, balance=0.1, delta=0.2, knowledge=("b",)),
    "mola": MoLA(num_experts=(3, 4), k=2, rank=2, alpha=4, balance=0.1),
    "malora": MALoRA(num_experts=4, k=2, rank=3, subspace=5, alpha=6, balance=0.1),
    "mode": MoDE(num_experts=3, rank=4),
    "mode-block": MoDE(num_experts=3, rank=4, block=2),
    "smora": SMoRA(rank=8, k=3, alpha=6, rate=0.01),
    "smora-softmax": SMoRA(rank=8, k=4, alpha=8, block=2, activation="softmax", rate=0.01),
    "smora-biased": SMoRA(rank=8, k=3, alpha=6, value="biased", rate=0.01),
    "teamlora": TeamLoRA(num_experts=3, rank=2, alpha=4, router_dim=5),
    "omoe": OMoE(num_experts=3, k=2, rank=2, alpha=4),
    "omoe-unit": OMoE(num_experts=3, k=2, rank=2, alpha=4, length="unit"),
    "conditional_mixlora": ConditionalMixLoRA(num_experts=5, rank=3, alpha=6),
    "conditional_mixlora-released": ConditionalMixLoRA(num_experts=5, rank=3, alpha=6, selection="released"),
    "moa": MoA(rank=2, alpha=4),
    "same": SAME(num_experts=3, rank=2, alpha=4),
    "same-parameters": SAME(num_experts=3, rank=2, alpha=4, mixing="parameters"),
    "same-released": SAME(num_experts=3, rank=2, alpha=4, mixing="parameters", gate="batch", damping="released"),
}
TASK, TOKEN = frozenset({"task"}), frozenset({"token"})
# What the gate of each method reads, written down by hand: the contract's rows follow from it.
READS: dict[str, frozenset[str]] = {
    **dict.fromkeys(["lora", "rslora", "dora", "pissa", "milora", "moslora", "melora", "multilora"], frozenset()),
    **dict.fromkeys(["moore-task", "moore_topk-task", "more", "more-none", "more-released"], TASK),
    **dict.fromkeys(["mtl_lora", "mtl_lora-diagonal", "moelora", "moelora-layer", "poly", "poly-splits"], TASK),
    **dict.fromkeys(["moore-token", "moore-released", "moore_topk-token", "c_lorae"], frozenset({"task", "token"})),
    **dict.fromkeys(["ase", "ase-baseline", "ase-renormalised", "ase-naive_shared"], frozenset({"task", "token"})),
    **dict.fromkeys(["moore-sample", "moore_topk-sample", "moa"], frozenset({"task", "sample"})),
    **dict.fromkeys(["hydralora", "loramoe", "loramoe-kinds", "mola", "malora", "mode", "mode-block"], TOKEN),
    **dict.fromkeys(["smora", "smora-softmax", "smora-biased", "teamlora", "omoe", "omoe-unit"], TOKEN),
    **dict.fromkeys(["same", "same-parameters"], TOKEN),
    "same-released": frozenset({"batch"}),
    **dict.fromkeys(["conditional_mixlora", "conditional_mixlora-released"], frozenset({"sample"})),
}
STATIC = {name for name, reads in READS.items() if reads <= {"task"}}  # merges
TASKLESS = {name for name, reads in READS.items() if "task" not in reads}
FULL_RANK = {"moore-task", "dora"}  # merges, but its delta is no LoRA
NOT_THE_BASE = {"omoe-unit"}  # at step 0
BY_BATCH = {name for name, reads in READS.items() if "batch" in reads}  # a sample depends on its neighbours
NOISY = (Poly,)  # in training


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
    if isinstance(method, NOISY):  # in training: the contract compares forwards
        net.eval()
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
        adapter.before_step(step / steps)
        optimizer.step()
        adapter.after_step()
