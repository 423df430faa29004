"""The POLYRANK adapters of one model: which one runs, and the task of the forward under way.

Hooks on the base model take ``task_id`` out of its keywords, so that ``PeftModel``, ``inject_adapter_in_model`` and
transformers' ``model.add_adapter`` are served alike. (PEFT's models swallow ``task_ids``.)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from polyrank.files import Fingerprint, fingerprint
from polyrank.joining import put_experts, saved_loras, task_parts
from polyrank.methods import Method
from polyrank.methods.base import Hears
from polyrank.mixture import Mixture, RouteContext, global_notes
from polyrank.places import Places
from polyrank.saving import copy_weights, named_weights

from .checkpointing import capture, release
from .layer import PolyrankLayer

NO_TASK = (
    "the adapter {name!r} ({method}) routes by task and none was given: call the model with task_id=<LongTensor "
    "(B,), a name, or a list of names> (not task_ids, which PEFT's models swallow), or wrap the call in "
    "`with polyrank.peft.on(model, 'task'):`, which also serves generate() of a model that is no PeftModel"
)


class Handle:
    """One POLYRANK adapter of a model: its tasks, its layers, and the moments of its method."""

    def __init__(
        self,
        name: str,
        method: Method,
        context: RouteContext,
        places: Mapping[str, PolyrankLayer],
        base: Fingerprint,
    ) -> None:
        self.name, self.method, self.context, self._places = name, method, context, dict(places)
        self.base_fingerprint = base
        self._routes_by_task: bool | None = None
        self.hooks: list[RemovableHandle] = []  # the method's own on the model, while the adapter runs

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.context.tasks

    @property
    def layers(self) -> dict[str, Mixture]:
        """The adapter's layers by name, with the weights of now."""
        return {name: layer.mixture(self.name) for name, layer in self._places.items()}

    @property
    def routes_by_task(self) -> bool:
        """Whether a forward needs a task. A router that faded is asked again; what never asked does not begin to."""
        if self._routes_by_task is not False:
            self._routes_by_task = any("task" in layer.reads for layer in self.layers.values())
        return self._routes_by_task

    def task_ids(self, tasks: str | Sequence[str] | Tensor) -> Tensor:
        """Ids (B,) of task names; a tensor is given back.

        Raises:
            TypeError: neither names nor a tensor.
            ValueError: an unknown task.
        """
        if isinstance(tasks, Tensor):
            return tasks
        names = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"task_id must be a LongTensor (B,), a task's name or a list of names, got {tasks!r:.60}")
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; the adapter's tasks are: {', '.join(self.tasks)}")
        return torch.tensor([self.tasks.index(name) for name in names])

    def on(
        self, tasks: str | Sequence[str] | Tensor, attention_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Fix the task of every call inside a ``with`` block, also of calls that bypass the model's own forward."""
        return self.context.on(self.task_ids(tasks), attention_mask)

    def load_bank(self, bank: Mapping[str, str | Path]) -> None:
        """Put adapters that ``Adapter.save`` wrote, or LoRAs in PEFT's format, where the method keeps a bank.

        Raises:
            FileNotFoundError: no adapter there.
            ValueError: as ``Adapter.load_bank``; nothing was changed.
        """
        layers, ids = self.layers, {task: int(self.task_ids(task)[0]) for task in bank}
        found = {ids[task]: saved_loras(folder, layers, task, self.base_fingerprint) for task, folder in bank.items()}
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        try:
            put_experts(layers, found)
        except ValueError:
            copy_weights(layers, before)
            raise

    # Training.

    @property
    def settles(self) -> float:
        """The share of the training before which no state is the one to keep."""
        return self.method.settles

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All the adapter's weights, each once: also those that no gradient trains, and those that are frozen."""
        return named_weights(self.layers)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's trainable weights."""
        return (p for _, p in self.named_parameters() if p.requires_grad)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable weights that all tasks have in common."""
        own = {layer.get_parameter(key) for layer in self.layers.values() for key in task_parts(layer)}
        return (p for p in self.parameters() if p not in own)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, object]]:
        return self.method.param_groups(self.layers, lr, weight_decay)

    @property
    def hears(self) -> Hears:
        """What ``losses`` looks at: nothing, sums over the samples of a forward, or its batch as a whole."""
        return self.method.hears

    def losses(self) -> dict[str, Tensor]:
        """The method's auxiliary losses of the last forward, weighted scalars by name; call it before the next."""
        notes, self.context.notes = self.context.notes, {}
        return self.method.losses(global_notes(notes) if self.hears == "sums" else notes)

    def adding(self) -> AbstractContextManager[None]:
        """After the block, ``losses`` are those of all its forwards together, if ``hears`` is "sums"."""
        return self.context.adding()

    def unheard(self) -> AbstractContextManager[None]:
        """Forwards in the block leave nothing for ``losses`` and count nothing."""
        return self.context.unheard()

    def before_step(self, done: float) -> None:
        """The gradients of a step are complete; done: the share of the training that is done with it."""
        self.method.before_step(self.layers, done)

    def after_step(self) -> None:
        """The optimiser has made a step."""
        self.method.after_step(self.layers)

    def after_task(self) -> None:
        """A task is over, where tasks are trained one after the other."""
        self.method.after_task(self.layers)


class Adapters:
    """All POLYRANK adapters of one model. Its layers refer to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base_fingerprint = fingerprint(dict(model.named_parameters()))
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        self.handles: dict[str, Handle] = {}
        self.layers: dict[str, PolyrankLayer] = {}
        self.places: list[Places] = []
        self._under_way: list[RouteContext | None] = []
        self._hooks = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    @property
    def first(self) -> PolyrankLayer:
        """PEFT switches all layers alike: this one answers for them."""
        return next(iter(self.layers.values()))

    @property
    def running(self) -> Handle | None:
        """The adapter of the next forward; None where adapters are disabled, merged or gone."""
        return self.handles.get(self.first.running or "")

    @property
    def current(self) -> Handle | None:
        """The active adapter, disabled or not."""
        return self.handles.get(self.first.current or "")

    def refresh(self) -> None:
        """A method's own hooks on the model stand there only while its adapter runs."""
        running = self.running if self.layers else None
        for handle in self.handles.values():
            if handle is not running:
                _take_out(handle)
            elif not handle.hooks:
                handle.hooks = list(handle.method.attach(self.model, handle.layers))

    def forget(self, adapter: str) -> None:
        if adapter in self.handles:
            _take_out(self.handles.pop(adapter))

    def close(self) -> None:
        """Take everything out of the model: its own modules and no hook of ours."""
        for places in self.places:
            places.restore()
        for handle in self.handles.values():
            _take_out(handle)
        for hook in self._hooks:
            hook.remove()
        release(self.model)
        self.handles, self.layers, self.places, self._hooks = {}, {}, [], []

    # The root's hooks.

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take out ``task_id`` and start the running adapter's route."""
        self._under_way.append(None)  # first of all: ``leave`` also follows an error in here
        kwargs = dict(kwargs)
        tasks, handle = kwargs.pop("task_id", None), self.running
        if handle is None:
            return args, kwargs
        if "task_ids" in kwargs:
            raise TypeError(
                "in a PEFT model the keyword is task_id: task_ids is PEFT's own, and most of its models drop it"
            )
        if tasks is not None:
            kwargs["task_ids"] = handle.task_ids(tasks)
        elif not handle.context.pins and handle.routes_by_task:
            raise ValueError(NO_TASK.format(name=handle.name, method=handle.method))
        if module.training and torch.is_grad_enabled():
            capture(self.model, self)
        self._under_way[-1] = handle.context
        return handle.context.enter(module, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        context = self._under_way.pop()
        if context is not None:
            context.leave(module, args, output)


def _take_out(handle: Handle) -> None:
    for hook in handle.hooks:
        hook.remove()
    handle.hooks = []


def adapters_of(model: nn.Module) -> Adapters | None:
    """The POLYRANK adapters of a model, also of one that is wrapped; None where it has none."""
    return next((module.adapters for module in model.modules() if isinstance(module, PolyrankLayer)), None)


def handle(model: nn.Module, adapter: str | None = None) -> Handle:
    """The handle of a POLYRANK adapter in any model: a ``PeftModel``, an injected one, or what wraps them.

    Args:
        adapter: its name; without it the active one.

    Raises:
        ValueError: there is none.
    """
    found = adapters_of(model)
    if found is None:
        raise ValueError("the model has no POLYRANK adapter: get_peft_model(model, polyrank.peft.PolyrankConfig(...))")
    chosen = found.current if adapter is None else found.handles.get(adapter)
    if chosen is None:
        raise ValueError(f"no adapter {adapter or 'is active'!r}; the model's are: {', '.join(found.handles)}")
    return chosen


def on(
    model: nn.Module, tasks: str | Sequence[str] | Tensor, attention_mask: Tensor | None = None
) -> AbstractContextManager[None]:
    """Fix the task of every call of the model in a ``with`` block: one name for all samples, or one for each.

    It serves calls that bypass the model's own forward, ``generate`` of a model that is no ``PeftModel``, and merging.
    """
    return handle(model).on(tasks, attention_mask)
