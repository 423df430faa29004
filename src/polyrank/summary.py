"""What an adapter weighs, costs and allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .methods import Method
from .mixture import Mixture


@dataclass(frozen=True)
class Summary:
    """Parameter counts, and operations for one token (or patch) through the adapted layers."""

    method: Method
    tasks: tuple[str, ...]
    num_layers: int
    base_parameters: int
    trainable_parameters: int
    active_parameters: int  # of the trainable ones, those that work on one token
    base_flops_per_token: int  # multiply-adds x 2 of the adapted layers alone
    flops_per_token: int
    merges: str

    def __str__(self) -> str:
        share = self.trainable_parameters / max(1, self.base_parameters)
        cost = self.flops_per_token / max(1, self.base_flops_per_token)
        return "\n".join(
            [
                f"method                {self.method}",
                f"tasks                 {len(self.tasks)}: {', '.join(self.tasks)}",
                f"adapted layers        {self.num_layers}",
                f"base parameters       {self.base_parameters:,}",
                f"trainable parameters  {self.trainable_parameters:,} ({share:.2%} of the base)",
                f"active for one token  {self.active_parameters:,}",
                f"FLOPs per token       {self.flops_per_token:,} in the adapted layers, {cost:.2f} x the base's",
                f"merges                {self.merges}",
            ]
        )


def summarise(model: nn.Module, method: Method, tasks: Sequence[str], layers: Mapping[str, Mixture]) -> Summary:
    own = {p for layer in layers.values() for k, p in layer.named_parameters() if not k.startswith("base.")}
    if any(layer.reads_input for layer in layers.values()):
        merges = "no: the gate reads the input"
        merges += f", until {method.settles:.0%} of the training, when it has faded" if method.settles else ""
    else:
        merges = (
            "exactly, a weight for each task"
            if any("task" in layer.reads for layer in layers.values())
            else "exactly, one weight for all tasks"
        )
    return Summary(
        method=method,
        tasks=tuple(tasks),
        num_layers=len(layers),
        base_parameters=sum(p.numel() for p in model.parameters() if p not in own),
        trainable_parameters=sum(p.numel() for p in own if p.requires_grad),
        active_parameters=sum(layer.active_parameters() for layer in layers.values()),
        base_flops_per_token=sum(layer.base_flops_per_token() for layer in layers.values()),
        flops_per_token=sum(layer.flops_per_token() for layer in layers.values()),
        merges=merges,
    )
