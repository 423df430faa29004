"""The change of one task as LoRAs, and their files: the part of PEFT's format that every engine reads the same way.

One rank for all layers, padded with zeros to one that engines have slots for; lora_alpha equal to it, the scale in B;
no patterns by layer, which some engines ignore. Where a rank is asked for, the best LoRA of that rank stands for the
change: its error is known before anything is written, because the change is a product of thin matrices.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SLOTS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM has slots for


@dataclass(frozen=True)
class LoRA:
    """What one layer adds: B' A, with A (R, I) and B (R, O), the scale in B."""

    a: Tensor
    b: Tensor
    predicted: float = 0.0  # ||B' A - change|| / ||change||, from the singular values that were cut
    measured: float = 0.0  # the same of these very tensors, in their dtype

    @property
    def rank(self) -> int:
        return len(self.a)


@torch.no_grad()
def fitted(a: Tensor, b: Tensor, max_rank: int | None, dtype: torch.dtype) -> LoRA:
    """The LoRA without the ranks that add nothing; of more than ``max_rank``, the best of that rank.

    B' A = (Q_b R_b) (Q_a R_a)', and the SVD of the small R_b R_a' is that of the whole: no (O, I) matrix is made.
    """
    used = (a != 0).any(1) & (b != 0).any(1)
    a, b = a[used].double().cpu(), b[used].double().cpu()
    predicted, whole = 0.0, (a, b)
    if max_rank is not None and len(a) > max_rank:
        (qa, ra), (qb, rb) = torch.linalg.qr(a.t()), torch.linalg.qr(b.t())
        u, sigma, vt = torch.linalg.svd(rb @ ra.t())
        root = sigma[:max_rank].sqrt()
        a, b = (root[:, None] * vt[:max_rank]) @ qa.t(), (root[:, None] * u.t()[:max_rank]) @ qb.t()
        predicted = float(sigma[max_rank:].norm() / sigma.norm()) if sigma.any() else 0.0
    a, b = a.to(dtype), b.to(dtype)
    return LoRA(a, b, predicted, _apart(*whole, a.double(), b.double()))


def _apart(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """||B' A - D' C|| / ||B' A|| in the Frobenius norm."""
    both = _norm(torch.cat([a, c]), torch.cat([b, -d]))
    return both / size if (size := _norm(a, b)) else both


def _norm(a: Tensor, b: Tensor) -> float:
    return float((torch.linalg.qr(b.t())[1] @ torch.linalg.qr(a.t())[1].t()).norm())


@torch.no_grad()
def of_change(change: Tensor, rank: int, dtype: torch.dtype) -> LoRA:
    """The best LoRA of a rank for a change (O, I) of full rank."""
    exact = change.double().cpu()
    u, sigma, vt = torch.linalg.svd(exact, full_matrices=False)
    root = sigma[:rank, None].sqrt()
    a, b = (root * vt[:rank]).to(dtype), (root * u.t()[:rank]).to(dtype)
    size = float(sigma.norm())
    measured = float((b.double().t() @ a.double() - exact).norm()) / size if size else 0.0
    return LoRA(a, b, float(sigma[rank:].norm()) / size if size else 0.0, measured)


def common_rank(loras: Mapping[str, LoRA]) -> int:
    """The one rank of the files: the smallest that engines have slots for and no layer exceeds."""
    most = max(lora.rank for lora in loras.values())
    return next((slot for slot in SLOTS if slot >= most), most)


def write_lora(folder: Path, loras: Mapping[str, LoRA], *, others: Sequence[str], config: Mapping[str, Any]) -> None:
    """Put PEFT's two files into ``folder``.

    Args:
        loras: by the full name of the layer.
        others: the names of the model's other layers, which no target may match.
        config: "task_type", "base_model_name_or_path" and "fan_in_fan_out".
    """
    rank = common_rank(loras)
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        missing = (0, 0, 0, rank - lora.rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = F.pad(lora.a, missing).contiguous()  # (r, I)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = F.pad(lora.b, missing).t().contiguous()  # (O, r)
    safetensors.torch.save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    entries = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": target_modules(list(loras), others),
        **config,
    }
    (folder / CONFIG).write_text(json.dumps(entries, indent=2), encoding="utf-8")


def target_modules(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The ends of the names where they tell the layers from all others, as engines like it; else the names in full."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    taken = any(other == end or other.endswith(f".{end}") for other in others for end in ends)
    return list(names) if taken else ends


def read_lora(folder: str | Path) -> dict[str, LoRA]:
    """What the LoRAs in PEFT's format add, by layer, scales in B.

    Raises:
        FileNotFoundError: no such files there.
        ValueError: another kind of adapter, or one that is more than LoRAs of linear layers.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: give the folder of a LoRA in PEFT's format")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    for key, plain in {"peft_type": "LORA", "use_dora": False, "bias": "none", "lora_bias": False}.items():
        if config.get(key, plain) != plain:
            raise ValueError(f"{folder}: {key} is {config[key]!r}, and only plain LoRAs can be read ({plain!r})")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, dot, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not dot or which not in ("lora_A", "lora_B") or tensor.ndim != 2 or not tensor.isfinite().all():
            raise ValueError(
                f"{folder}: {key} {tuple(tensor.shape)} is no finite A or B of a linear layer: save the LoRA without "
                "modules_to_save, embeddings and convolutions"
            )
        pairs.setdefault(name, {})[which] = tensor
    return {name: _scaled(folder, name, pair, config) for name, pair in pairs.items()}


def _scaled(folder: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRA:
    if pair.keys() != {"lora_A", "lora_B"} or len(pair["lora_A"]) != pair["lora_B"].shape[1]:
        raise ValueError(f"{folder}: {name} has no A and B of one rank: the file is incomplete")
    a, b = pair["lora_A"].float(), pair["lora_B"].float().t()
    alpha = _of_layer(name, config.get("alpha_pattern"), config["lora_alpha"])
    rank = _of_layer(name, config.get("rank_pattern"), config["r"])
    return LoRA(a, b * (alpha / (rank**0.5 if config.get("use_rslora") else rank)))


def _of_layer(name: str, pattern: Mapping[str, float] | None, default: float) -> float:
    """PEFT's patterns: a key is a regular expression for the end of a layer's name."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


@contextmanager
def beside(modules: Mapping[str, nn.Module], loras: Mapping[str, LoRA]) -> Iterator[None]:
    """The layers with their LoRAs, as an engine computes them: y = layer(x) + x A' B."""

    def hook(lora: LoRA, device: torch.device) -> Any:
        a, b = lora.a.to(device), lora.b.t().to(device)

        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            return y + F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)

        return add

    hooks = [
        modules[name].register_forward_hook(hook(lora, next(modules[name].parameters()).device))
        for name, lora in loras.items()
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
