"""A gate that looks at the input, held fixed at its mean: the nearest to a merged weight that such a layer has."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.singular import SingularLinear
from ..mixture import Mixture, MixtureLinear, exactly, weight_of


@torch.no_grad()
def gate_means(
    model: nn.Module, layers: Mapping[str, Mixture], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The mean weights (E,) of each layer's gate over the tokens of ``batches`` that are no padding.

    Run it where the task is fixed.

    Raises:
        ValueError: a layer without such a gate, or no batch.
    """
    for name, layer in layers.items():
        if not isinstance(layer, MixtureLinear | SingularLinear):
            raise ValueError(f"{name}: {type(layer).__name__} has no gate whose mean stands for it: export a task of "
                             "another method, or serve the mixture itself")  # fmt: skip
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    with _watched(layers, sums, counts):
        for batch in batches:
            model(**batch)
    if not sums:
        raise ValueError("the mean of a gate needs at least one batch of examples")
    return {name: total / counts[name] for name, total in sums.items()}


@contextmanager
def _watched(layers: Mapping[str, Mixture], sums: dict[str, Tensor], counts: dict[str, float]) -> Iterator[None]:
    def watch(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, MixtureLinear | SingularLinear)
        x, name = args[0], layer.site.name
        gate = layer.gate_of(x).double()
        mask = layer.site.mask(x) if gate.shape[:-1] == x.shape[:-1] else None  # one of a sample has no padding
        gate = gate.flatten(0, -2) if mask is None else gate.reshape(-1, gate.shape[-1])[mask.reshape(-1) != 0]
        sums[name] = sums.get(name, 0) + gate.sum(0)
        counts[name] = counts.get(name, 0) + len(gate)

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def held(layer: Mixture, gate: Tensor, task: int) -> tuple[Tensor, Tensor] | Tensor:
    """A (R, I) and B (R, O) of what the layer adds with its gate held fixed, or the weight (O, I) that it then is."""
    if isinstance(layer, SingularLinear):
        return layer.weight_at(gate.to(layer.sigma))
    assert isinstance(layer, MixtureLinear)
    return layer.lora_at(gate, task)


def task_weights(
    layers: Mapping[str, Mixture], task: int, gates: Mapping[str, Tensor] | None
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each frozen linear layer and the one weight (O, I) that equals it on a task, or with its gate held fixed.

    Raises:
        ValueError: a gate that depends on the input, and none to hold it at.
    """
    for name, layer in layers.items():
        with exactly(weight_of(layer.frozen()[0])):
            found = layer.task_weights(task) if gates is None else held(layer, gates[name], task)
        if isinstance(found, list):
            yield from found
            continue
        if isinstance(found, Tensor):
            yield layer.base, found
        else:
            a, b = found
            yield layer.base, weight_of(layer.base).to(a) + b.t() @ a
