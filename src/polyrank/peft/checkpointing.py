"""Activation checkpointing of transformers' models, with the route captured.

A layer is computed again in the backward pass, when its forward's route is over and another may have followed. Each
checkpointed call keeps the route that it was made with.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .adapters import Adapters

NAME = "_gradient_checkpointing_func"  # where transformers keeps a module's


class Captured:
    """A module's checkpoint function, around which the route is kept."""

    def __init__(self, inner: Callable[..., Any], adapters: "Adapters") -> None:
        self.inner, self.adapters = inner, adapters

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: the re-entrant variant, whose first pass has no graph, for a method with auxiliary losses.
            RuntimeError: in the backward pass, where another adapter runs by then.
        """
        handle = self.adapters.running
        if handle is None:
            return self.inner(function, *args, **kwargs)
        settings = self.inner.keywords | kwargs if isinstance(self.inner, partial) else kwargs
        if settings.get("use_reentrant", False) and handle.hears != "nothing":
            raise ValueError(
                f"{handle.method} has auxiliary losses, which re-entrant checkpointing loses: "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        again = handle.context.replay()[1]

        def routed(*args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:  # the forward itself
                return function(*args, **kwargs)
            if self.adapters.running is not handle:
                raise RuntimeError(
                    f"the adapter {handle.name!r} ran in the forward, and another one is active in its backward pass: "
                    "switch or disable adapters after the backward pass"
                )
            with again:
                return function(*args, **kwargs)

        return self.inner(routed, *args, **kwargs)


def capture(model: nn.Module, adapters: "Adapters") -> None:
    """Put ``Captured`` around the checkpoint functions of now: transformers sets them anew at each enabling."""
    for module in model.modules():
        inner = vars(module).get(NAME)
        if inner is not None and not isinstance(inner, Captured):
            setattr(module, NAME, Captured(inner, adapters))


def release(model: nn.Module) -> None:
    for module in model.modules():
        inner = vars(module).get(NAME)
        if isinstance(inner, Captured):
            setattr(module, NAME, inner.inner)
