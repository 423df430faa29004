"""Where the weights of an adapter lie in a PEFT model.

PEFT finds, saves, moves, freezes and deletes weights by name: ``<layer>.<container>.<adapter>``, one container for each
weight. So a layer's weights are held in containers, and the mixture that computes is no submodule: before it runs, its
slots are given what the containers hold. Then it makes no difference who replaced a weight: PEFT, a loader that
assigns, FSDP2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from polyrank.mixture import Mixture
from polyrank.saving import SLACK, projection

from .register import PREFIX

if TYPE_CHECKING:
    from .adapters import Adapters


class Frozen(nn.Module):
    """Buffers of one name by adapter. Not PEFT's own dictionary of them, which is cast to fp32."""

    def put(self, adapter: str, value: Tensor, persistent: bool) -> None:
        self.register_buffer(adapter, value, persistent=persistent)

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._buffers

    def __delitem__(self, adapter: str) -> None:
        delattr(self, adapter)


Container = nn.ParameterDict | Frozen


@dataclass(frozen=True)
class Slot:
    """Where a mixture expects a weight, and the container that holds it."""

    owner: nn.Module
    key: str
    container: Container

    def fill(self, adapter: str) -> None:
        if isinstance(self.container, Frozen):
            slots, held = self.owner._buffers, self.container._buffers[adapter]
        else:
            slots, held = self.owner._parameters, self.container._parameters[adapter]
        if slots[self.key] is not held:
            slots[self.key] = held  # type: ignore[assignment]


