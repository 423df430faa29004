"""What is written is read again and run: its outputs are those of the mixture, or the export fails."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# of the largest output; in 16 bits, rounding of every layer adds up
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Difference:
    """Of two models' outputs on the same inputs."""

    most: float  # max |y - y'|
    largest: float  # max |y|
    coarsest: torch.dtype

    @property
    def allowed(self) -> float:
        return TOLERANCE[self.coarsest] * max(1.0, self.largest)

    def __str__(self) -> str:
        return f"max |y_mixture - y_export| = {self.most:.2e} where max |y| = {self.largest:.3g}"


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The hidden states or logits that a model gives, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        found = model(**inputs)
    finally:
        model.train(training)
    values = [found] if isinstance(found, Tensor) else found.values() if isinstance(found, Mapping) else found
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if not tensors:
        raise ValueError(f"{type(model).__name__} gave no output to compare: give inputs for which it does")
    return tensors


def check(wanted: list[Tensor], found: list[Tensor], stored: torch.dtype) -> Difference:
    """
    Args:
        stored: the dtype of what was written.
    """
    pairs = list(zip(wanted, found, strict=True))
    coarsest = max({stored, *(y.dtype for y in wanted)}, key=lambda dtype: torch.finfo(dtype).eps)
    most = max(float((y.double() - z.to(y.device).double()).abs().max()) for y, z in pairs)
    return Difference(most, max(float(y.abs().max()) for y in wanted), coarsest)


def refuse(difference: Difference, what: str) -> None:
    """
    Raises:
        ValueError: more than rounding lies between the two.
    """
    if not difference.most <= difference.allowed:
        raise ValueError(
            f"{what} does not compute what the mixture computes: {difference}, allowed {difference.allowed:.1e}; "
            "nothing was written. Is the model deterministic, and are the base's weights those that it was trained on?"
        )
