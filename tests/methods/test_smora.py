"""SMoRA's bias: it moves by what was counted, counts what was trained on, and evens the loads."""

import pytest
import torch
from torch.testing import assert_close

from polyrank import Adapter
from polyrank.methods import SMoRA
from small import Net, adapted, inputs

RATE = 0.03
PLAIN, BLOCKS = SMoRA(rank=8, k=3, rate=RATE), SMoRA(rank=8, k=4, block=2, activation="softmax", rate=RATE)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def seen(adapter):
    """What each layer reads from now on: name -> list of its inputs."""
    found = {name: [] for name in adapter.layers}
    for name, layer in adapter.layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: found[name].append(args[0].detach()))
    return found


def counted(layer, x, mask=None):
    """How often each expert is among the best of p + beta, token by token."""
    beta = layer.gate.beta.detach()
    counts = torch.zeros(len(beta))
    for i, sample in enumerate(x):
        for j, token in enumerate(sample):
            z = layer.router.weight.detach() @ token
            score = (torch.sigmoid(z) if layer.gate.activation == "sigmoid" else z) + beta
            order = sorted(zip((-score).tolist(), range(len(score)), strict=True))
            for _, e in order[: layer.gate.k]:
                counts[e] += 1 if mask is None else mask[i, j]
    return counts


def betas(adapter):
    return {name: layer.gate.beta.detach().clone() for name, layer in adapter.layers.items()}


def scattered(adapter):
    """Biases off zero, so that they count in the choice."""
    for layer in adapter.layers.values():
        with torch.no_grad():
            layer.gate.beta.copy_(0.2 * inputs(len(layer.gate.beta), seed=7))


@pytest.mark.parametrize("method", [PLAIN, BLOCKS], ids=["sigmoid", "softmax-blocks"])
def test_bias_moves_once_by_the_counts_of_all_micro_batches(method):
    net, adapter = adapted(method)
    scattered(adapter)
    before, found = betas(adapter), seen(adapter)
    for seed, lean in ((0, 1.0), (1, -1.0)):  # they lean against each other
        net(inputs(4, 5, 16, seed=seed) + lean).square().sum().backward()
    adapter.after_step()
    alone = []
    for name, layer in adapter.layers.items():
        moved, layer.gate.beta.data = layer.gate.beta.detach().clone(), before[name].clone()
        each = [counted(layer, x) for x in found[name]]
        assert len(each) == 2
        both = sum(each)
        assert_close(moved - before[name], RATE * (both.mean() - both).sign())
        alone += [not torch.equal((c.mean() - c).sign(), (both.mean() - both).sign()) for c in each]
        layer.gate.beta.data = moved
    assert any(alone[0::2]) and any(alone[1::2]), "one micro-batch alone would do the same: the test is empty"
    moved = betas(adapter)
    adapter.after_step()
    assert_close(betas(adapter), moved, atol=0, rtol=0)  # nothing was counted since


def test_no_rate_leaves_the_bias_alone():
    net, adapter = adapted(SMoRA(rank=8, k=3, rate=0))
    net(inputs(4, 5, 16)).sum().backward()
    adapter.after_step()
    assert all(not beta.any() for beta in betas(adapter).values())


def test_padding_does_not_count():
    net, adapter = adapted(PLAIN)
    found = seen(adapter)
    net(inputs(4, 5, 16), attention_mask=MASK)
    for name, layer in adapter.layers.items():
        want = counted(layer, found[name][0], MASK)
        assert want.sum() == 3 * MASK.sum()
        assert_close(layer.gate.counts, want)
    adapter.after_step()
    for name, layer in adapter.layers.items():
        moved, layer.gate.beta.data = layer.gate.beta.detach().clone(), torch.zeros(8)
        want = counted(layer, found[name][0], MASK)
        assert_close(moved, RATE * (want.mean() - want).sign())


def test_recomputation_does_not_count_again():
    net, adapter = adapted(PLAIN, checkpointed=True)
    net.context_fn = adapter.context.replay
    found, x = seen(adapter), inputs(4, 5, 16)
    y = net(x)
    once = {name: layer.gate.counts.clone() for name, layer in adapter.layers.items()}
    y[0].sum().backward(retain_graph=True)
    y[1].sum().backward()  # and once more, as gradient combiners do
    for name, layer in adapter.layers.items():
        assert len(found[name]) == 3, "nothing was recomputed: the test is empty"
        assert once[name].sum() == 3 * 20
        assert_close(layer.gate.counts, once[name], atol=0, rtol=0)
    net(x[:1])  # the next micro-batch counts
    assert all(layer.gate.counts.sum() == 3 * 25 for layer in adapter.layers.values())


def test_only_training_counts():
    net, adapter = adapted(PLAIN)
    x = inputs(4, 5, 16)
    net.eval()
    net(x).sum().backward()
    net.train()
    with torch.no_grad():
        net(x)
    with adapter.on("a"):  # a call that bypasses the root is no training either
        adapter.layers["q"](x)
    adapter.after_step()
    assert all(not beta.any() for beta in betas(adapter).values())
    net(x)
    adapter.after_step()
    assert all(beta.any() for beta in betas(adapter).values())


def test_bias_is_saved_but_not_trained(tmp_path):
    net, adapter = adapted(PLAIN)
    for seed in range(4):
        net(inputs(4, 5, 16, seed=seed))
        adapter.after_step()
    assert {"q.gate.beta", "v.gate.beta"} <= adapter.state_dict().keys()
    assert not any(p is layer.gate.beta for p in adapter.parameters() for layer in adapter.layers.values())
    grouped = [p for group in adapter.param_groups(0.1) for p in group["params"]]
    assert not any(p is layer.gate.beta for p in grouped for layer in adapter.layers.values())
    adapter.save(tmp_path / "adapter")
    torch.manual_seed(1)
    fresh = Net()
    loaded = Adapter.load(tmp_path / "adapter", fresh)
    assert all(beta.any() for beta in betas(loaded).values())
    assert_close(betas(loaded), betas(adapter), atol=0, rtol=0)
    x = inputs(4, 5, 16)
    assert torch.equal(fresh(x), net(x))
    for layer in loaded.layers.values():
        layer.gate.beta.data.zero_()
    assert not torch.equal(fresh(x), net(x)), "the biases do not matter here: the test is empty"


@pytest.mark.parametrize("method", [PLAIN, BLOCKS], ids=["sigmoid", "softmax-blocks"])
def test_loads_become_even_without_training(method):
    """All tokens lean one way, so few ranks are chosen; the bias alone undoes it."""
    net, adapter = adapted(method)
    lean = 2 * inputs(16, seed=11)
    found = seen(adapter)

    def unevenness(seed):
        """max / mean of each layer's counts on a batch."""
        with torch.no_grad():
            net(inputs(8, 16, 16, seed=seed) + lean)
        loads = [counted(layer, found[name][-1]) for name, layer in adapter.layers.items()]
        return [float(load.max() / load.mean()) for load in loads]

    before = unevenness(1000)
    for step in range(100):
        net(inputs(8, 16, 16, seed=step) + lean)
        adapter.after_step()
    after = unevenness(1000)
    assert min(before) > 1.7, "the loads were even at first: the test is empty"
    assert max(after) < 1.4
