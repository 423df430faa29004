"""A method that goes around another one: it changes the other's layers, and passes on all else that the other does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..mixture import Mixture, Note
from .base import STRICT, Hears, Method

FILLED = STRICT | {"validate_default": True}  # so that `of` has every field filled in


@dataclass(frozen=True, kw_only=True, config=FILLED)
class AroundMethod(Method, ABC):
    of: dict[str, Any] | str  # declared again, with its default and string, where a method inherits

    def __hash__(self) -> int:  # a dataclass that inherits this one has to name it, or gets one of its own
        return hash(repr(self))  # `of` is a dict

    @classmethod
    @abstractmethod
    def refusal(cls, name: str, kind: type[Method]) -> str | None:
        """Why it cannot go around a method, and what to do instead; None if it can."""

    @field_validator("of", mode="before")
    @classmethod
    def _of(cls, given: object) -> object:
        """With every field filled in."""
        from . import METHODS  # all methods are known only by then

        fields = {"name": given} if isinstance(given, str) else given
        if not isinstance(fields, dict) or fields.get("name") not in METHODS:
            raise ValueError(f"of={given!r} names no method of polyrank: `polyrank methods` lists them")
        kind = METHODS[fields["name"]]
        if (refusal := cls.refusal(fields["name"], kind)) is not None:
            raise ValueError(f"of={fields['name']!r} {refusal}")
        return described(kind(**{key: value for key, value in fields.items() if key != "name"}))

    @property
    def method(self) -> Method:
        from . import METHODS

        assert isinstance(self.of, dict)
        return METHODS[self.of["name"]](**{key: value for key, value in self.of.items() if key != "name"})

    @property
    def SIZE(self) -> str:  # type: ignore[override]
        return self.method.SIZE

    @property
    def SIZE_ONCE(self) -> str:  # type: ignore[override]
        return self.method.SIZE_ONCE

    @property
    def starts_as_base(self) -> bool:
        return self.method.starts_as_base

    @property
    def settles(self) -> float:
        return self.method.settles

    def attach(self, model: nn.Module, layers: Mapping[str, Mixture]) -> Sequence[RemovableHandle]:
        return self.method.attach(model, layers)

    def bank(self) -> Method | None:
        return self.method.bank()

    @property
    def hears(self) -> Hears:
        return self.method.hears

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        return self.method.losses(notes)

    def param_groups(self, layers: Mapping[str, Mixture], lr: float, weight_decay: float) -> list[dict[str, object]]:
        return self.method.param_groups(layers, lr, weight_decay)

    def before_step(self, layers: Mapping[str, Mixture], done: float) -> None:
        self.method.before_step(layers, done)

    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        self.method.after_step(layers)

    def after_task(self, layers: Mapping[str, Mixture]) -> None:
        self.method.after_task(layers)


def described(method: Method) -> dict[str, Any]:
    """The name and all fields of a method of ours."""
    from . import METHODS

    name = next(name for name, kind in METHODS.items() if kind is type(method))
    return {"name": name, **asdict(method)}  # type: ignore[call-overload]
