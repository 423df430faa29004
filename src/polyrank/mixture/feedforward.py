"""The feed-forward block as one site: for mixtures whose experts join after its nonlinearity."""

from abc import ABC

from torch import Tensor, nn

from .base import in_out_features
from .linear import Mixture


class FeedForward(nn.Module):
    """A frozen feed-forward block as its parts.

    y = outer(down(inner(act(up x))))  or, with a gate,  y = outer(down(inner(act(gate x) * up x)))

    ``inner`` and ``outer`` are dropout, or nothing.
    """

    def __init__(
        self,
        up: nn.Module,
        down: nn.Module,
        activation: nn.Module,
        gate: nn.Module | None = None,
        inner: nn.Module | None = None,
        outer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.up, self.down, self.activation, self.gate = up, down, activation, gate
        self.inner, self.outer = inner or nn.Identity(), outer or nn.Identity()

    def linears(self) -> list[nn.Module]:
        return [self.up, *([] if self.gate is None else [self.gate]), self.down]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(I, H, O): inputs, hidden units, outputs."""
        return *in_out_features(self.up), in_out_features(self.down)[1]

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """The hidden units (..., H) from what ``up`` and ``gate`` gave."""
        return self.inner(self.activation(up) if gate is None else self.activation(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.down(self.activate(self.up(x), None if self.gate is None else self.gate(x))))


class FeedForwardMixture(Mixture, ABC):
    """What stands in the place of a feed-forward block; ``base`` is a ``FeedForward``."""

    base: FeedForward

    def __init__(self, base: FeedForward) -> None:
        super().__init__(base)

    @property
    def weight(self) -> Tensor:
        return self.base.down.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.base.down._parameters["bias"]

    @property
    def in_features(self) -> int:
        return self.base.sizes[0]

    @property
    def out_features(self) -> int:
        return self.base.sizes[2]

    @property
    def stands_for_base(self) -> bool:
        return False

    def frozen(self) -> list[nn.Module]:
        return self.base.linears()

    def task_weights(self, task: int) -> list[tuple[nn.Module, Tensor]]:
        self.refuse_if_input_routed()
        raise ValueError(f"{self.site.name}: no weights of its linear layers stand for this block on a task")

    def task_weight(self, task: int) -> Tensor:
        """
        Raises:
            ValueError: always; ``task_weights`` has those of each part, where they exist.
        """
        self.refuse_if_input_routed()
        raise ValueError(f"{self.site.name}: a feed-forward block has no single weight: see task_weights()")

    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        """
        Raises:
            ValueError: always: a nonlinearity lies between the parts.
        """
        self.refuse_if_input_routed()
        raise ValueError(f"{self.site.name}: no LoRA stands for a feed-forward block: see task_loras()")

    def task_loras(self, task: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
        self.refuse_if_input_routed()
        raise ValueError(f"{self.site.name}: no LoRAs of its linear layers stand for this block on a task")

    def base_flops_per_token(self) -> int:
        return sum(2 * i * o for i, o in map(in_out_features, self.base.linears()))
