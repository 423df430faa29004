"""Feed-forward blocks of a model, found by what they compute: down(act(up x)), or gated, down(act(gate x) * up x).

No class is known by name. A module with two or three linear layers and an activation is taken apart, and put together
again as a ``FeedForward``: it is one if both give the same on a random input, in training mode, dropout included. In
BERT and its like the parts are siblings: one module ends with the activation, and the next one begins with ``down``.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .mixture import FeedForward, in_out_features, is_linear, weight_of


@dataclass(frozen=True)
class Block:
    """A feed-forward block: where it stands, its linear layers by name, and its parts."""

    name: str
    linears: tuple[str, ...]
    parts: FeedForward

    @property
    def elsewhere(self) -> list[str]:
        """Its linear layers that stand outside of the module that it is named after."""
        return [name for name in self.linears if not name.startswith(f"{self.name}.")]


def group(model: nn.Module, linears: Mapping[str, nn.Module], method: str) -> tuple[dict[str, nn.Module], list[Block]]:
    """The sites of a method for blocks: every block that ``linears`` belong to, and the linear layers beside them.

    Raises:
        ValueError: no block among them, or one of which not all linear layers are.
    """
    blocks = list(find(model))
    mine = [block for block in blocks if any(name in linears for name in block.linears)]
    if not mine:
        raise ValueError(f"{method} adapts feed-forward blocks, and {_none(model, blocks, linears)}")
    for block in mine:
        missing = [name for name in block.linears if name not in linears]
        if missing:
            raise ValueError(
                f"{block.name} is a feed-forward block that {method} adapts as a whole, and the targets leave out "
                f"{', '.join(missing)}: target all of it, or none"
            )
    by_first = {block.linears[0]: block for block in mine}
    inside = {name for block in mine for name in block.linears}
    sites: dict[str, nn.Module] = {}
    for name, linear in linears.items():  # in the order of the model
        if name in by_first:
            sites[by_first[name].name] = by_first[name].parts
        elif name not in inside:
            sites[name] = linear
    return sites, mine


def _none(model: nn.Module, blocks: list[Block], linears: Mapping[str, nn.Module]) -> str:
    if blocks:
        names = ", ".join(blocks[0].linears)
        return f"no target stands in one: target all linear layers of the blocks too, such as {names}"
    near = next((path for path, module in model.named_modules() if _looks_like_one(module)), None)
    hint = "" if near is None else f"; {near} ({type(model.get_submodule(near)).__name__}) computes something else"
    return (
        f"the model has none that computes down(act(up x)) or down(act(gate x) * up x) from linear layers of its own"
        f"{hint}: take a method for linear layers, such as ase or hydralora"
    )


def _looks_like_one(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(part in name for part in ("mlp", "glu", "ffn", "feedforward"))


def find(model: nn.Module) -> Iterator[Block]:
    """Every feed-forward block of a model, in its order."""
    for path, module in model.named_modules():
        inside = _linears(module)
        if path and len(inside) in (2, 3) and _takes_hidden_states_alone(module):
            whole = _whole(path, module, inside)
            if whole is not None:
                yield whole
        children = list(module.named_children())
        for (one, first), (other, second) in itertools.pairwise(children):
            siblings = _siblings(path, one, first, other, second)
            if siblings is not None:
                yield siblings


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Its linear children, if whatever else it holds has no weights."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if is_linear(child)}
    owned = sum(1 for child in linears.values() for _ in child.parameters())
    return linears if owned == sum(1 for _ in module.parameters()) else {}


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _activation(module: nn.Module) -> nn.Module | None:
    found = [child for child in module.children() if not is_linear(child) and not _is_dropout(child)]
    return found[0] if len(found) == 1 else None


def _dropout(module: nn.Module) -> nn.Module | None:
    return next((child for child in module.children() if _is_dropout(child)), None)


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Identity)


def _whole(path: str, module: nn.Module, inside: Mapping[str, nn.Module]) -> Block | None:
    """A module that is a block by itself: which linear layer plays which part is tried."""
    activation, dropout = _activation(module), _dropout(module)
    if activation is None:
        return None
    x = _random_input(next(iter(inside.values())))
    for names in itertools.permutations(inside):
        up, gate, down = names[0], (names[1] if len(names) == 3 else None), names[-1]
        if in_out_features(inside[up])[1] != in_out_features(inside[down])[0]:
            continue
        for places in [(None, None)] if dropout is None else [(dropout, None), (None, dropout)]:
            parts = FeedForward(inside[up], inside[down], activation, None if gate is None else inside[gate], *places)
            if _agree(module, parts, x):
                return Block(path, tuple(f"{path}.{name}".lstrip(".") for name in inside), parts)
    return None


def _siblings(path: str, one: str, first: nn.Module, other: str, second: nn.Module) -> Block | None:
    """Two neighbours: act(up h), and one that begins with down."""
    heads, tails = _linears(first), {name: child for name, child in second.named_children() if is_linear(child)}
    activation = _activation(first)
    if len(heads) != 1 or len(tails) != 1 or activation is None or not _takes_hidden_states_alone(first):
        return None
    (up_name, up), (down_name, down) = next(iter(heads.items())), next(iter(tails.items()))
    if in_out_features(up)[1] != in_out_features(down)[0]:
        return None
    x, hidden = _random_input(up), _random_input(down)
    residual = [_random_input(down, in_out_features(down)[1])] * (len(inspect.signature(second.forward).parameters) - 1)
    if not _agree(first, nn.Sequential(up, activation), x):
        return None

    def with_identity(h: Tensor, *rest: Tensor) -> Tensor:
        products = down(h)
        second.set_submodule(down_name, nn.Identity())
        try:
            return second(products, *rest)
        finally:
            second.set_submodule(down_name, down)

    if not _agree(second, with_identity, hidden, *residual):
        return None
    prefix = f"{path}." if path else ""
    name = f"{prefix}{one}"
    return Block(name, (f"{name}.{up_name}", f"{prefix}{other}.{down_name}"), FeedForward(up, down, activation))


def _random_input(linear: nn.Module, width: int | None = None) -> Tensor:
    weight = weight_of(linear)
    width = in_out_features(linear)[0] if width is None else width
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    return x.to(weight.device, dtype)


@torch.no_grad()
def _agree(module: nn.Module, other: Callable[..., Any], *given: Tensor) -> bool:
    """Whether both compute the same in training mode, with the same noise."""
    modes = {part: part.training for part in module.modules()}
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]  # running statistics would move
    devices = [given[0].device] if given[0].is_cuda else []
    found: list[Any] = []
    try:
        module.train()
        with torch.random.fork_rng(devices):
            for call in (module, other):
                torch.manual_seed(0)
                found.append(call(*given))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it wants something else than hidden states
        return False
    finally:
        for part, mode in modes.items():
            part.training = mode
        for buffer, value in kept:
            buffer.copy_(value)
    one, two = found
    return isinstance(one, Tensor) and one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-5)
