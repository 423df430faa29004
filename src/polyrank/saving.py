"""What an adapter's files say beside its weights: the method, and the frozen parts that were computed from the base.

MoORE's weights belong to singular directions in a certain order. The files keep a projection of those directions, and
an adapter is refused where the factorisation of the same base comes out differently.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .methods import METHODS, Method
from .mixture import Mixture

SLACK = 0.01  # of the largest entry: far above rounding, far below a swapped or mirrored direction


def method_fields(method: Method) -> dict[str, Any]:
    """Name and hyper-parameters of a method, for JSON."""
    known = {kind: name for name, kind in METHODS.items()}
    name = known.get(type(method), f"{type(method).__module__}:{type(method).__qualname__}")
    return {"name": name, **asdict(method)}  # type: ignore[call-overload]


def method_from(fields: Mapping[str, Any]) -> Method:
    """The method that ``method_fields`` described.

    Raises:
        ValueError: it does not come with polyrank, or its fields are not valid; code is never imported from a file.
    """
    name, rest = fields["name"], {key: value for key, value in fields.items() if key != "name"}
    if name not in METHODS:
        raise ValueError(
            f"the adapter's method {name!r} does not come with polyrank: pass it, "
            "Adapter.load(folder, model, method=...)"
        )
    return METHODS[name](**rest)


def named_weights(layers: Mapping[str, Mixture]) -> Iterator[tuple[str, nn.Parameter]]:
    """All the layers' own weights, each once: also those that no gradient trains, and those that are frozen."""
    seen: set[nn.Parameter] = set()
    for name, layer in layers.items():
        for key, p in layer.named_parameters():
            if not key.startswith("base.") and p not in seen:
                seen.add(p)
                yield f"{name}.{key}", p


@torch.no_grad()
def copy_weights(layers: Mapping[str, Mixture], state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the layers, all of it or nothing.

    Raises:
        ValueError: a missing, extra or misshapen tensor, named.
    """
    own = dict(named_weights(layers))
    for name in own.keys() - state.keys():
        raise ValueError(f"the adapter's weights lack {name}: they belong to another method, target or version")
    for name in state.keys() - own.keys():
        raise ValueError(
            f"the adapter's weights have {name}, which this adapter does not: another method, target or version"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this adapter needs {tuple(own[name].shape)}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def frozen_parts(layers: Mapping[str, Mixture]) -> dict[str, Tensor]:
    """The layers' buffers by name, those of the base left out."""
    return {
        f"{name}.{key}": buffer
        for name, layer in layers.items()
        for key, buffer in layer.named_buffers()
        if not key.startswith("base.")
    }


def projection(frozen: Tensor) -> Tensor:
    """A vector that tells a matrix from one with swapped or turned directions: its product with a fixed wave."""
    if frozen.ndim != 2:
        return frozen.float()
    long = frozen.float() if frozen.shape[0] >= frozen.shape[1] else frozen.float().t()
    return torch.cos(torch.arange(len(long), dtype=torch.float32, device=long.device) * 0.7 + 0.3) @ long


@torch.no_grad()
def load_frozen(layers: Mapping[str, Mixture], saved: Mapping[str, Tensor], whole: bool) -> None:
    """Copy whole saved parts into the layers; of projections, check that the layers' own parts have the same.

    Raises:
        ValueError: a missing or misshapen part, or directions that came out differently, named.
    """
    for name, buffer in frozen_parts(layers).items():
        if name not in saved:
            raise ValueError(f"the adapter's frozen parts lack {name}: they belong to another method or version")
        here, there = (buffer if whole else projection(buffer)), saved[name].to(buffer.device)
        if here.shape != there.shape:
            raise ValueError(f"{name} has shape {tuple(there.shape)}, this base gives {tuple(here.shape)}")
        if whole:
            buffer.copy_(there)
        elif float((here - there).abs().max()) > SLACK * float(there.abs().max()):
            raise ValueError(
                f"{name} comes out differently on this machine (near-equal singular values may swap), and the "
                "adapter's rows belong to the saved ones: where it was trained, save it with "
                "adapter.save(folder, with_factors=True)"
            )
