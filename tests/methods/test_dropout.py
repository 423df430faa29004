"""Dropout around other methods, in training: against loops with a known mask, and what it must leave alone."""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from naive.by_token import logits_of, softmax
from polyrank import METHODS as CLASSES, adapt
from polyrank.methods import Dropout, LoRA, MoA
from small import BLOCKS, IDS, METHODS, NOT_THE_BASE, TASKS, Net, adapted, base, disturb, fill_bank, inputs, train_steps

PLACES = pytest.mark.parametrize("at", ["ranks", "input"])
LAYERS_OF_THEIR_OWN = {"dora", "moore", "task_lora"}  # by their names in recipes
DIFFERENCES = {"pissa", "milora", "moore_topk"}
LINEAR = sorted(name for name in METHODS if name not in BLOCKS and not isinstance(METHODS[name], Dropout))


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))


def recipe_name(method):
    return next(name for name, kind in CLASSES.items() if kind is type(method))


def around(name, **fields):
    """Dropout around a setting of the contract's table."""
    return Dropout(of={"name": recipe_name(METHODS[name]), **asdict(METHODS[name])}, **fields)


def in_training(method, **how):
    net, adapter = adapted(method, **how)
    net.train()
    return net, adapter


@PLACES
def test_equals_the_equation_with_a_known_mask(at):
    """The router reads what was not dropped; outputs and gradients to 1e-10."""
    method = Dropout(of={"name": "hydralora", "num_experts": 3, "rank": 2, "alpha": 4}, p=0.4, at=at)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(10, 7)).double()
    adapter = adapt(net, method, tasks=TASKS)
    disturb(adapter)
    p = {key.removeprefix("0."): weight.detach().clone().requires_grad_() for key, weight in adapter.named_parameters()}
    xs = [inputs(4, 3, 10, dtype=torch.float64).requires_grad_() for _ in range(2)]
    torch.manual_seed(3)
    y = net(xs[0], task_ids=IDS)
    torch.manual_seed(3)
    masks = F.dropout(torch.ones(12, 2 if at == "ranks" else 10, dtype=torch.float64), 0.4)
    assert 0 < (masks == 0).sum() < masks.numel()
    out = []
    for token, mask in zip(xs[1].flatten(0, 1), masks, strict=True):
        gate, want = softmax(logits_of(p, token)), net[0].base.weight @ token + net[0].base.bias
        for i in range(3):
            for j in range(2):
                read, kept = (token, mask[j]) if at == "ranks" else (mask * token, 1)
                z = kept * torch.dot(p["experts.lora_A"][j], read)
                want = want + 4 / 2 * gate[i] * p["experts.lora_B"][2 * i + j] * z
        out.append(want)
    want = torch.stack(out).view_as(y)
    for loss in (y.square().sum(), want.square().sum()):
        loss.backward()
    assert_close(y, want, atol=1e-10, rtol=1e-10)
    assert_close(xs[0].grad, xs[1].grad, atol=1e-10, rtol=1e-10)
    assert_close(
        {k.removeprefix("0."): w.grad for k, w in adapter.named_parameters()}, {k: w.grad for k, w in p.items()}
    )


@PLACES
@pytest.mark.parametrize("name", ["lora", "moslora", "mtl_lora", "malora", "same-parameters", "multilora"])
def test_the_mean_over_masks_is_the_layer_without(name, at):
    """Each of 20,000 equal tokens has a mask of its own: their mean within 5 standard errors."""
    _, adapter = in_training(around(name, p=0.3, at=at), dtype=torch.float64)
    layer, x = adapter.layers["q"], inputs(1, 1, 16, dtype=torch.float64)
    with adapter.on("b"), torch.no_grad():
        y = layer(x.expand(1, 20_000, 16))[0]
        layer.eval()
        want = layer(x)[0, 0]
    error = y.std(0) / len(y) ** 0.5
    assert (y.std(0) > 0.01).all()
    assert ((y.mean(0) - want).abs() < 5 * error).all()


