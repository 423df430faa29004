"""Feed-forward blocks of a model, found by what they compute: down(act(up x)), or gated, down(act(gate x) * up x).

No class is known by name. A module with two or three linear layers, and nothing else that has weights, is taken apart
and put together again as a ``FeedForward``, with small random layers in the place of its own: it is one if both give
the same on a random input in training mode, dropout included. In BERT and its like the parts are siblings: one module
ends with the activation, and the next one, which takes its output and a residual, begins with ``down``.
"""

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .mixture import FeedForward, in_out_features, is_linear, weight_of

WIDTH, HIDDEN = 5, 7  # of the layers that stand in while a module is tried


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
        ValueError: no block among them, or one of which not all linear layers are, or whose module has hooks.
    """
    mine = list(find(model, linears))
    if not mine:
        raise ValueError(f"{method} adapts feed-forward blocks, and {_none(model)}")
    for block in mine:
        missing = [name for name in block.linears if name not in linears]
        if missing:
            raise ValueError(
                f"{block.name} is a feed-forward block that {method} adapts as a whole, and the targets leave out "
                f"{', '.join(missing)}: target all of it, or none"
            )
        module = model.get_submodule(block.name)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError(
                f"{block.name} has hooks or a forward of its own, which a layer in its place would not run: remove "
                "them before adapt()"
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


def _none(model: nn.Module) -> str:
    found = next(find(model), None)
    if found is not None:
        names = ", ".join(found.linears)
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


def find(model: nn.Module, among: Collection[str] | None = None) -> Iterator[Block]:
    """Feed-forward blocks of a model, in its order: all, or those with a linear layer whose name is ``among``.

    A linear layer is in one block at most.
    """
    taken: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = {f"{prefix}{name}" for name, _ in module.named_modules()}
        if among is not None and inside.isdisjoint(among):
            continue
        for block in _candidates(path, module):
            names = {*block.linears}
            if names.isdisjoint(taken) and (among is None or not names.isdisjoint(among)):
                taken |= names
                yield block


def _candidates(path: str, module: nn.Module) -> Iterator[Block]:
    """The module itself, and neighbours among its children."""
    whole = _whole(path, module) if path else None  # the root has no place of its own
    if whole is not None:
        yield whole
    prefix = f"{path}." if path else ""
    for (one, first), (other, second) in itertools.pairwise(module.named_children()):
        pair = _siblings(f"{prefix}{one}", first, f"{prefix}{other}", second)
        if pair is not None:
            yield pair


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Its linear children, if whatever else it holds has no weights."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if is_linear(child)}
    owned = sum(1 for child in linears.values() for _ in child.parameters())
    return linears if owned == sum(1 for _ in module.parameters()) else {}


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


def _activations(module: nn.Module) -> list[nn.Module]:
    """The one that is a child, or those that a forward may call as functions."""
    found = [child for child in module.children() if not is_linear(child) and not _is_dropout(child)]
    if found:
        return found if len(found) == 1 else []
    return [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Sigmoid()]


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Identity)


def _whole(path: str, module: nn.Module) -> Block | None:
    """A module that is a block by itself: which linear layer plays which part is tried."""
    inside, activations = _linears(module), _activations(module)
    if len(inside) not in (2, 3) or _arguments(module) != 1:
        return None
    dropouts = [child for child in module.children() if _is_dropout(child)]
    places = [*dict.fromkeys(itertools.permutations([*dropouts, None, None], 2))]
    tried = [*itertools.product(activations, places)]
    for names in itertools.permutations(inside):
        if in_out_features(inside[names[0]])[1] != in_out_features(inside[names[-1]])[0]:
            continue
        sizes = dict.fromkeys(names[:-1], (WIDTH, HIDDEN)) | {names[-1]: (HIDDEN, WIDTH)}
        with _stand_ins(module, sizes) as small:
            x = _random(small[names[0]])
            fits = next((one for one in tried if _agree(module, _parts(small, names, *one), x)), None)
        if fits is not None:
            return Block(path, tuple(f"{path}.{name}" for name in inside), _parts(inside, names, *fits))
    return None


def _parts(
    linears: Mapping[str, nn.Module],
    names: tuple[str, ...],
    activation: nn.Module,
    dropouts: tuple[nn.Module | None, ...],
) -> FeedForward:
    gate = linears[names[1]] if len(names) == 3 else None
    return FeedForward(linears[names[0]], linears[names[-1]], activation, gate, *dropouts)


def _siblings(one: str, first: nn.Module, other: str, second: nn.Module) -> Block | None:
    """Two neighbours: act(up h), and one that takes its output and a residual, and begins with down."""
    heads, tails = _linears(first), {name: child for name, child in second.named_children() if is_linear(child)}
    if len(heads) != 1 or len(tails) != 1 or _arguments(first) != 1 or _arguments(second) != 2:
        return None
    (up_name, up), (down_name, down) = next(iter(heads.items())), next(iter(tails.items()))
    out_features = in_out_features(down)[1]
    if in_out_features(up)[1] != in_out_features(down)[0]:
        return None
    with _stand_ins(first, {up_name: (WIDTH, HIDDEN)}) as small:
        x, tried = _random(small[up_name]), _activations(first)
        fits = [one for one in tried if _agree(first, nn.Sequential(small[up_name], one), x)]
    if not fits:
        return None
    with _stand_ins(second, {down_name: (HIDDEN, out_features)}) as small:
        hidden = _random(small[down_name])
        residual = torch.randn(1, 3, out_features, generator=torch.Generator().manual_seed(1)).to(hidden)

        def with_identity(h: Tensor, rest: Tensor) -> Tensor:
            second.set_submodule(down_name, nn.Identity())
            try:
                return second(small[down_name](h), rest)
            finally:
                second.set_submodule(down_name, small[down_name])

        if not _agree(second, with_identity, hidden, residual):
            return None
    return Block(one, (f"{one}.{up_name}", f"{other}.{down_name}"), FeedForward(up, down, fits[0]))


@contextmanager
def _stand_ins(module: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> Iterator[dict[str, nn.Module]]:
    """Small random layers in the place of a module's own, whatever those hold: zeros, packed or 16-bit weights."""
    own = {name: module.get_submodule(name) for name in sizes}
    devices = [weight_of(linear).device for linear in own.values()]
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        torch.manual_seed(0)
        small: dict[str, nn.Module] = {
            name: nn.Linear(*size, device=device) for (name, size), device in zip(sizes.items(), devices, strict=True)
        }
    try:
        for name, linear in small.items():
            module.set_submodule(name, linear)
        yield small
    finally:
        for name, linear in own.items():
            module.set_submodule(name, linear)


def _random(linear: nn.Module) -> Tensor:
    x = torch.randn(1, 3, in_out_features(linear)[0], generator=torch.Generator().manual_seed(0))
    return x.to(weight_of(linear))


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
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
        return False  # it wants something else than hidden states
    finally:
        for part, mode in modes.items():
            part.training = mode
        for buffer, value in kept:
            buffer.copy_(value)
    one, two = found
    if not isinstance(one, Tensor) or one.shape != two.shape:
        return False
    return bool((one - two).norm() <= 1e-4 * one.norm())
