"""What the methods cost on this machine: one frozen feed-forward block of a chosen width, all side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapt import Adapter, adapt
from .measure import Candidate, PeakBytes, Ratio, SavedBytes, compare
from .methods import Method


class Block(nn.Module):
    """What a method is put on: W_2 gelu(W_1 x), four times as wide inside."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        self.to(device, dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.mlp = Block(width, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@dataclass(frozen=True)
class Cost:
    """What one method costs, in units of the frozen block and of the block's input."""

    weights: int  # trained
    training: Ratio  # forward and backward / the frozen block's
    forward: Ratio  # without gradients / the frozen block's
    kept: float  # bytes for the backward pass / the frozen block's
    alive: float  # the most bytes at once in a training step / the frozen block's
    seconds: float  # of a training step, the median of the rounds
    rounds: int


def bench(
    methods: Mapping[str, Method],
    *,
    width: int = 768,
    tokens: int = 1024,
    samples: int = 8,
    tasks: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 20.0,
) -> dict[str, Cost]:
    """Each method's cost on a block of ``width``, for ``tokens`` tokens in ``samples`` samples of ``tasks`` tasks.

    Args:
        seconds: about how long each of the two comparisons (training, forward) lasts.

    Raises:
        ValueError: tokens that the samples do not divide, or a method that does not fit the block.
    """
    if tokens % samples:
        raise ValueError(f"{tokens} tokens in {samples} samples: give a multiple of the samples")
    torch.manual_seed(1)
    x = torch.randn(samples, tokens // samples, width, device=device).to(dtype).requires_grad_()
    ids = (torch.arange(samples) % tasks).to(device)
    frozen, names = Net(width, dtype, device), [f"t{i}" for i in range(tasks)]
    nets, adapters = {"": frozen}, {}
    for name, method in methods.items():
        nets[name] = Net(width, dtype, device)
        adapters[name] = adapt(nets[name], method, tasks=names)
        with torch.no_grad():
            for p in adapters[name].parameters():
                p.add_(0.02 * torch.randn_like(p))
    dy = torch.randn_like(x)
    steps = {name: _step(net, adapters.get(name), x, dy, ids) for name, net in nets.items()}
    kept = {name: _kept(net, name in adapters, x, ids) for name, net in nets.items()}
    alive = {name: _alive(step) for name, step in steps.items()}
    training = compare(steps, rounds=31, enough=seconds, device=device)
    calls = {name: _call(net.eval(), name in adapters, x, ids) for name, net in nets.items()}
    forward = compare(calls, rounds=31, enough=seconds, device=device)
    return {
        name: Cost(
            sum(p.numel() for p in adapters[name].parameters()),
            training[name].over(training[""]),
            forward[name].over(forward[""]),
            kept[name] / kept[""],
            alive[name] / alive[""],
            training[name].typical,
            len(training[name].seconds),
        )
        for name in methods
    }


def _given(adapted: bool, ids: Tensor) -> dict[str, Tensor]:
    return {"task_ids": ids} if adapted else {}


def _step(net: nn.Module, adapter: Adapter | None, x: Tensor, dy: Tensor, ids: Tensor) -> Candidate:
    given, trained = _given(adapter is not None, ids), [] if adapter is None else list(adapter.parameters())

    def run() -> None:
        y = net(x, **given)
        losses = [] if adapter is None else list(adapter.losses().values())
        torch.autograd.backward([y, *losses], [dy, *(torch.ones_like(loss) for loss in losses)])
        x.grad = None
        for p in trained:
            p.grad = None

    return run


def _call(net: nn.Module, adapted: bool, x: Tensor, ids: Tensor) -> Candidate:
    given = _given(adapted, ids)

    @torch.no_grad()
    def run() -> None:
        net(x, **given)

    return run


def _kept(net: nn.Module, adapted: bool, x: Tensor, ids: Tensor) -> int:
    """Bytes for the backward pass, beside the weights; the input counts."""
    with SavedBytes([*net.parameters(), *net.buffers()]) as saved:
        net(x, **_given(adapted, ids))
    return max(saved.total, 1)


def _alive(step: Candidate) -> int:
    step()
    with PeakBytes() as most:
        step()
    return most.total
