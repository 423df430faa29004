"""The frozen layers that can be adapted: ``nn.Linear``, its subclasses, and GPT-2's transposed ``Conv1D``."""

from torch import Tensor, nn


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, told by name: the core imports torch only."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight (O, I); a view for a transposed layer."""
    weight = module.get_parameter("weight")
    return weight.t() if _is_conv1d(module) else weight


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(I, O). A quantised weight is packed: its own shape does not tell."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    out_features, in_features = weight_of(module).shape
    return in_features, out_features


def is_plain(module: nn.Module) -> bool:
    """Whether the layer is its weight and bias alone: no subclass, hook, own forward, packed or sharded weight."""
    if not (type(module) is nn.Linear or _is_conv1d(module)) or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.is_floating_point()


def runs_primitives(module: nn.Module) -> bool:
    """Whether the layer is what ``base_shrink`` assumes: plain, frozen, and in memory."""
    if not is_plain(module):
        return False
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    return not weight.requires_grad and (bias is None or not bias.requires_grad) and weight.device.type != "meta"