@PLACES
@pytest.mark.parametrize("name", LINEAR)
def test_what_starts_as_the_base_does_so_under_any_mask(name, at):
    """Or is refused, because its layers are no mixture beside the weight, or its ranks cancel each other."""
    refused, method = recipe_name(METHODS[name]), around(name, p=0.5, at=at)
    if refused in LAYERS_OF_THEIR_OWN or (refused in DIFFERENCES and at == "ranks"):
        with pytest.raises(ValueError, match=r"q: .* take (at='input'|a method)"):
            adapted(method)
        return
    net, adapter = adapted(method, trained=False)
    fill_bank(adapter)
    plain = base(METHODS[name])
    net.train()
    x = inputs(4, 5, 16)
    assert torch.allclose(net(x, task_ids=IDS), plain(x), atol=1e-5, rtol=0) == (
        name not in NOT_THE_BASE and not name.startswith("xlora")  # whose LoRAs are given
    )
    assert method.starts_as_base == METHODS[name].starts_as_base


@PLACES
@pytest.mark.parametrize("name", ["adalora", "smora", "vb_lora", "mola", "more", "loramoe", "same", "faded", "xlora"])
def test_all_else_is_the_other_methods(name, at):
    """Without a mask the training is the same, bit for bit: losses, hooks, groups; so are names of weights."""
    found = []
    for method in (METHODS[name], around(name, p=0.0, at=at)):
        net, adapter = in_training(method)
        train_steps(net, adapter, 3)
        adapter.after_task()
        groups = [len(group["params"]) for group in adapter.param_groups(0.1)]
        found.append((adapter.state_dict(), groups, adapter.settles, method.SIZE))
    assert_close(found[1][0], found[0][0], atol=0, rtol=0)
    assert found[1][1:] == found[0][1:]


@PLACES
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_recomputation_draws_the_same_mask(at, forwards):
    found = []
    for checkpointed, seed in ((False, 3), (True, 3), (False, 4)):
        net, adapter = in_training(around("mola", p=0.4, at=at), checkpointed=checkpointed)
        net.context_fn = adapter.context.replay
        torch.manual_seed(seed)
        total = sum((net(inputs(4, 5, 16, seed=k), task_ids=IDS) ** 2).sum() for k in range(forwards))
        torch.rand(5)  # the state has moved on by the time of the backward pass
        total.backward()
        found.append([p.grad for p in adapter.parameters()])
    assert_close(found[1], found[0])
    assert not torch.allclose(found[2][0], found[0][0])


@PLACES
def test_merging_in_training_leaves_no_mask_in_the_weight(at):
    x, found = inputs(4, 5, 16), []
    for method in (around("mtl_lora", p=0.5, at=at), METHODS["mtl_lora"]):
        _, adapter = in_training(method)
        loras = [layer.task_lora(1) for layer in adapter.layers.values()]
        found.append((loras, adapter.merge("b")(x)))
    assert_close(found[0], found[1], atol=0, rtol=0)


@PLACES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # as in the contract
def test_under_autocast_and_compiled(at):
    net, adapter = in_training(around("mola", p=0.4, at=at))
    x = inputs(4, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, task_ids=IDS)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    outputs = []
    for one in (net, compiled):
        torch.manual_seed(1)
        outputs.append(one(x, task_ids=IDS))
    assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def test_a_bank_is_trained_under_the_same_dropout(tmp_path):
    method = Dropout(of={"name": "moa", "rank": 3}, p=0.2, at="input")
    assert method.bank() == Dropout(of={"name": "lora", "rank": 3}, p=0.2, at="input")
    assert Dropout(of="lora").bank() is None
    _, first = adapted(method.bank())
    first.save(tmp_path / "b")
    _, adapter = adapted(method, trained=False)
    adapter.load_bank({"b": tmp_path / "b"})
    a, b = first.layers["q"].task_lora(0)
    experts = adapter.layers["q"].experts
    assert_close(experts.lora_A.each()[1], a)
    assert_close(experts.lora_B.each()[1] * MoA(rank=3).alpha / 3, b)


def test_what_it_cannot_go_around_is_refused():
    for of, match in (
        ("mixlora", "feed-forward blocks"),
        ("nothing", "names no method"),
        ({"name": "dropout"}, "set its p"),
        ({"name": "lora", "rank": 0}, "rank"),
    ):
        with pytest.raises(ValueError, match=match):
            Dropout(of=of)
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match="p\n"):
            Dropout(p=p)
    net = Net()
    with pytest.raises(ValueError, match=r"q: .* take a method that is a mixture beside the weight"):
        adapt(net, Dropout(of="dora"), tasks=TASKS, targets=["q"])
    assert type(net.q) is nn.Linear
    assert hash(Dropout()) == hash(Dropout(of="lora")) != hash(Dropout(of="mode"))
    assert Dropout().method == LoRA()
