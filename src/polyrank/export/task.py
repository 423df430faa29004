"""Exporting one task: what it changes, written, read again, and compared with the mixture."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..files import new_folder, write_text
from ..mixture import Mixture, exactly, is_linear, weight_of
from .approximate import held
from .check import Difference, check, outputs, refuse
from .lora import LoRA, beside, common_rank, fitted, of_change, read_lora, write_lora

Format = Literal["lora", "dense"]
Say = Callable[[str], None]
NOTE = "polyrank.json"


class Adapted(Protocol):
    """What exporting needs of an adapter."""

    model: nn.Module
    layers: dict[str, Mixture]

    def task_ids(self, tasks: str) -> Tensor: ...

    def on(self, tasks: str) -> AbstractContextManager[None]: ...

    def off(self) -> AbstractContextManager[nn.Module]: ...

    def merged(self, task: str, gates: Mapping[str, Tensor] | None = None) -> AbstractContextManager[nn.Module]: ...

    def lost_by_merging(self, task: str) -> dict[str, float]: ...


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the mixture."""

    folder: Path
    format: Format
    task: str
    difference: Difference
    rank: int | None = None  # the one rank of the file
    predicted: float = 0.0  # the worst relative error of a layer's change, where a rank was asked for
    lost: float = 0.0  # the median share of the change that rounding of a plain model's weights lost
    approximate: str | None = None


def export(
    adapter: Adapted,
    folder: str | Path,
    task: str,
    format: Format,
    *,
    inputs: Mapping[str, Tensor],
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    gates: Mapping[str, Tensor] | None = None,
    note: Mapping[str, Any],
    also: Callable[[Path], None] = lambda _: None,
    say: Say = lambda _: None,
) -> Exported:
    """See ``Adapter.export``. ``note``: what stands in the files about their origin; ``also``: writes more files."""
    exact = max_rank is None and gates is None
    if gates is None:
        for layer in adapter.layers.values():
            layer.refuse_if_input_routed()
    with adapter.on(task):
        wanted = outputs(adapter.model, inputs)
    if format == "dense":
        found = _dense(adapter, Path(folder), task, inputs, wanted, gates, note, also, say)
    else:
        found = _lora(adapter, Path(folder), task, inputs, wanted, max_rank, dtype, gates, note, also, say)
    say(f"{found.folder}: {found.difference}{'' if exact else ' (approximate, as asked)'}")
    return found


def _lora(
    adapter: Adapted,
    folder: Path,
    task: str,
    inputs: Mapping[str, Tensor],
    wanted: list[Tensor],
    max_rank: int | None,
    dtype: torch.dtype | None,
    gates: Mapping[str, Tensor] | None,
    note: Mapping[str, Any],
    also: Callable[[Path], None],
    say: Say,
) -> Exported:
    loras = loras_of(adapter, task, max_rank, dtype or torch.float32, gates)
    for line in truncation(loras, max_rank):
        say(line)
    with new_folder(folder) as aside:
        with adapter.off() as model:
            modules = dict(model.named_modules())
            others = [name for name, one in modules.items() if is_linear(one) and name not in loras]
            transposed = not isinstance(modules[next(iter(loras))], nn.Linear)
            write_lora(aside, loras, others=others, config={"fan_in_fan_out": transposed, **_origin(model)})
            with beside(modules, loras):
                meant = outputs(model, inputs)
            with beside(modules, read_lora(aside)):
                found = outputs(model, inputs)
        difference = check(wanted, found, next(iter(loras.values())).a.dtype)
        refuse(check(meant, found, difference.coarsest), "what was read again")
        if gates is None and all(lora.predicted == 0 for lora in loras.values()):
            refuse(difference, "the LoRA")
        also(aside)
        worst = max(lora.predicted for lora in loras.values())
        _write_note(aside, {**note, "format": "lora", "task": task}, difference, gates, worst)
    rank = common_rank(loras)
    return Exported(folder, "lora", task, difference, rank, worst, approximate=_approximate(gates))


