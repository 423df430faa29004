"""Which layers of a model to adapt, and which cannot be."""

import difflib
import re
from collections.abc import Sequence

import torch
from torch import nn

from .mixture import Mixture, is_linear

ALL_LINEAR = "all-linear"
CROSS_FROM_ENCODER = ("k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "c_attn")
HEADS = re.compile(r"(.*\.)?(lm_head|embed_out|classifier|score|qa_outputs|head|heads|fc_head)(\..*)?")


def find(model: nn.Module, targets: str | Sequence[str], exclude: str | None = None) -> dict[str, nn.Module]:
    """The linear layers that ``targets`` names, by full name, in the order of the model.

    Args:
        targets: "all-linear" (all but output heads), a regular expression that must match the whole name, or a
            sequence of suffixes such as ``["q_proj", "mlp.down_proj"]``.
        exclude: a regular expression; whole names that match are left out.

    Raises:
        ValueError: nothing matches, a suffix matches nothing, or a layer cannot be adapted, with the reason.
    """
    if any(isinstance(module, Mixture) for module in model.modules()):
        raise ValueError("the model is adapted already: call adapter.remove() first, or adapt a fresh copy")
    linear = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if is_linear(module) and name
    }
    chosen = _choose(linear, targets)
    if exclude is not None:
        pattern = _compiled(exclude)
        chosen = {name: module for name, module in chosen.items() if not pattern.fullmatch(name)}
    if not chosen:
        raise ValueError(f"targets={targets!r} matches no linear layer{_nearest(targets, linear)}")
    for name, module in chosen.items():
        reason = obstacle(model, linear, name, module)
        if reason is not None:
            raise ValueError(f"{name} cannot be adapted: {reason}")
    return chosen


def _choose(linear: dict[str, nn.Module], targets: str | Sequence[str]) -> dict[str, nn.Module]:
    if targets == ALL_LINEAR:
        return {name: module for name, module in linear.items() if not HEADS.fullmatch(name)}
    if isinstance(targets, str):
        pattern = _compiled(targets)
        return {name: module for name, module in linear.items() if pattern.fullmatch(name)}
    for suffix in targets:
        if not any(_ends(name, suffix) for name in linear):
            raise ValueError(f"target {suffix!r} is the end of no linear layer's name{_nearest(suffix, linear)}")
    return {name: module for name, module in linear.items() if any(_ends(name, suffix) for suffix in targets)}


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; give a list for suffixes") from error


def _nearest(targets: str | Sequence[str], linear: dict[str, nn.Module]) -> str:
    if not linear:
        return ": the model has none"
    ends = sorted({name.rsplit(".", 1)[-1] if not name[-1].isdigit() else name for name in linear})
    wanted = targets if isinstance(targets, str) else " ".join(targets)
    near = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], ends, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} The model has layers that end in: {', '.join(ends[:12])}{', ...' if len(ends) > 12 else ''}"


def obstacle(model: nn.Module, linear: dict[str, nn.Module], name: str, module: nn.Module) -> str | None:
    """Why the layer cannot be adapted, with the cure; None if it can."""
    twins = [other for other, twin in linear.items() if twin is module and other != name]
    if twins:
        return f"it is the same module as {twins[0]}, and a reused module has no place of its own; use exclude="
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (a parametrisation such as weight_norm); remove that first"
    if weight.device.type == "meta":
        return "its weight is not in memory (meta device, offloaded); load the model first"
    if "." not in name:
        return None
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention multiplies with its weight and never calls it; leave it out with "
            "exclude=r'.*\\.out_proj', or use an attention whose projections are called"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer's inference fast path multiplies with its weight and never calls it; call "
            "torch.backends.mha.set_fastpath_enabled(False) before adapt()"
        )
    return None


def stream(name: str, model: nn.Module) -> str:
    """Which tokens the layer reads: "decoder" in the decoder of an encoder-decoder model, else "input".

    Cross-attention's keys and values are read from the encoder's tokens.
    """
    parts = name.lower().split(".")
    children = {child for path, _ in model.named_modules() for child in path.lower().split(".")}
    if "decoder" not in parts or "encoder" not in children:
        return "input"
    crosses = any("encdec" in part or "encoder_attn" in part or "cross" in part for part in parts)
    return "input" if crosses and parts[-1] in CROSS_FROM_ENCODER else "decoder"
