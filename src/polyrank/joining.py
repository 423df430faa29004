"""What joins an adapter later: one more task, and LoRAs that were trained alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .export.lora import CONFIG, read_lora
from .files import Fingerprint, difference, read_folder
from .methods import Method
from .methods.task_lora import TaskLinear
from .mixture import LowRankMixture, Mixture, Site, TaskExperts, TaskTable
from .saving import copy_weights, load_frozen, method_from


def task_parts(layer: nn.Module) -> dict[str, int]:
    """The names of a layer's weights that belong to one task, and that task's id."""
    return {
        f"{name}.rows.{task}": task
        for name, part in layer.named_modules(remove_duplicate=False)
        if isinstance(part, TaskTable)
        for task in range(len(part))
    }


@torch.no_grad()
def with_task(method: Method, layers: Mapping[str, Mixture], tasks: Sequence[str], task: str) -> dict[str, Mixture]:
    """Layers for one task more: all weights there were, bit for bit, and fresh ones of the new task's own.

    Raises:
        ValueError: another weight's size depends on the number of tasks.
    """
    grown = method.build({name: layer.base for name, layer in layers.items()}, [*tasks, task])
    for name, layer in layers.items():
        old, new = (dict(one.named_parameters(remove_duplicate=False)) for one in (layer, grown[name]))
        own = {key for key, index in task_parts(grown[name]).items() if index == len(tasks)}
        if new.keys() - own != old.keys() or any(p.shape != new[key].shape for key, p in old.items()):
            raise ValueError(f"{name}: {method} has weights whose size depends on the number of tasks: none can join")
        for key, p in old.items():
            if not key.startswith("base."):
                new[key].copy_(p)
                new[key].requires_grad_(p.requires_grad)
        buffers = dict(grown[name].named_buffers())
        for key, buffer in layer.named_buffers():
            if not key.startswith("base.") and buffer.shape == buffers[key].shape:
                buffers[key].copy_(buffer)
        grown[name].site = layer.site
        grown[name].train(layer.training)
    return grown


def saved_loras(
    folder: str | Path, layers: Mapping[str, Mixture], task: str, base: Fingerprint
) -> dict[str, tuple[Tensor, Tensor]]:
    """What a saved adapter, or a LoRA in PEFT's format, adds to each layer on a task: A (R, I), B (R, O), scale in B.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: of another base, other layers or other tasks, or no LoRA stands for it.
    """
    if (Path(folder) / CONFIG).is_file():
        return _pefts_loras(Path(folder), layers)
    tensors, manifest = read_folder(folder)
    if manifest.get("polyrank") != "adapter":
        raise ValueError(
            f"{folder} holds no adapter: give the folder that adapter.save() wrote (for a run: RUN/adapter)"
        )
    if (wrong := difference(manifest["base"], base)) is not None:
        raise ValueError(f"{folder} was trained on another base model: {wrong}")
    if set(manifest["layers"]) != set(layers):
        apart = min(set(manifest["layers"]) ^ set(layers))
        raise ValueError(f"{folder} adapts other layers, such as {apart}: train it with the same targets")
    tasks = manifest["tasks"]
    if task not in tasks and len(tasks) > 1:
        raise ValueError(f"{folder} knows the tasks {', '.join(tasks)}, and not {task!r}: give an adapter of one task")
    trained = method_from(manifest["method"]).build({name: layer.base for name, layer in layers.items()}, tasks)
    copy_weights(trained, tensors["adapter"])
    load_frozen(trained, tensors["frozen"], manifest["with_factors"])
    index = tasks.index(task) if task in tasks else 0
    for name, layer in trained.items():
        layer.site = Site(name)
    try:
        return {name: layer.task_lora(index) for name, layer in trained.items()}
    except ValueError as error:
        raise ValueError(f"{folder} is no LoRA: {error}") from error


def _pefts_loras(folder: Path, layers: Mapping[str, Mixture]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layers that the LoRA leaves out get none. Its names may begin with those of modules around the model here."""
    loras = read_lora(folder)
    first = next(iter(loras), "")
    around = next((first.removesuffix(name) for name in layers if first == name or first.endswith(f".{name}")), "")
    loras = {name.removeprefix(around): lora for name, lora in loras.items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in loras.keys() - layers.keys():
        raise ValueError(f"{folder} adapts {around}{name}, which this adapter leaves out: adapt with the same targets")
    for name, layer in layers.items():
        lora = loras.get(name)
        like, sizes = layer.weight, (layer.in_features, layer.out_features)
        a, b = (
            (like.new_zeros(0, size) for size in sizes)
            if lora is None
            else (lora.a.to(like.device), lora.b.to(like.device))
        )
        if (a.shape[1], b.shape[1]) != sizes:
            raise ValueError(
                f"{folder}: {name} is of a layer {a.shape[1]} -> {b.shape[1]}, here it is {sizes[0]} -> {sizes[1]}"
            )
        found[name] = (a, b)
    return found


def put_experts(layers: Mapping[str, Mixture], bank: Mapping[int, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Put LoRAs (task id -> layer -> A, B) where the layers keep one expert for each task.

    Raises:
        ValueError: the method has no such experts, or of a smaller rank.
    """
    for task, loras in bank.items():
        for name, (a, b) in loras.items():
            layer = layers[name]
            if not isinstance(layer, LowRankMixture | TaskLinear) or not isinstance(layer.experts, TaskExperts):
                raise ValueError(
                    f"{name}: this method has no bank of one expert for each task: take MoA, X-LoRA or TaskLoRA"
                )
            layer.experts.put(task, a, b / layer.scale)
