"""Which task each sample of the current batch belongs to, and what the layers leave behind for the losses.

One context object per model, referenced by its layers: not global, not thread-local, never the last batch's. It is set
when the root module's forward starts and cleared when it ends. Activation checkpointing recomputes layers after that
moment, so the route is captured with the checkpointed call (``RouteContext.replay``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .route import NO_TASK, Note, Route

NOT_CAPTURED = (
    "a layer is being recomputed in the backward pass, and its route was not captured with the checkpointed call: "
    "use adapter.enable_checkpointing(), or torch.utils.checkpoint.checkpoint(..., use_reentrant=False, "
    "context_fn=adapter.context.replay)"
)


class RouteContext:
    """The route of the forward under way. One per adapted model; its layers hold a reference."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.arguments: tuple[str, ...] = ()  # names of the root forward's positional arguments
        self.notes: dict[str, list[Note]] = {}  # the last finished forward's
        self._active: Route | None = None
        self._outer: list[Route | None] = []  # of a root forward inside another
        self._pinned: Route | None = None
        self._replaying, self._heard, self._adding = False, True, False

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.tasks, self.arguments)  # a copied or pickled model gets no graph tensors of this one

    # The root's hooks.

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the root: take out ``task_ids``, ``prompt_mask``, ``modality_ids``; start the route."""
        self._outer.append(self._active)  # first of all: ``leave`` also follows an error in here
        kwargs = dict(kwargs)
        modality_ids = kwargs.pop("modality_ids", None)
        task_ids, prompt_mask = kwargs.pop("task_ids", None), kwargs.pop("prompt_mask", None)
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        route = Route(batch=_batch_size(given), masks=_masks(given, prompt_mask), continues=_continues(given))
        pinned = self._pinned
        mask = pinned.masks.get("input") if pinned is not None else None
        if mask is not None and route.masks["input"] is None:  # beams stand together, as in the batch
            route.masks["input"] = mask.repeat_interleave(max(1, (route.batch or 1) // len(mask)), 0)
        if task_ids is not None:
            route.task_ids, route.task = self.checked(task_ids, route.batch)
        elif pinned is not None:
            route.task_ids, route.task = pinned.task_ids, pinned.task
        route.prompt = pinned.prompt if pinned is not None else None
        route.modality_ids = modality_ids
        route.heard = self._heard
        self._active = route
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forward hook of the root, called also after an error: nothing of this forward stays, but its notes."""
        finished, self._active = self._active, self._outer.pop()
        if not self._replaying:
            notes = finished.notes if finished is not None and output is not None else {}
            self.notes = _added(self.notes, notes) if self._adding and self.notes else notes

    @contextmanager
    def on(self, task_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Fix the task of every call inside the block, also of calls that bypass the root."""
        masks: dict[str, Tensor | None] = {} if attention_mask is None else {"input": attention_mask}
        before = self._pinned, self._active, self._outer
        ids, task = self.checked(task_ids, None)
        self._pinned, self._active, self._outer = Route(ids, task, None, masks, prompt={}), None, []
        try:
            yield
        finally:
            self._pinned, self._active, self._outer = before

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """The root's forwards inside the block leave no notes and count nothing, recomputations of them included."""
        before, self._heard = self._heard, False
        try:
            yield
        finally:
            self._heard = before

    @contextmanager
    def adding(self) -> Iterator[None]:
        """The notes of the root's forwards inside the block are added up, layer by layer."""
        self.notes, self._adding = {}, True
        try:
            yield
        finally:
            self._adding = False

    def replay(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of ``torch.utils.checkpoint``: the recomputed layers see the route of their own forward."""
        return nullcontext(), _Replay(self, self._active or self._pinned)

    @property
    def pins(self) -> bool:
        """Whether ``on`` is under way."""
        return self._pinned is not None

    @property
    def pinned_task(self) -> int | None:
        """The one task that ``on`` fixed, where that is known without waiting for the device."""
        return None if self._pinned is None else self._pinned.task

    @property
    def route(self) -> Route:
        """The route of the forward under way.

        Raises:
            RuntimeError: the layer is being recomputed without its route.
            ValueError: neither the root's forward nor ``on`` is under way.
        """
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if in_backward and not self._replaying:
            raise RuntimeError(NOT_CAPTURED)
        route = self._active or self._pinned
        if route is None:
            raise ValueError(NO_TASK)
        return route

    def checked(self, task_ids: Tensor, batch: int | None) -> tuple[Tensor, int | None]:
        """``task_ids`` if they are ids of this adapter's tasks, and the one task if it is known to be one.

        Raises:
            TypeError: not an integer tensor.
            ValueError: wrong shape, or an id out of range.
        """
        if not isinstance(task_ids, Tensor) or task_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"task_ids must be a LongTensor (B,), got {type(task_ids).__name__} {task_ids!r:.60}")
        if task_ids.ndim not in (1, 2) or task_ids.numel() == 0:
            raise ValueError(f"task_ids must have shape (B,), or (B, L) for one per token; got {tuple(task_ids.shape)}")
        if batch is not None and task_ids.ndim == 1 and batch % len(task_ids):
            raise ValueError(f"{len(task_ids)} task_ids for a batch of {batch}: give one id per sample")
        if torch.compiler.is_compiling() or task_ids.device.type != "cpu":  # elsewhere it would wait for the device
            return task_ids.long(), None
        least, most = int(task_ids.min()), int(task_ids.max())
        if least < 0 or most >= len(self.tasks):
            raise ValueError(
                f"task_ids must lie in 0..{len(self.tasks) - 1} ({', '.join(self.tasks)}); "
                f"got {sorted(set(task_ids.flatten().tolist()))}"
            )
        return task_ids.long(), least if least == most else None


class _Replay(AbstractContextManager[None]):
    """A recomputation on the route of its own forward. Two backward passes through one forward enter it twice."""

    def __init__(self, context: RouteContext, route: Route | None) -> None:
        self.context, self.route = context, route
        self.before: list[tuple[Route | None, bool]] = []

    def __enter__(self) -> None:
        self.before.append((self.context._active, self.context._replaying))
        route = self.route
        if route is not None:  # the notes of the first pass stand; those of the recomputation are thrown away
            route = replace(route, notes={}, prompt=None)
        self.context._active, self.context._replaying = route, True

    def __exit__(self, *error: object) -> None:
        self.context._active, self.context._replaying = self.before.pop()


def _added(one: dict[str, list[Note]], other: dict[str, list[Note]]) -> dict[str, list[Note]]:
    pairs = {kind: zip(notes, other[kind], strict=True) for kind, notes in one.items()}
    return {kind: [(name, value + more) for (name, value), (_, more) in both] for kind, both in pairs.items()}


def _blank(tasks: tuple[str, ...], arguments: tuple[str, ...]) -> RouteContext:
    context = RouteContext(tasks)
    context.arguments = arguments
    return context


def _batch_size(given: Mapping[str, Any]) -> int | None:
    first = [given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids")]
    tensors = [value for value in [*first, *given.values()] if isinstance(value, Tensor) and value.ndim > 0]
    return tensors[0].shape[0] if tensors else None


def _masks(given: Mapping[str, Any], prompt_mask: Tensor | None) -> dict[str, Tensor | None]:
    """Masks by stream. Without a decoder mask, the labels of an encoder-decoder model tell its padding."""
    decoder, labels = given.get("decoder_attention_mask"), given.get("labels")
    if decoder is None and isinstance(labels, Tensor) and labels.ndim == 2:
        decoder = labels != -100
    prompt = {} if prompt_mask is None else {"prompt": prompt_mask}
    return {"input": given.get("attention_mask"), "decoder": decoder, **prompt}


def _continues(given: Mapping[str, Any]) -> bool:
    past = given.get("past_key_values")
    return past is not None and (len(past) if isinstance(past, tuple) else past.get_seq_length()) > 0
