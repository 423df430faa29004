"""The watch over waiting sees what it is there for, and lets the rest pass."""

import pytest
import torch
from torch.nn import functional as F

from waits import NoWaiting

X, IDS = torch.arange(6.0), torch.tensor([0, 2, 1])


@pytest.mark.parametrize(
    "waits",
    [
        lambda: X.sum().item(),
        lambda: int(X.max()),
        lambda: float(X[0]),
        lambda: bool((X > 3).any()),
        lambda: 1 if X[0] > 0 else 2,
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: X.cpu(),
        lambda: X.nonzero(),
        lambda: torch.where(X > 2),
        lambda: X[X > 2],
        lambda: X.clone().index_put_((X > 2,), torch.zeros(())),
        lambda: X.masked_select(X > 2),
        lambda: torch.equal(X, X),
        lambda: torch.allclose(X, X),
        lambda: X.unique(),
        lambda: IDS.bincount(),
        lambda: X[:3].repeat_interleave(IDS),
        lambda: F.one_hot(IDS),
        lambda: torch.linalg.svd(torch.eye(3)),
        lambda: torch.tensor([1.0, 2.0]),
    ],
)
def test_sees_waiting(waits):
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        waits()


def test_sees_waiting_in_a_backward_pass():
    x = X.clone().requires_grad_()
    y = (2 * x).sum()
    x.register_hook(lambda grad: grad * float(grad.norm()))
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        y.backward()


def test_lets_the_rest_pass():
    with NoWaiting():
        one = F.one_hot(IDS, 3)
        x = X[IDS] + one[:, 0] + X[:3].repeat_interleave(2)[::2] + torch.where(X > 2, X, 0)[:3]
        x = x.masked_fill(x > 3, 0) + X[:3].repeat_interleave(IDS, output_size=3) + x.topk(3).values
    assert x.shape == (3,)