class PolyrankLayer(nn.Module, BaseTunerLayer):
    """What stands in the place of an adapted layer: the frozen layer, and the mixtures of all adapters there."""

    def __init__(self, base_layer: nn.Module, adapters: "Adapters") -> None:
        super().__init__()
        self.base_layer, self.adapters = base_layer, adapters
        self.adapter_layer_names: tuple[str, ...] = ()  # containers of trained weights
        self.other_param_names: tuple[str, ...] = ()  # and of weights that no gradient trains
        self.merged_adapters: list[str] = []
        self._active_adapter, self._disable_adapters = [], False
        self._mixtures: dict[str, Mixture] = {}
        self._slots: dict[str, list[Slot]] = {}
        self._projected: dict[str, list[tuple[str, Frozen, Frozen]]] = {}  # frozen parts and their projections
        self._agree: dict[str, dict[int, tuple[Tensor, int]]] = {}  # the projections that were found to agree
        self._before_merge: list[tuple[nn.Module, nn.Parameter]] = []
        self.register_load_state_dict_post_hook(_check_after_loading)

    # Weights.

    def put(self, adapter: str, mixture: Mixture, homes: dict[Tensor, Container], whole: bool) -> None:
        """Take in the mixture of one more adapter.

        Args:
            homes: where weights are held that layers share; those that are new in this layer are added.
            whole: whether the files hold the frozen parts, or a projection of them.
        """
        self._mixtures[adapter], self._slots[adapter] = mixture, []
        self._projected[adapter], self._agree[adapter] = [], {}
        for name, owner, key, weight in _own(mixture):
            if weight not in homes:
                homes[weight] = self._hold(adapter, name, weight, whole)
            self._slots[adapter].append(Slot(owner, key, homes[weight]))
        mixture.train(self.training)

    def _hold(self, adapter: str, name: str, weight: Tensor, whole: bool) -> Container:
        name = name.replace(".", "__")  # PEFT's older versions know no deeper names
        weight.data = weight.data.contiguous()  # nor do their files hold others
        if not isinstance(weight, nn.Parameter):
            frozen = self._frozen(f"frozen__{name}")
            frozen.put(adapter, weight, whole)
            if not whole:
                short = projection(weight)
                projected = self._frozen(f"projection__{name}")
                projected.put(adapter, short.clone(), True)
                self._projected[adapter].append((name, frozen, projected))
            return frozen
        attribute = f"{PREFIX}{name}" if weight.requires_grad else f"{PREFIX}fixed__{name}"
        if attribute not in self._modules:
            self.register_module(attribute, nn.ParameterDict())
            if weight.requires_grad:
                self.adapter_layer_names = (*self.adapter_layer_names, attribute)
            else:
                self.other_param_names = (*self.other_param_names, attribute)
        container = self._modules[attribute]
        assert isinstance(container, nn.ParameterDict)
        container[adapter] = weight
        return container

    def _frozen(self, name: str) -> Frozen:
        if PREFIX + name not in self._modules:
            self.register_module(PREFIX + name, Frozen())
        frozen = self._modules[PREFIX + name]
        assert isinstance(frozen, Frozen)
        return frozen

    def mixture(self, adapter: str) -> Mixture:
        """The mixture of one adapter, its weights as they are now.

        Raises:
            ValueError: its frozen parts are others than those that its files were saved with.
        """
        for slot in self._slots[adapter]:
            slot.fill(adapter)
        if not torch.compiler.is_compiling():
            self.check(adapter)
        return self._mixtures[adapter]

    def has(self, adapter: str) -> bool:
        return adapter in self._mixtures

    def check(self, adapter: str) -> None:
        """
        Raises:
            ValueError: the adapter's frozen parts have another projection than the one that stands beside them.
        """
        for i, (name, frozen, projected) in enumerate(self._projected[adapter]):
            saved = projected.get_buffer(adapter)
            version = 0 if saved.is_inference() else saved._version
            known, known_version = self._agree[adapter].get(i, (None, 0))
            if known is saved and known_version == version:
                continue
            here, there = projection(frozen.get_buffer(adapter)), saved.float()
            if here.shape != there.shape or float((here - there).abs().max()) > SLACK * float(there.abs().max()):
                raise ValueError(
                    f"{self._mixtures[adapter].site.name}: the adapter {adapter!r} was trained with another {name} "
                    "than this base gives here: load the base that it was trained on; if it is that one, near-equal "
                    "singular values came out in another order: train with PolyrankConfig(with_factors=True), which "
                    "saves those parts"
                )
            self._agree[adapter][i] = saved, version

    # What PEFT asks of a layer.

    @property
    def running(self) -> str | None:
        """The adapter that runs here; None where adapters are disabled or merged."""
        return None if self.disable_adapters or self.merged else self.current

    @property
    def current(self) -> str | None:
        """The active adapter, disabled or not."""
        return next(iter(self.active_adapters), None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self.running
        if adapter is None or adapter not in self._mixtures:
            return self.base_layer(x, *args, **kwargs)
        return self.mixture(adapter)(x, *args, **kwargs)

    def train(self, mode: bool = True) -> "PolyrankLayer":
        for mixture in self._mixtures.values():
            mixture.train(mode)
        return super().train(mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        Raises:
            ValueError: several adapters at once.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"adapters {names}: one POLYRANK adapter is active at a time, because their mixtures do not add up; "
                "let one adapter have all tasks, or set_adapter one of them"
            )
        super().set_adapter(names, inference_mode)
        self.adapters.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.adapters.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        for name, container in list(self._modules.items()):
            if isinstance(container, Frozen) and name.startswith(PREFIX) and adapter_name in container:
                del container[adapter_name]
        for kept in (self._mixtures, self._slots, self._projected, self._agree):
            kept.pop(adapter_name, None)
        self.adapters.forget(adapter_name)
        super().delete_adapter(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self._mixtures)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._mixtures)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: the weights stay fp32 masters beside a base in 16 bits."""
        target = device or next(self.base_layer.parameters()).device
        for name, container in self._modules.items():
            if name == "base_layer":
                continue
            if isinstance(container, nn.ParameterDict) and adapter_name in container:
                p = container[adapter_name]
                if p.device != target:
                    container[adapter_name] = nn.Parameter(p.data.to(target), requires_grad=p.requires_grad)
            elif isinstance(container, Frozen) and adapter_name in container:
                container._buffers[adapter_name] = container.get_buffer(adapter_name).to(target)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Raises:
            ValueError: always: layers are merged all or none.
        """
        raise ValueError("a POLYRANK adapter is merged as a whole: model.merge_adapter(), or model.merge_and_unload()")

    def remember(self, adapter: str) -> None:
        """Called before the frozen weights take the adapter in: ``unmerge`` puts back those of now."""
        frozen = self._mixtures[adapter].frozen()
        self._before_merge = [(linear, linear.get_parameter("weight")) for linear in frozen]

    def unmerge(self) -> None:
        for linear, weight in self._before_merge:
            linear.register_parameter("weight", weight)
        self._before_merge, self.merged_adapters = [], []

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at their layers', for its dtype."""
        return next(iter(self._mixtures.values())).weight if self._mixtures else self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base_layer._parameters["bias"]

    def __repr__(self) -> str:
        return f"polyrank.{super().__repr__()}"


def _own(mixture: Mixture) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, owner, key and value of each slot of a mixture for a weight or buffer; the base's are left out."""
    of_base = set(mixture.base.modules())
    for name, owner in mixture.named_modules():
        if owner in of_base:
            continue
        both: list[Mapping[str, Tensor | None]] = [owner._parameters, owner._buffers]
        for slots in both:
            for key, weight in slots.items():
                if weight is not None:
                    yield f"{name}.{key}" if name else key, owner, key, weight


def _check_after_loading(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, PolyrankLayer)
    for adapter in layer._mixtures:
        layer.check(adapter)
