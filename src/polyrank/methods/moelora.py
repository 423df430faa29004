"""MOELoRA: When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications (SIGIR 2024).

Liu et al. https://arxiv.org/abs/2310.18339

    y = W x + b + (alpha / r) sum_{i <= N} g_i B_i A_i x,    g = softmax(G e_t),    A_i and B_i of rank r / N

The task alone decides, by an embedding. One gate serves all layers (the paper), or each layer has its own.

Choose it if the tasks are known and each has to leave as a plain model in the end.

Deviations from the released code:
- One embedding for each task of the adapter (theirs: one more than there are, and means over several ids).
- Expert weights broadcast by name, not by position (theirs assume sequence-first activations). Dropout is 0.
- A starts as nn.Linear's default, as LoRA's does (the paper is said to have N(0, 0.01^2)).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import LoRAExperts, Mixture, MixtureLinear, Router, Site, Softmax, TaskEmbedding
from .base import STRICT, Method


class SharedRouter(Router):
    """A router that several layers have in common. It counts as the first one's."""

    def __init__(self, router: Router, first: bool) -> None:
        super().__init__()
        self.router, self.first, self.reads = router, first, router.reads

    def rows(self) -> Tensor | None:
        return self.router.rows()

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        return self.router(x, z, site)

    def active_parameters(self) -> int:
        return self.router.active_parameters() if self.first else 0

    def flops_per_token(self) -> int:
        return self.router.flops_per_token()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MOELoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O) + (gate == 'layer') * task_dim * (T + num_experts)"
    SIZE_ONCE: ClassVar[str] = "(gate == 'global') * task_dim * (T + num_experts)"

    num_experts: PositiveInt = 8
    """N, a divisor of the rank"""
    rank: PositiveInt = 16
    """r, of all experts together"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / r"""
    task_dim: PositiveInt = 64
    """the length of e_t"""
    gate: Literal["global", "layer"] = "global"
    """one gate for all layers (the paper), or one for each layer"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rank % self.num_experts:
            raise ValueError(
                f"rank={self.rank} is of all experts together: num_experts={self.num_experts} must divide it"
            )
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        shared: Router | None = None
        for name, base in sites.items():
            router: Router | None = shared
            if router is None:
                router = TaskEmbedding(base, len(tasks), self.task_dim, self.num_experts, bound=self.task_dim**-0.5)
            if self.gate == "global":
                router, shared = SharedRouter(router, first=shared is None), router
            layers[name] = MixtureLinear(
                base,
                experts=LoRAExperts(base, self.num_experts, self.rank // self.num_experts),
                router=router,
                gate=Softmax(),
                scale=self.alpha / self.rank,
            )
        return layers
