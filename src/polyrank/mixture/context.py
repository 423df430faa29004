"""Which task each sample of the current batch belongs to, and what the layers leave behind for the losses.

One context object per model, referenced by its layers: not global, not thread-local, never the last batch's. It is set
when the root module's forward starts and cleared when it ends. Activation checkpointing recomputes layers after that
moment, so the route is captured with the checkpointed call (``RouteContext.replay``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

Note = tuple[str, Tensor]  # layer name, what it left


@dataclass
class Route:
    """What one forward knows: tasks, masks, and the notes of its layers."""

    task_ids: Tensor | None = None  # (B,), or (B, L) where requests are flattened into rows
    batch: int | None = None  # samples in this forward; None outside the root's forward
    masks: dict[str, Tensor | None] = field(default_factory=dict)  # stream -> (B, L), nonzero where a token counts
    notes: dict[str, list[Note]] = field(default_factory=dict)  # kind -> notes, in the order of the layers
    prompt: dict[str, Tensor] | None = None  # layer name -> pooled prompt (B, I); kept for decoding within on()
    continues: bool = False  # a decoding step: the prompt is in the cache, not in this forward

    def ids(self, x: Tensor, layer: str = "") -> Tensor:
        """Task ids that broadcast over the leading dimensions of ``x`` (..., I), the input of a layer.

        Ids are one per sample. Where the model folded more into dimension 0 (windows, beams, returned sequences) each
        id is repeated by the integer ratio.

        Raises:
            ValueError: no task was given, or the sizes do not fit.
        """
        if self.task_ids is None:
            raise ValueError(NO_TASK)
        ids, leading = self.task_ids.to(x.device), x.shape[:-1]
        if ids.ndim == 2:
            if ids.shape != leading:
                raise ValueError(
                    f"task_ids {tuple(ids.shape)} are one per token, but the layer's tokens are {tuple(leading)}"
                )
            return ids
        if len(leading) == 0 or leading[0] % len(ids):
            raise ValueError(
                f"{layer}: {len(ids)} task_ids do not fit a layer input of shape {tuple(x.shape)}: its first dimension "
                "must be the batch, or a multiple of it (windows, beams); give one id per sample, and leave out layers "
                "that read something else, such as a table of positions"
            )
        if leading[0] != len(ids):
            ids = ids.repeat_interleave(leading[0] // len(ids))
        return ids.view(-1, *[1] * (len(leading) - 1))

    def mask(self, x: Tensor, stream: str) -> Tensor | None:
        """The mask (B, L) over the tokens of ``x`` (B, L, I), or None where every token counts."""
        if stream not in self.masks:
            raise ValueError(
                "a router or loss that pools tokens ran outside the model's own forward and does not know the padding: "
                "use adapter.on(task, attention_mask=mask)"
            )
        mask = self.masks[stream]
        if mask is None:
            return None
        tokens = x.numel() // x.shape[-1]
        if tokens == self.batch:  # one token a sample (a pooled vector, a decoding step): nothing of it is padding
            return None
        if mask.ndim != 2 or mask.numel() != tokens:
            raise ValueError(
                f"the {stream} mask has shape {tuple(mask.shape)}, but the layer sees {tokens} tokens in an input of "
                f"shape {tuple(x.shape)}: pooling needs one (B, L) mask entry per token"
            )
        return mask

    def pool(self, x: Tensor, stream: str) -> Tensor:
        """Masked mean (B, I) over the tokens of each sample of ``x`` (..., I). A sample without a token gives 0."""
        mask = self.mask(x, stream)
        if self.task_ids is not None and self.task_ids.ndim == 2:
            raise ValueError(
                "ids of each token flatten several requests into a row: a router or loss that pools cannot"
            )
        batch = self.batch if self.batch is not None else (len(mask) if mask is not None else x.shape[0])
        if x.shape[0] % batch:
            raise ValueError(
                f"a batch of {batch} does not fit a layer input of shape {tuple(x.shape)}: cannot pool by sample"
            )
        rows = x.reshape(batch, -1, x.shape[-1])  # (B, L, I): windows of a sample stand together
        if mask is None:
            return rows.mean(1)
        weights = mask.reshape(batch, 1, -1).to(x.device, torch.float32)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        return torch.bmm(weights.to(x.dtype), rows).squeeze(1)  # no tokens x width temporary


NO_TASK = (
    "this method routes by task and none was given: call the model with task_ids=<LongTensor (B,)>, or wrap the call "
    "in `with adapter.on('task'):`"
)
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
        self._replaying = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.tasks, self.arguments)  # a copied or pickled model gets no graph tensors of this one

    # The root's hooks.

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the root: take ``task_ids`` and ``prompt_mask`` out, and start the route."""
        self._outer.append(self._active)  # first of all: ``leave`` also follows an error in here
        kwargs = dict(kwargs)
        task_ids, prompt_mask = kwargs.pop("task_ids", None), kwargs.pop("prompt_mask", None)
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        route = Route(batch=_batch_size(given), masks=_masks(given, prompt_mask), continues=_continues(given))
        pinned = self._pinned
        mask = pinned.masks.get("input") if pinned is not None else None
        if mask is not None and route.masks["input"] is None:  # beams stand together, as in the batch
            route.masks["input"] = mask.repeat_interleave(max(1, (route.batch or 1) // len(mask)), 0)
        route.task_ids = self.checked(task_ids, route.batch) if task_ids is not None else pinned and pinned.task_ids
        route.prompt = pinned.prompt if pinned is not None else None
        self._active = route
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forward hook of the root, called also after an error: nothing of this forward stays, but its notes."""
        finished, self._active = self._active, self._outer.pop()
        if not self._replaying:
            self.notes = finished.notes if finished is not None and output is not None else {}

    @contextmanager
    def on(self, task_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Fix the task of every call inside the block, also of calls that bypass the root."""
        masks: dict[str, Tensor | None] = {} if attention_mask is None else {"input": attention_mask}
        before = self._pinned, self._active, self._outer
        self._pinned, self._active, self._outer = Route(self.checked(task_ids, None), None, masks, prompt={}), None, []
        try:
            yield
        finally:
            self._pinned, self._active, self._outer = before

    def replay(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of ``torch.utils.checkpoint``: the recomputed layers see the route of their own forward."""
        return nullcontext(), _Replay(self, self._active or self._pinned)

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

    def checked(self, task_ids: Tensor, batch: int | None) -> Tensor:
        """``task_ids`` if they are ids of this adapter's tasks.

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
        known = (
            not torch.compiler.is_compiling() and task_ids.device.type == "cpu"
        )  # elsewhere it would wait for the device
        if known and (int(task_ids.min()) < 0 or int(task_ids.max()) >= len(self.tasks)):
            raise ValueError(
                f"task_ids must lie in 0..{len(self.tasks) - 1} ({', '.join(self.tasks)}); "
                f"got {sorted(set(task_ids.flatten().tolist()))}"
            )
        return task_ids.long()


class _Replay(AbstractContextManager[None]):
    """A recomputation on the route of its own forward. Two backward passes through one forward enter it twice."""

    def __init__(self, context: RouteContext, route: Route | None) -> None:
        self.context, self.route = context, route
        self.before: list[tuple[Route | None, bool]] = []

    def __enter__(self) -> None:
        self.before.append((self.context._active, self.context._replaying))
        route = self.route
        if route is not None:  # the notes of the first pass stand; those of the recomputation are thrown away
            route = Route(route.task_ids, route.batch, route.masks, {}, None, route.continues)
        self.context._active, self.context._replaying = route, True

    def __exit__(self, *error: object) -> None:
        self.context._active, self.context._replaying = self.before.pop()


@dataclass
class Site:
    """Where a layer stands: its name in the model, which stream of tokens it reads, and the model's context."""

    name: str = ""
    stream: str = "input"  # "input", or "decoder" in an encoder-decoder model
    context: RouteContext = field(default_factory=lambda: RouteContext(()))

    def ids(self, x: Tensor) -> Tensor:
        return self.context.route.ids(x, self.name)

    def mask(self, x: Tensor) -> Tensor | None:
        return self.context.route.mask(x, self.stream)

    def samples(self, x: Tensor) -> int:
        """How many samples stand in ``x`` (..., I): windows of one count as one."""
        batch = self.context.route.batch
        return x.shape[0] if batch is None or x.shape[0] % batch else batch

    def pool(self, x: Tensor) -> Tensor:
        """Masked mean (B, I) of this forward's tokens; see ``Route.pool``."""
        return self.context.route.pool(x, self.stream)

    def pool_prompt(self, x: Tensor) -> Tensor:
        """The mean over the tokens of ``prompt_mask`` (a causal model needs one in training), else the attention mask.

        A decoding step gets the mean that was kept when its prompt was read. In the decoder of an encoder-decoder model
        the prompt is the first token: generation knows no more.

        Raises:
            ValueError: a decoding step whose prompt was not kept, or a prompt that comes in parts.
        """
        route = self.context.route
        if route.continues:
            if route.batch is not None and x.numel() // x.shape[-1] > route.batch:
                raise ValueError(f"{self.name}: a prompt in parts has no mean yet; read it in one forward")
            if route.prompt is None or self.name not in route.prompt:
                raise ValueError(
                    f"{self.name}: decoding needs the prompt's gate; generate inside `with adapter.on(task):`"
                )
            return route.prompt[self.name]
        if self.stream == "decoder" and route.batch is not None:
            pooled = x.reshape(route.batch, -1, x.shape[-1])[:, 0]
        else:
            prompted = self.stream == "input" and "prompt" in route.masks
            pooled = route.pool(x, "prompt" if prompted else self.stream)
        if route.prompt is not None:
            route.prompt[self.name] = pooled.detach()
        return pooled

    @property
    def listens(self) -> bool:
        """Whether notes are worth leaving: only a forward of the whole model that will be differentiated has losses."""
        return torch.is_grad_enabled() and self.context.route.batch is not None

    @property
    def replays(self) -> bool:
        """Whether this is the recomputation of a forward that has been counted already."""
        return self.context._replaying

    @property
    def per_token(self) -> bool:
        """Whether each token has a task of its own."""
        ids = self.context.route.task_ids
        return ids is not None and ids.ndim == 2

    def note(self, kind: str, value: Tensor) -> None:
        """Leave ``value`` for ``Method.losses``."""
        self.context.route.notes.setdefault(kind, []).append((self.name, value))

    def on(self, task: int, device: torch.device) -> Self:
        """The same place, with every sample on one task: for merging and exporting."""
        context = RouteContext(self.context.tasks)
        context._pinned = Route(task_ids=torch.tensor([task], device=device))
        return type(self)(self.name, self.stream, context)


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
