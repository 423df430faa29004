"""Small models and the small size of every method: what the contract runs over."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from polyrank import ASE, Adapter, LoRA, Method, MoORE, MoORETopK, MoRE, adapt
from polyrank.methods import (
    EMTAL,
    SAME,
    AdaLoRA,
    CLoRAE,
    ConditionalMixLoRA,
    DoRA,
    Dropout,
    Faded,
    FGMoE,
    HydraLoRA,
    LoRAMoE,
    MALoRA,
    MELoRA,
    MiLoRA,
    MixLoRA,
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
    SMoLA,
    SMoRA,
    TaskLoRA,
    TeamLoRA,
    VBLoRA,
    XLoRA,
)
from polyrank.mixture import LowRankMixture, TaskExperts

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
    "vb_lora": VBLoRA(rank=3, num_vectors=7, vector_length=2, bank_bound=0.3, logits_std=0.5),
    "adalora": AdaLoRA(init_rank=4, target_rank=2, alpha=40, begin=0.2, end=0.6, orthogonality=0.5),
    "task_lora": TaskLoRA(rank=2, alpha=4),
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
    "mixlora": MixLoRA(num_experts=4, k=2, rank=2, alpha=4, balance=0.1, z_loss=0.01, std=0.5),
    "mixlora-top_p": MixLoRA(num_experts=3, rank=2, alpha=4, routing="top_p", p=0.6, std=0.5),
    "mixlora-switch": MixLoRA(num_experts=3, rank=2, alpha=4, routing="switch", balance=0, std=0.5),
    "emtal": EMTAL(num_experts=4, rank=2, alpha=4, temperature=2, fade=(0.5, 1)),
    "emtal-released": EMTAL(num_experts=4, rank=2, alpha=4, fade=(0.5, 1), start="released"),
    "fgmoe": FGMoE(num_experts=8, k=2, num_shared=1, rank=2, alpha=4),
    "faded": Faded(of={"name": "hydralora", "num_experts": 3, "rank": 2, "alpha": 4}, fade=(0.5, 1)),
    "dropout": Dropout(of={"name": "hydralora", "num_experts": 3, "rank": 2, "alpha": 4}, p=0.3),
    "dropout-input": Dropout(of={"name": "mtl_lora", "num_experts": 3, "rank": 2, "alpha": 4}, p=0.3, at="input"),
    "smola": SMoLA(num_experts=3, slots=2, rank=2, alpha=4),
    "xlora": XLoRA(rank=2, alpha=4, temperature=0.5),
    "xlora-top": XLoRA(rank=2, alpha=4, k=2, hidden=5),
    "same": SAME(num_experts=3, rank=2, alpha=4),
    "same-parameters": SAME(num_experts=3, rank=2, alpha=4, mixing="parameters"),
    "same-released": SAME(num_experts=3, rank=2, alpha=4, mixing="parameters", gate="batch", damping="released"),
}
BLOCKS = {name for name, method in METHODS.items() if method.ADAPTS == "feed-forward blocks"}
TASK, TOKEN = frozenset({"task"}), frozenset({"token"})
# What the gate of each method reads, written down by hand: the contract's rows follow from it.
READS: dict[str, frozenset[str]] = {
    **dict.fromkeys(["lora", "rslora", "dora", "pissa", "milora", "moslora", "melora", "multilora"], frozenset()),
    **dict.fromkeys(["vb_lora", "adalora"], frozenset()),
    **dict.fromkeys(["moore-task", "moore_topk-task", "more", "more-none", "more-released"], TASK),
    **dict.fromkeys(["mtl_lora", "mtl_lora-diagonal", "moelora", "moelora-layer", "poly", "poly-splits"], TASK),
    **dict.fromkeys(["task_lora", "dropout-input"], TASK),
    **dict.fromkeys(["moore-token", "moore-released", "moore_topk-token", "c_lorae"], frozenset({"task", "token"})),
    **dict.fromkeys(["ase", "ase-baseline", "ase-renormalised", "ase-naive_shared"], frozenset({"task", "token"})),
    **dict.fromkeys(["moore-sample", "moore_topk-sample", "moa"], frozenset({"task", "sample"})),
    **dict.fromkeys(["hydralora", "loramoe", "loramoe-kinds", "mola", "malora", "mode", "mode-block"], TOKEN),
    **dict.fromkeys(["smora", "smora-softmax", "smora-biased", "teamlora", "omoe", "omoe-unit"], TOKEN),
    **dict.fromkeys(
        ["mixlora", "mixlora-top_p", "mixlora-switch", "emtal", "emtal-released", "faded", "dropout"], TOKEN
    ),
    "dropout": TOKEN,
    "dropout-input": TASK,
    "fgmoe": frozenset({"task", "token"}),
    **dict.fromkeys(["xlora", "xlora-top"], TOKEN),
    **dict.fromkeys(["same", "same-parameters"], TOKEN),
    "same-released": frozenset({"batch"}),
    **dict.fromkeys(["conditional_mixlora", "conditional_mixlora-released"], frozenset({"sample"})),
    "smola": frozenset({"sample", "token"}),
}
STATIC = {name for name, reads in READS.items() if reads <= {"task"}}  # merges
TASKLESS = {name for name, reads in READS.items() if "task" not in reads}
FULL_RANK = {"moore-task", "dora"}  # merges, but its delta is no LoRA
NOT_THE_BASE = {"omoe-unit", "vb_lora", "mixlora-top_p", "mixlora-switch", "emtal-released"}  # at step 0
BY_BATCH = {name for name, reads in READS.items() if "batch" in reads}  # a sample depends on its neighbours
NOISY = (Poly, Dropout)  # in training
TWO_FORWARDS = {"xlora", "xlora-top"}  # the base model runs once more, before: their layers do nothing alone
BANKED = {"xlora", "xlora-top"}  # of LoRAs that are given and frozen: with none they are the base, and learn nothing


class Net(nn.Module):
    """Wide, tall, and without a bias; optionally checkpointed."""

    targets, site, width = ("q", "v"), "q", 16  # `site`: a layer of the method's own, with `width` inputs
    shapes: tuple[dict[str, int], ...] = (dict(I=16, O=24, K=16), dict(I=24, O=12, K=12))

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


class GLU(nn.Module):
    """A feed-forward block; with a gate, or without one and with other names."""

    def __init__(self, in_features: int, hidden: int, out_features: int, gated: bool = True) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(in_features, hidden), nn.GELU()
        self.gate = nn.Linear(in_features, hidden, bias=False) if gated else None
        self.down = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x))


class BlockNet(Net):
    """With a feed-forward block in the second place."""

    targets, site, width = ("q", "v.gate", "v.up", "v.down"), "v", 24
    shapes = (dict(I=16, O=24, K=16), dict(I=24, H=40, O=12, G=1))

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__(checkpointed)
        self.v = GLU(24, 40, 12)  # type: ignore[assignment]


def base(method: Method, *, checkpointed: bool = False, dtype: torch.dtype = torch.float32, seed: int = 1) -> Net:
    """The seeded net that a method is tried on."""
    torch.manual_seed(seed)
    return (BlockNet if method.ADAPTS == "feed-forward blocks" else Net)(checkpointed).to(dtype)


def adapted(
    method: Method,
    *,
    trained: bool = True,
    checkpointed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Net, Adapter]:
    """A seeded net under ``method``; ``trained`` moves every adapter weight off its start."""
    net = base(method, checkpointed=checkpointed, dtype=dtype, seed=seed)
    adapter = adapt(net, method, tasks=TASKS, targets=net.targets)
    if trained:
        fill_bank(adapter)
        disturb(adapter)
    if isinstance(method, NOISY):  # in training: the contract compares forwards
        net.eval()
    return net, adapter


@torch.no_grad()
def fill_bank(adapter: Adapter) -> None:
    """LoRAs for a method that is given them; nothing for the others."""
    generator = torch.Generator().manual_seed(6)
    for layer in adapter.layers.values():
        if isinstance(layer, LowRankMixture) and isinstance(layer.experts, TaskExperts):
            for p in layer.experts.parameters():
                if not p.requires_grad:
                    p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p))


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
        adapter.before_step((step + 1) / steps)
        optimizer.step()
        adapter.after_step()
