"""OMoE where it matters: experts that are alike, or the same."""

import pytest
import torch
from torch import nn

from polyrank import adapt
from polyrank.methods import OMoE
from small import inputs


def layer_of(dtype, apart: float, length: str):
    """Three experts, the second and third the first but for ``apart``; the same numbers in every precision."""
    net = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    adapter = adapt(net, OMoE(num_experts=3, k=3, rank=2, alpha=2, length=length), tasks=["a"], targets="0")
    a, b = inputs(2, 12, seed=1, dtype=torch.float64), inputs(2, 10, seed=2, dtype=torch.float64)
    other_a, other_b = inputs(6, 12, seed=3, dtype=torch.float64), inputs(6, 10, seed=4, dtype=torch.float64)
    with torch.no_grad():
        experts = adapter.layers["0"].experts
        experts.lora_A.copy_((a.repeat(3, 1) + apart * other_a).float())
        experts.lora_B.copy_((b.repeat(3, 1) + apart * other_b).float())
        adapter.layers["0"].router.weight.copy_(inputs(3, 12, seed=5, dtype=torch.float64).float())
    return net, adapter


@pytest.mark.parametrize("length", ["kept", "unit"])
@pytest.mark.parametrize("apart", [0.0, 1e-3, 1.0])
def test_alike_experts_give_the_same_in_single_and_double_precision(length, apart):
    found = []
    x = inputs(4, 5, 12)
    for dtype in (torch.float32, torch.float64):
        net, adapter = layer_of(dtype, apart, length)
        delta = net(x.to(dtype), task_ids=torch.zeros(4).long()) - adapter.layers["0"].base(x.to(dtype))
        (delta * inputs(4, 5, 10, seed=6, dtype=dtype)).sum().backward()  # the length alone is fixed by the gate
        found.append((delta.double(), [p.grad.double() for p in adapter.parameters()]))
    (y, gradients), (exact, wanted) = found
    assert exact.norm() > 0.1
    assert (y - exact).norm() < 1e-2 * exact.norm()
    for got, want in zip(gradients, wanted, strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() < 2e-2 * want.norm()


def test_unit_outputs_are_orthonormal():
    """With one token and a gate of 1/3 each, |sum of g_i o_i| is 1 / sqrt(3) whatever the experts are."""
    net, adapter = layer_of(torch.float64, 1.0, "unit")
    with torch.no_grad():
        adapter.layers["0"].router.weight.zero_()
    x = inputs(6, 12, dtype=torch.float64)
    delta = net(x, task_ids=torch.zeros(6).long()) - adapter.layers["0"].base(x)
    torch.testing.assert_close(delta.norm(dim=-1), torch.full((6,), 3**-0.5, dtype=torch.float64))


def test_the_same_expert_twice_adds_nothing():
    net, adapter = layer_of(torch.float64, 0.0, "kept")
    x = inputs(6, 12, dtype=torch.float64)
    delta = net(x, task_ids=torch.zeros(6).long()) - adapter.layers["0"].base(x)
    experts, gate = adapter.layers["0"].experts, (x @ adapter.layers["0"].router.weight.t()).softmax(-1)
    first = x @ experts.lora_A[:2].t() @ experts.lora_B[:2]
    torch.testing.assert_close(delta, gate[:, :1] * first)
