"""A DINOv2 backbone out of an ONNX file, as a plain folder for ``from_pretrained``.

The file holds a DINOv2-small that was fine-tuned for saliency, and the saliency decoder behind it. Only the backbone is
kept. PyTorch's exporter keeps the names of most weights; those of linear layers it stores transposed and nameless, so
their names are read off the nodes that multiply with them. The table of positions it stores in two parts.

Format: https://github.com/onnx/onnx/blob/main/docs/IR.md. Nothing here asks a hub for anything.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Dinov2Config

__all__ = ["DTYPE", "EXTRA", "FORMAT", "NEEDS", "convert"]

# Raise it when `convert` writes something else: it is in the name of the cached folder.
FORMAT = 1
DTYPE = "f32"
NEEDS = ("onnx", "transformers")
EXTRA = "hf,scenes"

BACKBONE = "backbone."
HEAD_WIDTH = 64  # of every DINOv2; the graph does not say it in one place


def convert(file: Path, into: Path) -> None:
    """Write config and fp32 weights of the backbone in ``file`` into the folder ``into``.

    Raises:
        ValueError: not a DINOv2 backbone with a plain MLP, as PyTorch exports it.
        OSError: the folder cannot be written.
    """
    import onnx
    from safetensors.torch import save

    weights = _weights(onnx.load(file).graph, file)
    _config(weights, file).save_pretrained(into)
    # not save_file: its error on a full disk is no OSError
    (into / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
    _check(into, file)


def _weights(graph: Any, file: Path) -> "dict[str, torch.Tensor]":
    import torch
    from onnx import numpy_helper

    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix(BACKBONE): w for name, w in stored.items() if name.startswith(BACKBONE)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module, _, _ = node.name.strip("/").rpartition("/")  # backbone/encoder/layer.0/mlp/fc1
            name = module.replace("/", ".").removeprefix(BACKBONE)
            weights[f"{name}.weight"] = stored[node.input[1]].t().contiguous()
    positions = [w for name, w in stored.items() if "::" in name and w.ndim == 3 and w.shape[0] == 1]
    positions.sort(key=lambda part: part.shape[1])  # that of the class token, then those of the patches
    if [part.shape[1] for part in positions[:1]] != [1] or len(positions) != 2:
        raise ValueError(f"{file} has no table of positions in two parts: it cannot be converted")
    weights["embeddings.position_embeddings"] = torch.cat(positions, 1)
    # used in its pre-training alone, and so not in the file
    weights["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[2])
    return weights


def _config(weights: "dict[str, torch.Tensor]", file: Path) -> "Dinov2Config":
    from transformers import Dinov2Config

    first = weights.get("encoder.layer.0.mlp.fc1.weight")
    patches = weights.get("embeddings.patch_embeddings.projection.weight")
    if first is None or patches is None:
        raise ValueError(f"{file} holds no DINOv2 backbone with a plain MLP: it cannot be converted")
    patch_size, width = patches.shape[-1], first.shape[1]
    return Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=width,
        mlp_ratio=first.shape[0] // width,
        num_hidden_layers=sum(name.endswith("mlp.fc1.weight") for name in weights),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        num_channels=patches.shape[1],
        patch_size=patch_size,
        image_size=patch_size * round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
    )


def _check(folder: Path, file: Path) -> None:
    """That ``transformers`` finds every weight of the model in the folder, and no other."""
    from transformers import Dinov2Model

    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    _, report = loaded
    odd = sorted(str(name) for names in report.values() for name in names)
    if odd:
        raise ValueError(f"{file} is no plain DINOv2, {odd[0]} is missing or too much: it cannot be converted")
