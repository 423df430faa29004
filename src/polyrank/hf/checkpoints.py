"""An adapter in a Trainer's checkpoint folder, and back: no copy of the base, nothing pickled.

CHECKPOINT/adapter/    what adapter.save writes
CHECKPOINT/trained/    what else of the model was trained, such as a head; only where there is any
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from polyrank.adapt import Adapter
from polyrank.files import difference, read_folder, write_folder
from polyrank.methods import Method
from polyrank.saving import load_frozen, method_fields

ADAPTER, TRAINED = "adapter", "trained"


def other_trained(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What a training changes beside the adapter: other weights with gradients, and the statistics of batch norms."""
    own = {p for _, p in adapter.named_parameters()}
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in own}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found |= {f"{name}.{key}": buffer for key, buffer in module.named_buffers(recurse=False)}
    return found


def save_into(folder: Path, model: nn.Module, adapter: Adapter) -> None:
    """
    Raises:
        ValueError: weights that are not finite.
        FileExistsError: something else stands there.
    """
    adapter.save(folder / ADAPTER)
    if rest := other_trained(model, adapter):
        tensors = {name: tensor.detach() for name, tensor in rest.items()}
        write_folder(folder / TRAINED, {TRAINED: tensors}, {"polyrank": TRAINED})


def restore_from(folder: Path, model: nn.Module, adapter: Adapter) -> None:
    """Copy a checkpoint's weights into the adapter and the model that are being trained.

    Raises:
        FileNotFoundError: no checkpoint of this trainer there.
        ValueError: another base, method, or list of tasks; damaged files.
    """
    if not (folder / ADAPTER).is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder {ADAPTER!r}: give a checkpoint that a PolyrankTrainerMixin wrote, such as "
            "OUTPUT_DIR/checkpoint-100"
        )
    tensors, manifest = read_folder(folder / ADAPTER)
    here = {"method": method_fields(adapter.method), "tasks": list(adapter.tasks)}
    for key, value in here.items():
        if manifest.get(key) != json.loads(json.dumps(value)):  # as the manifest has it: lists for tuples
            raise ValueError(
                f"{folder} was trained with the {key} {manifest.get(key)}, this adapter has {value}: resume with what "
                "it was started with, or train anew in another output_dir"
            )
    wrong = difference(manifest["base"], adapter.base_fingerprint)
    if wrong is not None:
        raise ValueError(f"{folder} was trained on another base model: {wrong}; load the base it was trained on")
    adapter.load_state_dict(tensors["adapter"])
    load_frozen(adapter.layers, tensors["frozen"], manifest["with_factors"])
    _restore_others(folder, model)


def load_checkpoint(folder: str | Path, model: nn.Module, method: Method | None = None) -> Adapter:
    """Put a checkpoint into a fresh base model: its adapter, and what else was trained.

    Args:
        model: with the weights that it had before it was adapted, a new head's first values included.
        method: as for ``Adapter.load``.

    Raises:
        FileNotFoundError: no checkpoint of this trainer there.
        ValueError: damaged files, or another base model.
    """
    folder = Path(folder)
    adapter = Adapter.load(folder / ADAPTER, model, method)
    _restore_others(folder, model)
    return adapter


@torch.no_grad()
def _restore_others(folder: Path, model: nn.Module) -> None:
    if not (folder / TRAINED).is_dir():
        return
    saved = read_folder(folder / TRAINED)[0][TRAINED]
    here = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in saved.items():
        if name not in here or here[name].shape != tensor.shape:
            raise ValueError(
                f"{folder / TRAINED} has {name} {tuple(tensor.shape)}, which the model does not: load its base"
            )
    for name, tensor in saved.items():
        here[name].copy_(tensor)
