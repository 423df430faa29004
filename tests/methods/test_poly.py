"""Poly's gate: a relaxed Bernoulli while training, its sigmoid afterwards, and no noise in a merged weight."""

import pytest
import torch
from torch import nn
from torch.distributions import RelaxedBernoulli
from torch.testing import assert_close

from polyrank import adapt
from polyrank.methods import Poly
from small import IDS, TASKS, disturb, inputs

METHODS = [Poly(num_experts=3, rank=2, temperature=0.7), Poly(num_experts=3, rank=2, splits=2, temperature=1.5)]
each_method = pytest.mark.parametrize("method", METHODS, ids=["poly", "splits"])


def one_layer(method):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 4)).double()
    adapter = adapt(net, method, tasks=TASKS, targets="0")
    disturb(adapter, 1.0)
    return net, adapter.layers["0"], adapter


def answer(method, layer, sample, p):
    """W x + b + (1 / r) B A x of one sample (L, I): A and B mixed slice by slice of input and output; p (S, E)."""
    a, b, r = layer.experts.lora_A, layer.experts.lora_B, method.rank
    down, up = [], []
    for s in range(method.splits):
        g = p[s] / p[s].sum()
        down.append(sum(g[e] * a[s, e * r : (e + 1) * r] for e in range(method.num_experts)))
        up.append(sum(g[e] * b[s, e * r : (e + 1) * r] for e in range(method.num_experts)))
    return sample @ layer.weight.t() + layer.bias + sample @ torch.cat(down, -1).t() @ torch.cat(up, -1) / r


def logits(method, layer, t):
    return layer.router.logits.rows[t].view(method.splits, method.num_experts)


@each_method
def test_training_draws_a_relaxed_bernoulli_of_each_sample(method):
    net, layer, _ = one_layer(method)
    x = inputs(4, 3, 6, dtype=torch.float64)
    torch.manual_seed(21)
    y = net(x, task_ids=IDS)
    torch.manual_seed(21)
    draws = torch.rand(4, 1, method.splits * method.num_experts, dtype=torch.float64)
    want = []
    for sample, t, u in zip(x, IDS.tolist(), draws, strict=True):
        noise = torch.log(u) - torch.log1p(-u)  # logistic
        w = logits(method, layer, t) + noise.view(method.splits, method.num_experts)
        want.append(answer(method, layer, sample, 1 / (1 + torch.exp(-w / method.temperature))))
    assert_close(y, torch.stack(want))
    torch.manual_seed(22)
    other = net(x, task_ids=IDS)
    assert (other - y).abs().amax((1, 2)).min() > 1e-3
    torch.manual_seed(21)
    assert torch.equal(net(x, task_ids=IDS), y)


@each_method
def test_evaluation_is_the_sigmoid_without_noise(method):
    net, layer, _ = one_layer(method)
    net.eval()
    x, state = inputs(4, 3, 6, dtype=torch.float64), torch.get_rng_state()
    y = net(x, task_ids=IDS)
    want = [
        answer(method, layer, sample, 1 / (1 + torch.exp(-logits(method, layer, t))))
        for sample, t in zip(x, IDS.tolist(), strict=True)
    ]
    assert_close(y, torch.stack(want))
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_mean_of_the_gate_is_that_of_the_distribution(method):
    """Monte Carlo: 40000 draws of both, whose means lie within 0.01 (four standard deviations)."""
    _, layer, _ = one_layer(method)
    assert layer.gate.training
    w = torch.tensor([[-3.0, -2.0, -1.0], [2.0, -1.0, 0.5]])[: method.splits]
    torch.manual_seed(5)
    with torch.no_grad():
        drawn = layer.gate(w.flatten().expand(40_000, -1)).view(40_000, *w.shape)
    p = RelaxedBernoulli(torch.tensor(method.temperature), logits=w).sample((40_000,))
    want = (p / p.sum(-1, keepdim=True)).mean(0)
    assert_close(drawn.mean(0), want, atol=0.01, rtol=0)
    assert_close(drawn.std(0), (p / p.sum(-1, keepdim=True)).std(0), atol=0.01, rtol=0)
    p = torch.sigmoid(w)
    assert ((p / p.sum(-1, keepdim=True)) - want).abs().max() > 0.05, "noise does not matter: the test is empty"


@each_method
def test_merging_in_training_draws_no_noise(method):
    found = []
    x = inputs(4, 3, 6, dtype=torch.float64)
    for seed in (1, 2):
        net, layer, adapter = one_layer(method)
        y = net.eval()(x, task_ids=torch.full((4,), 1))
        net.train()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        layer.task_weight(1)
        assert layer.gate.training
        found.append(adapter.merge("b")(x))
        assert torch.equal(torch.get_rng_state(), state)
        assert_close(found[-1], y)
    assert torch.equal(*found)
