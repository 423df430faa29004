"""Values that inference computes once and not in every forward: folded weights, gates of each task."""

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Value = TypeVar("Value")
Slots = Mapping[str, Tensor | None]
Place = tuple[Slots, str, Tensor, int, int]  # of a weight: where it stands, what it was
Child = tuple[Mapping[str, nn.Module | None], str, nn.Module]  # of a part: where it stands


class _Steps:
    """How many steps any optimiser has made: fused ones change weights without autograd's counting it."""

    made = 0

    @classmethod
    def count(cls, *_: object) -> None:
        cls.made += 1


register_optimizer_step_post_hook(_Steps.count)


def infers() -> bool:
    """Whether this forward is neither differentiated nor traced by the compiler: only then is anything kept."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Kept(Generic[Value]):
    """One value computed from weights, for as long as they are what they were.

    A weight or part that was replaced, moved or changed in place is noticed (autograd counts changes), and so is a
    step of any optimiser of torch. A layer's change of mode frees what it keeps. Only what other code wrote through
    ``weight.data`` passes unseen: it calls ``drop_kept`` afterwards.
    """

    def __init__(self) -> None:
        self._value: tuple[object, Value] | None = None
        self._places: list[Place] = []
        self._parts: list[Child] = []

    def __call__(self, name: object, modules: Iterable[nn.Module | None], make: Callable[[], Value]) -> Value:
        """The value of ``make``, anew if a weight of ``modules`` changed or the last one had another ``name``."""
        if not infers():
            self.drop()
            return make()
        name = _Steps.made, name
        if self._value is None or self._value[0] != name or not self._stands():
            modules = tuple(modules)
            places = [_place(slots, key, weight) for slots, key, weight in _weights(modules)]
            self._places = [place for place in places if place is not None]
            self._parts = list(_children(modules))
            self._value = name, make()
            if len(self._places) < len(places):  # made in inference mode: nobody counts their changes
                value, self._value = self._value[1], None
                return value
        return self._value[1]

    def _stands(self) -> bool:
        return all(map(_stands, self._places)) and all(slots.get(key) is part for slots, key, part in self._parts)

    def drop(self) -> None:
        self._value, self._places, self._parts = None, [], []

    def __deepcopy__(self, memo: object) -> "Kept[Value]":
        return Kept()

    def __reduce__(self) -> tuple[type["Kept[Value]"], tuple[()]]:
        return Kept, ()


def drop_kept(model: nn.Module) -> None:
    """Forget what inference kept: after weights were written through ``.data``, which nothing else notices."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Kept):
                value.drop()


def _weights(modules: Iterable[nn.Module | None]) -> Iterable[tuple[Slots, str, Tensor]]:
    for module in modules:
        for part in () if module is None else module.modules():
            for slots in (part._parameters, part._buffers):
                yield from ((slots, key, weight) for key, weight in slots.items() if weight is not None)


def _children(modules: Iterable[nn.Module | None]) -> Iterable[Child]:
    for module in modules:
        for part in () if module is None else module.modules():
            yield from ((part._modules, key, child) for key, child in part._modules.items() if child is not None)


def _place(slots: Slots, key: str, weight: Tensor) -> Place | None:
    return None if weight.is_inference() else (slots, key, weight, weight._version, weight.data_ptr())


def _stands(place: Place) -> bool:
    slots, key, weight, version, address = place
    return slots.get(key) is weight and weight._version == version and weight.data_ptr() == address