def _dense(
    adapter: Adapted,
    folder: Path,
    task: str,
    inputs: Mapping[str, Tensor],
    wanted: list[Tensor],
    gates: Mapping[str, Tensor] | None,
    note: Mapping[str, Any],
    also: Callable[[Path], None],
    say: Say,
) -> Exported:
    model: Any = adapter.model
    lost = median(adapter.lost_by_merging(task).values() or [0.0]) if gates is None else 0.0
    if lost:
        say(f"rounding to the base's dtype loses {100 * lost:.1f} % of the change in the median of the layers; "
            "load the base in 32 bits to keep it")  # fmt: skip
    with new_folder(folder) as aside:
        with adapter.merged(task, gates):
            _save(model, aside)
        again = type(model).from_pretrained(aside, dtype="auto").to(model.device)
        difference = check(wanted, outputs(again, inputs), next(model.parameters()).dtype)
        del again
        if gates is None:
            refuse(difference, "the plain model")
        also(aside)
        _write_note(aside, {**note, "format": "dense", "task": task}, difference, gates, 0.0)
    return Exported(folder, "dense", task, difference, lost=lost, approximate=_approximate(gates))


def _save(model: Any, folder: Path) -> None:
    try:
        save = model.save_pretrained
    except AttributeError as error:
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained: adapter.merge(task) makes it the plain model of a task, "
            "whose state_dict() you can save"
        ) from error
    save(folder)


def loras_of(
    adapter: Adapted, task: str, max_rank: int | None, dtype: torch.dtype, gates: Mapping[str, Tensor] | None
) -> dict[str, LoRA]:
    """Of each adapted linear layer, what the task adds.

    Raises:
        ValueError: a gate that depends on the input, without ``gates``; or a change of full rank, without ``max_rank``.
    """
    index = int(adapter.task_ids(task)[0])
    with adapter.off() as model:
        names = {module: name for name, module in model.named_modules()}
    loras: dict[str, LoRA] = {}
    for name, layer in adapter.layers.items():
        with exactly(weight_of(layer.frozen()[0])):
            change = _change(layer, index, None if gates is None else gates[name], max_rank)
        for base, new in change:
            if isinstance(new, tuple):
                loras[names[base]] = fitted(*new, max_rank, dtype)
            elif max_rank is not None:
                loras[names[base]] = of_change(new - weight_of(base).to(new), max_rank, dtype)
            else:
                raise ValueError(f"{name}: its change has full rank and is no LoRA: give max_rank, or export dense")
    return loras


def _change(
    layer: Mixture, index: int, gate: Tensor | None, max_rank: int | None
) -> list[tuple[nn.Module, Tensor | tuple[Tensor, Tensor]]]:
    """Of each part, the A and B that are added to it, or its new weight."""
    if gate is not None:
        return [(layer.base, held(layer, gate, index))]
    try:
        return [(base, (a, b)) for base, a, b in layer.task_loras(index)]
    except ValueError:
        if max_rank is None:
            raise
    return [(base, weight) for base, weight in layer.task_weights(index)]


def truncation(loras: Mapping[str, LoRA], max_rank: int | None) -> Iterator[str]:
    """What cutting to ``max_rank`` costs, in words."""
    rank = common_rank(loras)
    yield f"rank {rank} in all layers: an engine needs a slot of it (vLLM: --max-lora-rank {rank})"
    cut = {name: lora for name, lora in loras.items() if lora.predicted}
    if max_rank is None:
        return
    if not cut:
        yield f"no layer's change has a rank over {max_rank}: nothing was cut"
        return
    worst = max(cut, key=lambda name: cut[name].predicted)
    middle = median(lora.predicted for lora in loras.values())
    yield (
        f"cut to rank {max_rank}: relative error of the change, predicted / measured, {cut[worst].predicted:.3e} / "
        f"{cut[worst].measured:.3e} in the worst layer ({worst}), {middle:.3e} in the median of {len(loras)}"
    )


def _origin(model: nn.Module) -> dict[str, Any]:
    """What PEFT wants to know of a Hugging Face model; of another, nothing."""
    config: Any = model.config if isinstance(model, nn.Module) and "config" in vars(model) else None
    if config is None:
        return {"task_type": None, "base_model_name_or_path": None}
    name = type(model).__name__
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    kind = next((kind for end, kind in kinds.items() if name.endswith(end)), None)
    return {"task_type": kind, "base_model_name_or_path": config._name_or_path or None}


def _approximate(gates: Mapping[str, Tensor] | None) -> str | None:
    return None if gates is None else "mean-gate"


def _write_note(
    folder: Path, note: Mapping[str, Any], difference: Difference, gates: Mapping[str, Tensor] | None, cut: float
) -> None:
    entries = {
        **note,
        "approximate": _approximate(gates),
        "truncation_error": cut,
        "max_difference": difference.most,
        "max_output": difference.largest,
    }
    write_text(folder / NOTE, json.dumps(entries, indent=1))
