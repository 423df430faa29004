"""Values that inference computes once and not in every forward: folded weights, gates of each task."""

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")
Slots = Mapping[str, Tensor | None]
Place = tuple[Slots, str, Tensor, int, int]  # of a weight: where it stands, what it was


def infers() -> bool:
    """Whether this forward is neither differentiated nor traced by the compiler: only then is anything kept."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Kept(Generic[Value]):
    """One value computed from weights, for as long as they are what they were.

    A weight that was replaced, moved or changed in place is noticed (autograd counts changes), and a forward with
    gradients frees the value. What is written through ``weight.data``, or by a fused optimiser, passes unseen: such
    code calls ``drop_kept`` afterwards (``adapter.after_step`` does).
    """

    def __init__(self) -> None:
        self._value: tuple[object, Value] | None = None
        self._places: list[Place] = []

    def __call__(self, name: object, modules: Iterable[nn.Module | None], make: Callable[[], Value]) -> Value:
        """The value of ``make``, anew if a weight of ``modules`` changed or the last one had another ``name``."""
        if not infers():
            self.drop()
            return make()
        if self._value is None or self._value[0] != name or not all(map(_stands, self._places)):
            places = [_place(slots, key, weight) for slots, key, weight in _weights(modules)]
            self._places = [place for place in places if place is not None]
            self._value = name, make()
            if len(self._places) < len(places):  # made in inference mode: nobody counts their changes
                value, self._value = self._value[1], None
                return value
        return self._value[1]

    def drop(self) -> None:
        self._value, self._places = None, []

    def __deepcopy__(self, memo: object) -> "Kept[Value]":
        return Kept()

    def __reduce__(self) -> tuple[type["Kept[Value]"], tuple[()]]:
        return Kept, ()


def drop_kept(model: nn.Module) -> None:
    """Forget what inference kept: after weights were written in a way that autograd does not count."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Kept):
                value.drop()


def _weights(modules: Iterable[nn.Module | None]) -> Iterable[tuple[Slots, str, Tensor]]:
    for module in modules:
        for part in () if module is None else module.modules():
            for slots in (part._parameters, part._buffers):
                yield from ((slots, key, weight) for key, weight in slots.items() if weight is not None)


def _place(slots: Slots, key: str, weight: Tensor) -> Place | None:
    return None if weight.is_inference() else (slots, key, weight, weight._version, weight.data_ptr())


def _stands(place: Place) -> bool:
    slots, key, weight, version, address = place
    return slots.get(key) is weight and weight._version == version and weight.data_ptr() == address
