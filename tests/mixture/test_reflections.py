"""The product of reflections in its two thin factors, and gradients written out by hand."""

import pytest
import torch
from torch.testing import assert_close

from polyrank.mixture import Reflections


def made(num, width=7, start=False):
    torch.manual_seed(0)
    turn = Reflections(width, num, torch.device("cpu"), torch.float64)
    if not start:
        torch.nn.init.normal_(turn.vectors)
    return turn


@pytest.mark.parametrize("num", [2, 4, 6])
def test_is_the_product_of_the_reflections(num):
    turn, p = made(num), torch.eye(7).double()
    for v in turn.vectors.detach():
        p = p @ (torch.eye(7).double() - 2 * v.outer(v) / v.dot(v))
    assert_close(turn.matrix(), p, atol=1e-12, rtol=1e-12)
    assert_close(p @ p.T, torch.eye(7).double(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num", [2, 6])
@pytest.mark.parametrize("start", [True, False])
def test_gradients_of_both_factors(num, start):
    turn = made(num, start=start)

    def factors(v):
        return torch.func.functional_call(_Factors(turn), {"turn.vectors": v}, ())

    assert torch.autograd.gradcheck(factors, (turn.vectors.detach().clone().requires_grad_(),))


class _Factors(torch.nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn = turn

    def forward(self):
        return self.turn.factors()


def test_the_start_is_the_identity_in_every_precision():
    for dtype in (torch.float32, torch.bfloat16):
        turn = Reflections(16, 4, torch.device("cpu"), dtype)
        rows, _ = turn.factors()
        assert (rows[::2] == 0).all()
        assert_close(turn.matrix(), torch.eye(16, dtype=dtype), atol=1e-12, rtol=0)
