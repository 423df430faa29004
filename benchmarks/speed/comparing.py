"""What a section of the suite finds, and how candidates are built."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyrank import Adapter, Method, adapt
from polyrank.measure import Candidate, Ratio, Timing, compare
from polyrank.methods.singular import SingularLinear
from polyrank.mixture import (
    Experts,
    Gate,
    JointTopK,
    LinearRouter,
    LoRAExperts,
    MixtureLinear,
    Reflections,
    RouteContext,
    Site,
    Softmax,
    Sum,
    TaskEmbedding,
    TokenRouter,
)
from polyrank.svd import Factors

from .peers import One, randomised

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """Candidates of one section that ran beside each other, under conditions that have a name."""

    section: str
    case: str
    timings: dict[str, Timing]

    def ratio(self, mine: str, other: str) -> Ratio:
        return self.timings[mine].over(self.timings[other])


@dataclass(frozen=True)
class Count:
    """Numbers that do not depend on time: bytes, errors."""

    section: str
    case: str
    numbers: dict[str, float]
    unit: str = ""


@dataclass
class Findings:
    comparisons: list[Comparison] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def with_older(self, data: dict[str, Any]) -> "Findings":
        """These, and those of an earlier run (``asdict`` of its findings) that this one has not made again."""
        mine = {(one.section, one.case) for one in (*self.comparisons, *self.counts)}
        timed = [
            Comparison(one["section"], one["case"], {k: Timing(tuple(t["seconds"])) for k, t in one["timings"].items()})
            for one in data["comparisons"]
        ]
        counted = [Count(**one) for one in data["counts"]]
        return Findings(
            [*(one for one in timed if (one.section, one.case) not in mine), *self.comparisons],
            [*(one for one in counted if (one.section, one.case) not in mine), *self.counts],
        )

    def add(self, section: str, case: str, candidates: dict[str, Candidate], *, rounds: int, enough: float) -> None:
        self.comparisons.append(Comparison(section, case, compare(candidates, rounds=rounds, enough=enough)))
        print(f"  {section}: {case}", flush=True)

    def count(self, section: str, case: str, numbers: dict[str, float], unit: str = "") -> None:
        self.counts.append(Count(section, case, numbers, unit))
        print(f"  {section}: {case}", flush=True)

    def ratio(self, section: str, case: str, mine: str, other: str) -> Ratio | None:
        found = [one for one in self.comparisons if (one.section, one.case) == (section, case)]
        return found[0].ratio(mine, other) if found else None

    def number(self, section: str, case: str, name: str) -> float | None:
        found = [one for one in self.counts if (one.section, one.case) == (section, case)]
        return found[0].numbers[name] if found else None


def training(layer: nn.Module, x: Tensor, *more: Tensor) -> Candidate:
    """Forward and backward of one layer, x with a gradient, and gradients that are freed each time."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    dy = torch.randn_like(layer(x, *more).detach())

    def run() -> None:
        layer(x, *more).backward(dy)
        x.grad = None
        for p in trained:
            p.grad = None

    return run


def inference(layer: nn.Module, x: Tensor, *more: Tensor) -> Candidate:
    layer.eval()

    @torch.no_grad()
    def run() -> None:
        layer(x, *more)

    return run


class Alone(nn.Module):
    """An adapted layer with its tasks given, to be called like any other."""

    def __init__(self, layer: nn.Module, adapter: Adapter, ids: Tensor) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self._on = adapter.on(ids)
        self._on.__enter__()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def ours(method: Method, base: nn.Linear, ids: Tensor, num_tasks: int = 8) -> nn.Module:
    net = One(base)
    adapter = adapt(net, method, tasks=[f"t{i}" for i in range(num_tasks)], targets=["layer"])
    return Alone(randomised(net.layer), adapter, ids)


def mixture(base: nn.Linear, num_experts: int, rank: int, k: int | None = None) -> nn.Module:
    """E experts of rank r behind a router that is linear in the token; dense, or the renormalised top-k."""
    gate: Gate = Softmax() if k is None else JointTopK(k)
    experts: Experts = LoRAExperts(base, num_experts, rank)
    return randomised(MixtureLinear(base, experts=experts, router=LinearRouter(base, num_experts), gate=gate))


def singular(base: nn.Linear, ids: Tensor, router_dim: int = 16, num_tasks: int = 8) -> nn.Module:
    """MoORE's layer on random factors: the same shapes and operations, without an SVD of each size."""
    k, dtype = min(base.in_features, base.out_features), torch.float32
    factors = Factors(torch.randn(base.out_features, k), torch.rand(k), torch.randn(k, base.in_features))
    turn = Reflections(base.in_features, 8, base.weight.device, dtype)
    router = Sum(TaskEmbedding(base, num_tasks, 64, k), TokenRouter(base, router_dim, k))
    layer = SingularLinear(base, factors, turn, router)
    context = RouteContext([f"t{i}" for i in range(num_tasks)])
    layer.site = Site("layer", "input", context)
    layer._on = context.on(ids)  # held: it ends with its object
    layer._on.__enter__()
    return layer


def samples(tokens: int, width: int, dtype: torch.dtype, batch: int = 8) -> Tensor:
    return torch.randn(batch, tokens // batch, width, dtype=dtype, requires_grad=True)
