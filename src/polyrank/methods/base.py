"""A method is a frozen dataclass of its paper's hyper-parameters, the configuration, and how it builds its layers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from pydantic import ConfigDict
from torch import Tensor, nn

from ..mixture import Mixture
from ..mixture.context import Note

STRICT = ConfigDict(extra="forbid")  # an unknown hyper-parameter is an error, not a default


class Method(ABC):
    """What every method provides. Concrete methods are frozen, validated dataclasses whose ``repr`` is their recipe."""

    @abstractmethod
    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        """One layer for each site (name -> frozen linear layer). Nothing in the model is changed yet."""

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        """Auxiliary losses, weighted, by name, from what the layers noted in one forward."""
        return {}

    def param_groups(self, layers: Mapping[str, Mixture], lr: float, weight_decay: float) -> list[dict[str, object]]:
        """Parameter groups for an optimiser."""
        parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
        return [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]

    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        """Called after each step of the optimiser."""
        return
