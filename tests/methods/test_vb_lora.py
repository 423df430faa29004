"""VB-LoRA's bank: one for all layers, in training, in files and in the optimiser."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import adapt
from polyrank.methods import VBLoRA
from small import METHODS, TASKS, Net, adapted, inputs

METHOD = METHODS["vb_lora"]


def test_all_layers_mix_one_bank_that_is_saved_once():
    net, adapter = adapted(METHOD)
    banks = [layer.experts.bank for layer in adapter.layers.values()]
    assert len(banks) == 2
    assert banks[0] is banks[1]
    assert [name for name in adapter.state_dict() if "vectors" in name] == ["q.experts.bank.vectors"]
    x = inputs(4, 5, 16)
    before = {name: layer.task_weight(0) for name, layer in adapter.layers.items()}
    y = net(x)
    with torch.no_grad():
        banks[0].vectors.mul_(2)
    assert not torch.allclose(net(x), y, atol=1e-2)
    for name, layer in adapter.layers.items():  # both factors double
        assert_close(layer.task_weight(0) - layer.weight, 4 * (before[name] - layer.weight), atol=1e-5, rtol=1e-5)


def test_only_the_chosen_vectors_matter_and_learn():
    """Each sub-vector mixes its k best; a vector that nobody chose has no gradient and can be anything."""
    net, adapter = adapted(VBLoRA(rank=1, num_vectors=9, vector_length=4, bank_bound=0.3))
    bank = adapter.layers["q"].experts.bank
    with torch.no_grad():
        for layer in adapter.layers.values():
            for logits in (layer.experts.logits_A, layer.experts.logits_B):
                logits[..., [2, 6]] += 20
    net(inputs(4, 5, 16)).square().sum().backward()
    live = bank.vectors.grad.abs().sum(1) > 0
    assert live.nonzero().flatten().tolist() == [2, 6]
    y = net(inputs(4, 5, 16))
    with torch.no_grad():
        bank.vectors[[0, 1, 3, 4, 5, 7, 8]] = 1e3
    assert torch.equal(net(inputs(4, 5, 16)), y)


def test_logits_learn_faster_than_the_bank():
    _, adapter = adapted(METHOD)
    bank = adapter.layers["q"].experts.bank.vectors
    rates = {p: group["lr"] for group in adapter.param_groups(1e-3, 0.1) for p in group["params"]}
    assert rates.keys() == set(adapter.parameters())
    assert {p: rate for p, rate in rates.items() if p is bank} == {bank: 1e-3}
    assert all(rate == pytest.approx(1e-2) for p, rate in rates.items() if p is not bank)
    assert all(group["weight_decay"] == 0.1 for group in adapter.param_groups(1e-3, 0.1))


def test_starts_close_to_the_base():
    """The bank uniform within 0.02, the logits N(0, 0.1^2): close to the base, and not the base."""
    torch.manual_seed(0)
    base = nn.Linear(256, 512)
    net = nn.Sequential(base)
    adapter = adapt(net, VBLoRA(), tasks=TASKS, targets="0")
    experts = adapter.layers["0"].experts
    vectors, logits = experts.bank.vectors.detach(), experts.logits_A.detach()
    assert 0.0199 < vectors.abs().max() <= 0.02
    assert vectors.std() == pytest.approx(0.02 / 3**0.5, rel=0.02)
    assert logits.mean().abs() < 0.01
    assert logits.std() == pytest.approx(0.1, rel=0.05)
    x = inputs(64, 256)
    change = (net(x) - base(x)).norm() / base(x).norm()
    assert 1e-4 < change < 0.05


def test_a_length_that_does_not_divide_is_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"q has 16 inputs and 24 outputs, which vector_length=3 does not divide"):
        adapt(net, VBLoRA(vector_length=3), tasks=TASKS, targets=["q", "v"])
    assert type(net.q) is nn.Linear
    with pytest.raises(ValueError, match="lower k"):
        VBLoRA(k=5, num_vectors=4)
