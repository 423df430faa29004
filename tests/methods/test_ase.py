"""ASE's gates and routers."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from polyrank import ASE, adapt
from polyrank.mixture import JointTopK, NaiveShared, SoftmaxTopK, mutual_information
from small import IDS, inputs


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 10_000), st.booleans())
def test_gates(k, shared, seed, tied):
    """Exactly k routed experts, ties included; ASE's active weights sum to 1, its baseline's to less."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(7, shared + 6) if tied else torch.randn(7, shared + 6, generator=generator)
    joint, naive, baseline = (
        JointTopK(k, shared)(logits),
        NaiveShared(k, shared)(logits),
        SoftmaxTopK(k)(logits[:, shared:]),
    )
    for gate in (joint[:, shared:], naive[:, shared:], baseline):
        assert ((gate > 0).sum(-1) == k).all()
    assert_close(joint.sum(-1), torch.ones(7))
    assert (baseline.sum(-1) < 1).all()
    assert (naive[:, :shared] == 1).all()
    assert_close(naive[:, shared:], baseline)


def test_there_is_a_router_for_each_task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    adapter = adapt(net, ASE(), tasks=list("abc"), targets="0")
    layer = adapter.layers["0"]
    net(inputs(4, 5, 16), task_ids=torch.tensor([0, 2, 0, 2])).sum().backward()
    torch.nn.init.normal_(layer.experts.lora_B)
    net(inputs(4, 5, 16), task_ids=torch.tensor([0, 2, 0, 2])).square().sum().backward()
    grad = [row.grad.abs().sum() for row in layer.router.weights.rows]
    assert grad[1] == 0 < min(grad[0], grad[2])


def test_the_fine_grained_family_has_the_same_budget():
    sizes = []
    for factor in (1, 2, 4):
        method = ASE(mutual_information=0).finer(factor)
        layer = adapt(nn.Sequential(nn.Linear(16, 8)), method, tasks=list("ab"), targets="0").layers["0"]
        active = layer.gate.num_active(method.num_experts) * method.rank
        sizes.append((sum(p.numel() for p in layer.experts.parameters()), active, method.alpha / method.rank))
    assert sizes[0] == sizes[1] == sizes[2]
    assert ASE().finer(2) == ASE(num_experts=32, k=6, num_shared=2, rank=2, alpha=2)
    with pytest.raises(ValueError, match="divisible"):
        ASE(rank=4).finer(3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 16}, "lower k"),
        ({"num_shared": 0}, "need shared experts"),
        ({"gate": "baseline"}, "need shared experts"),
        ({"gate": "jiont"}, "joint"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ASE(**fields)


def test_mutual_information():
    """0 for independent, log T where experts tell the tasks apart; its gradient reaches the routers."""
    assert mutual_information(torch.full((3, 5), 1 / 15)).abs() < 1e-3
    assert_close(mutual_information(torch.eye(4) / 4), torch.tensor(4.0).log(), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    net.forward = lambda x, attention_mask=None: net[0](x)
    adapter = adapt(net, ASE(), tasks=list("abc"), targets="0")
    x, mask, found = inputs(4, 5, 16), torch.tensor([[1, 1, 1, 0, 0]] * 4), []
    for padding in (0.0, 9.0):
        x = torch.cat([x[:, :3], torch.full((4, 2, 16), padding)], 1)
        net(x, attention_mask=mask, task_ids=IDS)
        found.append(adapter.losses()["mutual_information"])
    assert_close(found[0], found[1])
    found[0].backward()
    assert all(row.grad.abs().sum() > 0 for row in adapter.layers["0"].router.weights.rows)
