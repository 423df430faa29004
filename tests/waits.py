"""What makes the host wait for an accelerator, made an error, so that the CPU shows it too."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# the size of what they give, or a number, has to come to the host; or they look at an error code
WAITING = {
    aten._local_scalar_dense,  # item(), int(), float(), bool(), if, range, slices
    aten.is_nonzero,
    aten.equal,
    aten.allclose,
    aten.multinomial,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.unique_dim_consecutive,
    aten._linalg_check_errors,
    aten._linalg_svd,
    aten._linalg_eigh,
    aten.lift_fresh,  # torch.tensor(...): a copy from the host
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
BY_HAND = {Tensor.tolist: "tolist()", Tensor.numpy: "numpy()", Tensor.cpu: "cpu()"}  # no operator runs on the CPU


class _Operators(TorchDispatchMode):
    """Also those of the backward pass, and those inside of other operators."""

    paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, given = func.overloadpacket, kwargs or {}
        masks = packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        repeats = func is aten.repeat_interleave.Tensor and given.get("output_size") is None
        if not self.paused and (packet in WAITING or masks or repeats):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **given)


class _Calls(TorchFunctionMode):
    """What Python calls."""

    def __init__(self, operators: _Operators) -> None:
        self.operators = operators

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in BY_HAND:
            raise AssertionError(f"{BY_HAND[func]} makes the host wait for the device")
        if func is torch.nn.functional.one_hot:  # looks at its numbers on the CPU, and elsewhere only for their count
            assert len(args) + len(given) > 1, "one_hot without num_classes makes the host wait for the device"
            self.operators.paused = True
            try:
                return func(*args, **given)
            finally:
                self.operators.paused = False
        return func(*args, **given)


class NoWaiting:
    """``with NoWaiting():`` fails where the host would wait for the device."""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        operators = self.stack.enter_context(_Operators())
        self.stack.enter_context(_Calls(operators))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
