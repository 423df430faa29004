"""Grouped products against the masked dense form, which the equations of the methods are tested with."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank.mixture import (
    Gate,
    JointTopK,
    LinearRouter,
    LoRAExperts,
    MixtureLinear,
    PerTaskRouter,
    SoftmaxTopK,
    dispatch,
)
from small import inputs


class Signed(Gate):
    """The k logits of the largest size, as they are: weights below zero count too."""

    def forward(self, logits):
        best = logits.abs().topk(2, -1).indices
        return torch.zeros_like(logits).scatter(-1, best, logits.gather(-1, best))

    def num_active(self, num_experts):
        return 2


def mixture(gate, dtype, rank=8, num_experts=6, in_features=24):
    torch.manual_seed(0)
    base = nn.Linear(in_features, 40, dtype=dtype).requires_grad_(False)
    experts = LoRAExperts(base, num_experts, rank)
    layer = MixtureLinear(base, experts=experts, router=LinearRouter(base, num_experts), gate=gate, scale=0.7)
    for p in (experts.lora_A, experts.lora_B, layer.router.weight):
        nn.init.normal_(p, std=0.3)
    return layer


def both_ways(layer, x, monkeypatch):
    """Outputs with and without gradients, and all gradients: masked dense, then grouped."""
    for most in (10**9, 0):
        monkeypatch.setattr(dispatch, "DENSE_UP_TO", {torch.float32: most, torch.bfloat16: most})
        layer.zero_grad()
        x = x.detach().requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        with torch.no_grad():
            again = layer(x)
        yield [y.detach(), again, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "gate", [JointTopK(2), JointTopK(2, 1), SoftmaxTopK(2), Signed()], ids=lambda g: type(g).__name__
)
def test_equals_the_masked_dense_form(gate, dtype, monkeypatch):
    layer = mixture(gate, dtype)
    assert not dispatch.pays(layer.experts, layer.gate, inputs(1, 24), dtype)
    dense, grouped = both_ways(layer, inputs(3, 5, 24, dtype=dtype), monkeypatch)
    assert dispatch.pays(layer.experts, layer.gate, inputs(1, 24), dtype)
    for one, other in zip(dense, grouped, strict=True):
        assert (other.float() - one.float()).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * one.float().norm()


def test_no_token_and_an_expert_without_one(monkeypatch):
    layer = mixture(JointTopK(1), torch.float32)
    with torch.no_grad():
        layer.router.weight[1:] = -layer.router.weight[:1]  # the first expert or another, and four have nobody
    dense, grouped = both_ways(layer, inputs(7, 24), monkeypatch)
    assert_close(grouped, dense, atol=1e-5, rtol=1e-4)
    assert layer(inputs(0, 24)).shape == (0, 40)


def test_where_it_may_not_run(monkeypatch):
    monkeypatch.setattr(dispatch, "DENSE_UP_TO", {torch.float32: 0, torch.bfloat16: 0})
    x = inputs(2, 24)
    assert dispatch.pays(mixture(JointTopK(2), torch.float32).experts, JointTopK(2), x, torch.float32)
    assert not dispatch.pays(mixture(JointTopK(2), torch.float32, rank=3).experts, JointTopK(2), x, torch.float32)
    assert not dispatch.pays(mixture(JointTopK(2), torch.bfloat16, rank=4).experts, JointTopK(2), x, torch.bfloat16)
    assert not dispatch.pays(mixture(JointTopK(2), torch.float64).experts, JointTopK(2), x, torch.float64)
    narrow = mixture(JointTopK(2), torch.float32, in_features=18)  # rows of 72 bytes
    assert not dispatch.pays(narrow.experts, JointTopK(2), inputs(2, 18), torch.float32)
    assert not dispatch.pays(mixture(None, torch.float32).experts, None, x, torch.float32)


def test_the_rule_chooses_it_for_many_ranks_alone():
    """64 experts of rank 16, two of them active: E r = 1024 is more than 64 k, and than 400 k."""
    few, many = (mixture(JointTopK(2), torch.float32, rank, num) for rank, num in ((8, 8), (16, 64)))
    x = inputs(2, 24)
    for dtype in (torch.float32, torch.bfloat16):
        assert not dispatch.pays(few.experts, few.gate, x, dtype)
        assert dispatch.pays(many.experts, many.gate, x, dtype)
    assert PerTaskRouter(few.base, 2, 64).rows() is None  # a router without rows is asked all the same
