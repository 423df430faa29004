"""Where an adapted layer stands, and what it may ask there."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from .context import RouteContext
from .route import Route


@dataclass
class Site:
    """Where a layer stands: its name in the model, which stream of tokens it reads, and the model's context."""

    name: str = ""
    stream: str = "input"  # "input", or "decoder" in an encoder-decoder model
    context: RouteContext = field(default_factory=lambda: RouteContext(()))

    def ids(self, x: Tensor) -> Tensor:
        return self.context.route.ids(x, self.name)

    def task(self, x: Tensor) -> int | None:
        """The one task of all samples in ``x`` (..., I), where that is known without waiting for the device.

        Raises:
            ValueError: the ids do not fit x; see ``Route.ids``.
        """
        route = self.context.route
        if route.task is not None and route.task_ids is not None:
            leading, given = x.shape[:-1], route.task_ids.shape
            if len(given) != 1 or not leading or leading[0] % given[0]:
                route.ids(x, self.name)
        return route.task

    def mask(self, x: Tensor) -> Tensor | None:
        return self.context.route.mask(x, self.stream)

    def modalities(self, x: Tensor) -> Tensor:
        """The modality of each token of ``x`` (B, L, I), (B, L); see ``Route.modalities``."""
        return self.context.route.modalities(x, self.name)

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
        """Whether notes are worth leaving: only a forward of the whole model that will be differentiated has losses.

        A layer that no adapter put anywhere has none.
        """
        if not torch.is_grad_enabled() or not self.context.tasks:
            return False
        route = self.context.route
        return route.batch is not None and route.heard

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

    def of_all(self, device: torch.device) -> Self:
        """The same place, with one sample of each task."""
        context = RouteContext(self.context.tasks)
        context._pinned = Route(task_ids=torch.arange(len(context.tasks), device=device))
        return type(self)(self.name, self.stream, context)

    def on(self, task: int, device: torch.device) -> Self:
        """The same place, with every sample on one task: for merging and exporting."""
        context = RouteContext(self.context.tasks)
        context._pinned = Route(task_ids=torch.tensor([task], device=device))
        return type(self)(self.name, self.stream, context)
