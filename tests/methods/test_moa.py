"""MoA: the task's own LoRA while training, the one that the prompt looks like afterwards."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import adapt
from polyrank.methods import MoA
from small import IDS, TASKS, adapted, disturb, inputs

METHOD = MoA(rank=2, alpha=4, router_loss=0.5)


def one_layer(method=METHOD):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    adapter = adapt(net, method, tasks=TASKS, targets="0")
    disturb(adapter, 1.0)
    return net, adapter


def answer(layer, x, expert):
    """W x + b + (alpha / r) B_e A_e x of one sample (L, I)."""
    a, b = layer.experts.lora_A.rows[expert], layer.experts.lora_B.rows[expert]
    return x @ layer.weight.t() + layer.bias + METHOD.alpha / METHOD.rank * (x @ a.t()) @ b


def guess(layer, prompt):
    """argmax_t G_t mean(prompt)."""
    scores = [torch.dot(row, prompt.mean(0)).item() for row in layer.router.weight.rows]
    return scores.index(max(scores))


def test_in_evaluation_the_prompt_chooses_and_no_task_is_needed():
    net, adapter = one_layer()
    net.eval()
    layer, x = adapter.layers["0"], inputs(12, 4, 6, dtype=torch.float64)
    choices = [guess(layer, sample) for sample in x]
    assert set(choices) == {0, 1, 2}, "not every expert is chosen: the test is weak"
    want = torch.stack([answer(layer, sample, e) for sample, e in zip(x, choices, strict=True)])
    assert_close(net(x), want)
    assert_close(net(x, task_ids=torch.zeros(12, dtype=torch.long)), want)
    with adapter.on("b"):
        assert_close(net(x), want)


def test_only_the_prompt_chooses():
    """The answer's tokens are not there yet when a model generates."""
    net, adapter = one_layer()
    net.eval()
    layer, x = adapter.layers["0"], inputs(12, 4, 6, dtype=torch.float64)
    prompt = torch.tensor([[1, 1, 0, 0]]).repeat(12, 1)
    choices = [guess(layer, sample[:2]) for sample in x]
    assert choices != [guess(layer, sample) for sample in x], "the answer does not matter: the test is empty"
    want = torch.stack([answer(layer, sample, e) for sample, e in zip(x, choices, strict=True)])
    assert_close(net(x, prompt_mask=prompt), want)


def test_in_training_the_tasks_own_lora_answers_and_alone_learns():
    net, adapter = one_layer()
    layer, x = adapter.layers["0"], inputs(4, 3, 6, dtype=torch.float64)
    choices = [guess(layer, sample) for sample in x]
    assert choices != IDS.tolist(), "the router would choose the same: the test is empty"
    want = torch.stack([answer(layer, sample, t) for sample, t in zip(x, IDS.tolist(), strict=True)])
    assert_close(net(x, task_ids=IDS), want)
    net(x[1::2], task_ids=IDS[1::2]).square().sum().backward()  # task c alone
    for table in (layer.experts.lora_A, layer.experts.lora_B):
        assert [bool(p.grad is not None and p.grad.any()) for p in table.rows] == [False, False, True]
    with pytest.raises(ValueError, match="routes by task"):
        net(x)


def separable(seed, per_task=4):
    """Samples of three tasks whose tokens scatter around a mean of the task's own."""
    means = 1.5 * inputs(3, 1, 16, seed=30)
    ids = torch.arange(3 * per_task) % 3
    return inputs(len(ids), 5, 16, seed=seed) + means[ids], ids


def found(net, seed):
    """The share of samples that the evaluated model answers as the model of their own task does, in every layer."""
    x, ids = separable(seed, per_task=40)
    with torch.no_grad():
        own = net.train()(x, task_ids=ids)
        here = net.eval()(x)
    net.train()
    return float((own - here).flatten(1).abs().amax(1).lt(1e-5).float().mean())


@pytest.mark.parametrize("router_loss", [0.5, 0.0])
def test_routers_learn_to_find_the_task(router_loss):
    """From their loss alone: the choice itself has no gradient."""
    net, adapter = adapted(MoA(rank=2, alpha=4, router_loss=router_loss))
    assert found(net, 999) < 0.8
    optimizer = torch.optim.Adam(adapter.param_groups(0.02))
    for step in range(60):
        x, ids = separable(step)
        optimizer.zero_grad()
        (net(x, task_ids=ids).square().mean() + adapter.losses()["router"]).backward()
        optimizer.step()
    if router_loss:
        assert found(net, 999) > 0.9
    else:
        assert found(net, 999) < 0.8


def test_router_loss_is_the_mean_cross_entropy_of_the_pooled_prompts():
    """Over layers and samples; padding is no part of a mean."""
    net, adapter = adapted(METHOD)
    seen = {}
    for name, layer in adapter.layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0].detach()))
    lengths = [3, 5, 1, 2]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    net(inputs(4, 5, 16), attention_mask=mask, task_ids=IDS)
    each = []
    for name, layer in adapter.layers.items():
        for sample, n, t in zip(seen[name], lengths, IDS.tolist(), strict=True):
            scores = torch.stack([torch.dot(row, sample[:n].mean(0)) for row in layer.router.weight.rows])
            each.append(scores.exp().sum().log() - scores[t])
    assert_close(adapter.losses()["router"], METHOD.router_loss * sum(each) / len(each))
