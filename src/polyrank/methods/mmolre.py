"""MMoLRE: Multimodal Mixture of Low-Rank Experts for Sentiment Analysis and Emotion Recognition (Zhang et al., 2025).

https://arxiv.org/abs/2505.14143 (ICME 2025)

    x^s <- x^s + sum_n g_n f_n(x^s) + g_own f_t(x^s),    g = softmax(G_t x^s + c_t),    for each stream s, twice
    f(x) = conv_1(gelu(conv_3(x))) of rank r_n: d -> r_n -> d, over the tokens of one stream
    y = gelu(sum_s w_s P_ts p^s),    p^s = mean of x^s,    w = softmax(H_t [p^1; p^2; ...] + h_t)

Each stream of tokens (text, audio, an image) comes from a model of its own. Low-rank experts that all tasks share stand
beside one of each task, and each task weighs them, and then the streams, in its own way.

Choose it if each sample comes as several streams of features and the models behind them stay as they are.

Reconstruction: no code was released and the text could not be read in full. Known are the two blocks, the shared
and own experts of two convolutions with a rank of their own, and each task's softmax over them.
- The router reads each token, the activation is GELU, and a block adds to its input.
- The fusion stands for a "task-adaptive" one that is not known: weights of the streams from all of them, by task.
- It is no change of a frozen weight: a module of its own that goes behind the models, not a `Method` for `adapt`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankExpert(nn.Module):
    """Two convolutions over the tokens, d -> r -> d."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Conv1d(width, rank, kernel_size=3, padding=1)
        self.up = nn.Conv1d(rank, width, kernel_size=1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x: (B, L, d), padding: (B, L, 1), True where no token is."""
        hidden = F.gelu(self.down(x.masked_fill(padding, 0).transpose(1, 2)))  # (B, r, L)
        return self.up(hidden.masked_fill(padding.transpose(1, 2), 0)).transpose(1, 2)


class TaskBlock(nn.Module):
    """Shared experts and one of each task, which the task's router weighs."""

    def __init__(self, width: int, num_tasks: int, ranks: Sequence[int], task_rank: int) -> None:
        super().__init__()
        self.shared = nn.ModuleList(LowRankExpert(width, rank) for rank in ranks)
        self.own = nn.ModuleList(LowRankExpert(width, task_rank) for _ in range(num_tasks))
        self.routers = nn.ModuleList(nn.Linear(width, len(ranks) + 1) for _ in range(num_tasks))

    def forward(self, x: Tensor, padding: Tensor, task_ids: Tensor) -> Tensor:
        x = x.masked_fill(padding, 0)
        shared = torch.stack([expert(x, padding) for expert in self.shared], -1)  # (B, L, d, N)
        mixed = torch.zeros_like(x)
        for task, rows in _by_task(task_ids):
            own = self.own[task](x[rows], padding[rows]).unsqueeze(-1)
            gate = self.routers[task](x[rows]).softmax(-1).unsqueeze(-2)  # (b, L, 1, N + 1)
            mixed = mixed.index_copy(0, rows, (torch.cat([shared[rows], own], -1) * gate).sum(-1))
        return x + mixed.masked_fill(padding, 0)


class Stream(nn.Module):
    """Blocks, one behind the other, and the mean of what comes out."""

    def __init__(self, blocks: Sequence[TaskBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, padding: Tensor, task_ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, padding, task_ids)
        return x.sum(1) / (~padding).sum(1).clamp_min(1)  # (B, d); padding is 0 behind a block


class Fusion(nn.Module):
    """The streams' means, weighed and mapped as one task does."""

    def __init__(self, widths: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.weights = nn.Linear(sum(widths), len(widths))
        self.maps = nn.ModuleList(nn.Linear(width, out_features) for width in widths)

    def forward(self, means: Sequence[Tensor]) -> Tensor:
        """means: (b, d_s) of each stream."""
        weights = self.weights(torch.cat(list(means), -1)).softmax(-1)  # (b, S)
        mapped = torch.stack([one(mean) for one, mean in zip(self.maps, means, strict=True)], -1)  # (b, O, S)
        return F.gelu((mapped * weights.unsqueeze(1)).sum(-1))


class MMoLRE(nn.Module):
    """Fuses streams of features into one vector for the task's head.

    ``streams`` maps the name of each stream to its width d_s. ``ranks`` are those of the shared experts, ``task_rank``
    that of each task's own.

    Raises:
        ValueError: no stream, no task or no rank to work with.
    """

    def __init__(
        self,
        streams: Mapping[str, int],
        tasks: Sequence[str],
        *,
        out_features: int,
        ranks: Sequence[int] = (8, 16, 32),
        task_rank: int = 16,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if not streams or not tasks or not ranks:
            given = f"{dict(streams)}, {list(tasks)}, {list(ranks)}"
            raise ValueError(f"MMoLRE needs streams, tasks and ranks, at least one of each; got {given}")
        self.widths, self.tasks = dict(streams), tuple(tasks)
        widths, count = list(self.widths.values()), len(self.tasks)
        self.streams = nn.ModuleList(  # in the order of `streams`
            Stream([TaskBlock(width, count, ranks, task_rank) for _ in range(blocks)]) for width in widths
        )
        self.fusion = nn.ModuleList(Fusion(widths, out_features) for _ in range(count))

    def forward(self, streams: Mapping[str, Tensor], masks: Mapping[str, Tensor], task_ids: Tensor) -> Tensor:
        """One vector (B, out_features) a sample, of streams (B, L_s, d_s) and masks (B, L_s), nonzero at tokens.

        A stream that a sample lacks has a mask of zeros there; its mean is 0.

        Raises:
            ValueError: a stream or mask that is unknown, missing or of another shape, or task ids out of range.
        """
        self._check(streams, masks, task_ids)
        means = [
            stream(streams[name], masks[name].unsqueeze(-1) == 0, task_ids)
            for name, stream in zip(self.widths, self.streams, strict=True)
        ]
        fused = [(rows, self.fusion[task]([mean[rows] for mean in means])) for task, rows in _by_task(task_ids)]
        rows = torch.cat([rows for rows, _ in fused])
        return torch.cat([one for _, one in fused])[rows.argsort()]

    def _check(self, streams: Mapping[str, Tensor], masks: Mapping[str, Tensor], task_ids: Tensor) -> None:
        for kind, given in (("stream", streams), ("mask", masks)):
            for name in sorted({*given} ^ {*self.widths}):
                fault = "is missing" if name in self.widths else "is unknown"
                raise ValueError(f"{kind} {name!r} {fault}: MMoLRE was built for the streams {', '.join(self.widths)}")
        for name, width in self.widths.items():
            x, mask = streams[name], masks[name]
            if x.ndim != 3 or x.shape[0] != len(task_ids) or x.shape[-1] != width:
                wanted = f"({len(task_ids)}, L, {width}), one row for each of the task_ids"
                raise ValueError(f"stream {name!r} has shape {tuple(x.shape)}, and must have {wanted}")
            if mask.shape != x.shape[:2]:
                wanted = f"{tuple(x.shape[:2])}, one entry for each token"
                raise ValueError(f"mask {name!r} has shape {tuple(mask.shape)}, and must have {wanted}")
        if task_ids.min() < 0 or task_ids.max() >= len(self.tasks):
            raise ValueError(f"task_ids must lie in 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})")


def _by_task(task_ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each task of the batch, and which samples are its."""
    for task in task_ids.unique().tolist():
        yield task, (task_ids == task).nonzero().squeeze(-1)
