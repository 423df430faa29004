"""The contract of every method: it gets all of it by standing in ``small.METHODS``; rows follow its declaration."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import polyrank
from polyrank import Adapter
from polyrank.mixture import RouteContext
from small import (
    BLOCKS,
    BY_BATCH,
    FULL_RANK,
    IDS,
    METHODS,
    NOT_THE_BASE,
    READS,
    STATIC,
    TASKLESS,
    TASKS,
    TWO_FORWARDS,
    adapted,
    base,
    fill_bank,
    inputs,
    train_steps,
)
from waits import NoWaiting

EVERY = sorted(METHODS)
every = pytest.mark.parametrize("name", EVERY)
DECOMPOSES = ("moore", "pissa", "milora")
by_task = pytest.mark.parametrize("name", sorted(set(EVERY) - TASKLESS))


def gradients(net, adapter):
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


@every
def test_declares_itself_as_written(name):
    _, adapter = adapted(METHODS[name])
    own = set(adapter.layers) - ({"q"} if name in BLOCKS else set())  # beside a block stands a plain LoRA
    assert {adapter.layers[key].reads for key in own} == {frozenset(READS[name])}
    assert METHODS[name].starts_as_base == (name not in NOT_THE_BASE)


def outputs_of(layer, net, x):
    """What a layer gives last in a forward of the model."""
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    handle.remove()
    return seen[-1]


@every
def test_a_token_depends_on_what_is_declared(name):
    """Other tokens of the sample change a token only where the gate reads the sample; without any reading of the input
    the layer is linear in it."""
    net, adapter = adapted(METHODS[name], dtype=torch.float64)
    net.eval()
    layer, x = adapter.layers[net.site], inputs(4, 5, net.width, dtype=torch.float64)
    other = x.clone()
    other[:, 1:] -= 20 * inputs(4, 4, net.width, seed=8, dtype=torch.float64)
    with adapter.on([TASKS[i] for i in IDS], torch.ones(4, 5)):
        if name in TWO_FORWARDS:  # it needs a forward of the whole model, and says so
            with pytest.raises(ValueError, match=r"q: .* a forward of the whole model"):
                layer(x)
            y, moved, twice = (outputs_of(layer, net, v) for v in (x, other, 2 * x))
        else:
            y, moved, twice = layer(x), layer(other), layer(2 * x)
    others = READS[name] & {"sample", "batch"}
    assert torch.allclose(y[:, 0], moved[:, 0], atol=1e-12) == (not others)
    linear = torch.allclose(twice - layer.bias, 2 * (y - layer.bias), atol=1e-9)
    if name in STATIC:
        assert linear
    elif READS[name] & {"token", "batch"}:
        assert not linear


@every
def test_starts_as_the_base_model(name):
    net, _ = adapted(METHODS[name], trained=False)
    y, plain = net(inputs(4, 5, 16), task_ids=IDS), base(METHODS[name])(inputs(4, 5, 16))
    assert torch.allclose(y, plain, atol=1e-5, rtol=0) == (name not in NOT_THE_BASE)


@every
def test_starts_as_the_base_model_in_bf16(name):
    """Within twice the base layer's own rounding error, both against fp64. Faithful MoORE rounds W three times: 3 x."""
    if name in NOT_THE_BASE:
        return
    net, _ = adapted(METHODS[name], trained=False, dtype=torch.bfloat16)
    plain = base(METHODS[name], dtype=torch.bfloat16)
    x = inputs(64, 16, 16, dtype=torch.bfloat16)
    exact = copy.deepcopy(plain).double()(x.double())
    error = (net(x, task_ids=IDS.repeat(16)).double() - exact).norm()
    own = (plain(x).double() - exact).norm()
    assert error <= (3 if name.startswith("moore-") else 2) * own


@every
def test_gradient_reaches_every_adapter_weight_and_no_base_weight(name):
    """After two steps: a weight behind a zero one has none at first. LoRAs that are given have to be there."""
    net, adapter = adapted(METHODS[name], trained=False)
    fill_bank(adapter)
    train_steps(net, adapter, 3)
    own = dict(adapter.named_parameters())
    assert any(p.requires_grad for p in own.values())
    for key, p in own.items():
        assert (p.grad is not None) == p.requires_grad, key
        assert p.grad is None or p.grad.abs().max() > 0, key
    frozen = [p for p in net.parameters() if all(p is not q for q in own.values())]
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@every
def test_a_sample_depends_on_its_own_task_only(name):
    net, _ = adapted(METHODS[name])
    x, order = inputs(4, 5, 16), torch.tensor([2, 0, 3, 1])
    y = net(x, task_ids=IDS)
    assert_close(net(x[order], task_ids=IDS[order]), y[order], atol=1e-5, rtol=1e-5)
    if name in BY_BATCH:
        assert not torch.allclose(net(x[1:2], task_ids=IDS[1:2]), y[1:2], atol=1e-4)
        return
    assert_close(net(x[1:2], task_ids=IDS[1:2]), y[1:2], atol=1e-5, rtol=1e-5)


@by_task
def test_the_task_matters(name):
    net, _ = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    assert not torch.allclose(net(x, task_ids=IDS), net(x, task_ids=(IDS + 1) % 3), atol=1e-3)


@every
@pytest.mark.parametrize("shape", [(4, 16), (4, 5, 16), (4, 3, 2, 16), (8, 5, 16)])
def test_leading_dimensions_are_free(name, shape):
    """Each sample alone gives its rows; 8 rows of 4 ids are beams or windows, two of each sample in turn."""
    net, _ = adapted(METHODS[name])
    x = inputs(*shape)
    fold = shape[0] // len(IDS)
    whole = net(x, task_ids=IDS)
    assert whole.shape == (*shape[:-1], 3)
    if name in BY_BATCH:  # no sample alone gives its rows
        return
    for i in range(len(IDS)):
        rows = slice(i * fold, (i + 1) * fold)
        assert_close(whole[rows], net(x[rows], task_ids=IDS[i].repeat(fold)), atol=1e-5, rtol=1e-5)


@every
def test_non_contiguous_input(name):
    net, _ = adapted(METHODS[name])
    x = inputs(5, 4, 16).transpose(0, 1)
    got = net(x, task_ids=IDS)
    assert not x.is_contiguous()
    assert_close(got, net(x.contiguous(), task_ids=IDS))
    got.sum().backward()


@every
def test_mixed_batch_equals_one_batch_for_each_task(name):
    if name in BY_BATCH:
        return
    net, _ = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    y = net(x, task_ids=IDS)
    for task in range(3):
        own = task == IDS
        assert_close(net(x[own], task_ids=IDS[own]), y[own], atol=1e-5, rtol=1e-5)


@every
def test_ids_of_each_token(name):
    """A server flattens requests into one row. What reads whole samples cannot tell the requests apart: refused."""
    net, _ = adapted(METHODS[name])
    net.eval()
    x = inputs(4, 1, 16)
    alone = net(x, task_ids=IDS)
    if "sample" in READS[name]:
        with pytest.raises(ValueError, match="flatten several requests"):
            net(x.reshape(1, 4, 16), task_ids=IDS.view(1, 4))
        return
    flat = net(x.reshape(1, 4, 16), task_ids=IDS.view(1, 4))
    assert_close(flat.view(4, 1, 3), alone, atol=1e-5, rtol=1e-5)


@every
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointed_backward_is_the_same(name, forwards):
    x, ids = inputs(4, 5, 16), [IDS, IDS.flip(0)]
    found = []
    for checkpointed in (False, True):
        net, adapter = adapted(METHODS[name], checkpointed=checkpointed)
        net.context_fn = adapter.context.replay
        total = torch.zeros(())
        for k in range(forwards):
            total = total + (net(x, task_ids=ids[k]) ** 2).sum() + sum(adapter.losses().values(), torch.zeros(()))
        total.backward()
        assert adapter.losses() == {}, "the recomputation left notes"
        found.append(gradients(net, adapter))
    assert_close(found[1], found[0])


@every
def test_two_backward_passes_through_one_checkpointed_forward(name):
    """As gradient combiners do: one forward, a gradient for each task."""
    found = []
    for checkpointed in (False, True):
        net, adapter = adapted(METHODS[name], checkpointed=checkpointed)
        net.context_fn = adapter.context.replay
        y = net(inputs(4, 5, 16), task_ids=IDS)
        parameters = list(adapter.parameters())
        found.append(
            [torch.autograd.grad(y[i].sum(), parameters, retain_graph=i == 0, allow_unused=True) for i in (0, 1)]
        )
    for plain, again in zip(*found, strict=True):
        for one, other in zip(plain, again, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(other, one)


@by_task
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_without_its_route_is_an_error(name, use_reentrant):
    net, adapter = adapted(METHODS[name], checkpointed=True)
    net.use_reentrant = use_reentrant
    y = net(inputs(4, 5, 16).requires_grad_(), task_ids=IDS)
    with pytest.raises(RuntimeError, match="enable_checkpointing"):
        y.sum().backward()
    with adapter.on("b"):  # not even a task that is set by now
        y = net(inputs(4, 5, 16).requires_grad_())
        with pytest.raises(RuntimeError, match="enable_checkpointing"):
            y.sum().backward()


@by_task
def test_no_stale_task(name):
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    y = net(x, task_ids=IDS)
    with pytest.raises(ValueError, match="routes by task"):
        net(x)
    with pytest.raises(ValueError, match="task_ids"):
        net(x, task_ids=torch.tensor([0, 1, 3, 1]))
    with pytest.raises(ValueError, match="routes by task"):
        net(x)  # nothing stayed after an error either
    with adapter.on([TASKS[i] for i in IDS]):
        assert_close(net(x), y)
        assert_close(net(x, task_ids=IDS.flip(0)), net(x, task_ids=IDS.flip(0)))
    with pytest.raises(ValueError, match="routes by task"):
        net(x)


@every
def test_merge_equals_the_task_or_refuses(name):
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    y = net(x, task_ids=torch.full((4,), 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    if name not in STATIC:
        with pytest.raises(ValueError, match="depends on the input"):
            adapter.merge("b")
        assert_close(net(x, task_ids=torch.full((4,), 1)), y, atol=0, rtol=0)
        assert_close(dict(net.state_dict()), before, atol=0, rtol=0)
        return
    merged = adapter.merge("b")
    assert [type(m).__name__ for m in merged.modules()] == ["Net", "Linear", "Linear", "Linear"]
    assert_close(merged(x), y, atol=1e-5, rtol=1e-5)


@every
def test_lora_factors_are_the_delta(name):
    _, adapter = adapted(METHODS[name], dtype=torch.float64)
    for layer in adapter.layers.values():
        if name not in STATIC or name in FULL_RANK:
            if not layer.reads and name in BLOCKS:
                continue  # a plain LoRA beside the block
            with pytest.raises(ValueError, match=r"depends on the input|full rank"):
                layer.task_lora(2)
            continue
        a, b = layer.task_lora(2)
        assert_close(layer.weight + b.t() @ a, layer.task_weight(2), atol=1e-12, rtol=0)


@every
@pytest.mark.parametrize("with_factors", [False, True])
def test_save_load_equal(name, with_factors, tmp_path):
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    adapter.save(tmp_path / "adapter", with_factors=with_factors)
    fresh = base(METHODS[name])
    torch.manual_seed(9)
    loaded = Adapter.load(tmp_path / "adapter", fresh)
    fresh.train(net.training)
    assert loaded.method == METHODS[name]
    assert loaded.tasks == TASKS
    assert torch.equal(fresh(x, task_ids=IDS), net(x, task_ids=IDS))


@every
def test_remove_gives_back_the_base(name):
    net = base(METHODS[name])
    net.out.weight.requires_grad_(False)
    before, modules = {k: v.clone() for k, v in net.state_dict().items()}, list(net.modules())
    grads = [p.requires_grad for p in net.parameters()]
    adapter = polyrank.adapt(net, METHODS[name], tasks=TASKS, targets=net.targets)
    train_steps(net, adapter, 2)
    adapter.remove()
    assert list(net.modules()) == modules
    assert [p.requires_grad for p in net.parameters()] == grads
    assert_close(dict(net.state_dict()), before, atol=0, rtol=0)
    net(inputs(4, 5, 16))
    with pytest.raises(TypeError):
        net(inputs(4, 5, 16), task_ids=IDS)


@every
def test_deepcopy_is_independent(name):
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    y = net(x, task_ids=IDS)
    twin = copy.deepcopy(net)
    adapter.remove()
    assert_close(twin(x, task_ids=IDS), y, atol=0, rtol=0)


@every
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at every tensor's, leaf or not
def test_compiles_whole(name):
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    net(x, task_ids=IDS).square().sum().backward()
    eager, y = gradients(net, adapter), net(x, task_ids=IDS)
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x, task_ids=IDS)
    compiled.square().sum().backward()
    assert_close(compiled, y, atol=1e-5, rtol=1e-5)
    assert_close(gradients(net, adapter), eager, atol=1e-4, rtol=1e-4)


@every
def test_the_host_never_waits_for_the_device(name):
    """In forward, losses and backward: a wait costs more than a mixture. Ids are checked on the CPU alone."""
    net, adapter = adapted(METHODS[name])
    x, mask = inputs(4, 5, 16).requires_grad_(), torch.ones(4, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouteContext, "checked", lambda self, task_ids, batch: (task_ids, None))
        net.train()
        with NoWaiting():
            y = net(x, mask, task_ids=IDS)
            sum(adapter.losses().values(), y.square().sum()).backward()
        net.eval()
        with torch.no_grad():
            net(x, mask, task_ids=IDS)  # what inference computes once may wait
            with NoWaiting():
                net(x, mask, task_ids=IDS)
    assert any(p.grad is not None for p in adapter.parameters())


@every
def test_inference_equals_the_differentiated_forward(name):
    """What inference keeps is what the weights are: one task, several, each token's own, and after each has changed."""
    net, adapter = adapted(METHODS[name], dtype=torch.float64)
    net.eval()
    x = inputs(4, 5, 16, dtype=torch.float64)
    numbers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    for change in (None, *list(adapter.parameters())[:6], *numbers[:2]):
        if change is not None:
            with torch.no_grad():
                change.mul_(1.25)
        for ids in (IDS, torch.full((4,), 1), torch.full((4,), 2)):
            with torch.no_grad():
                found = net(x, task_ids=ids)
            assert_close(found, net(x, task_ids=ids), atol=1e-12, rtol=1e-10)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, fused=True)  # autograd does not count its changes
    net(x, task_ids=IDS).sum().backward()
    with torch.no_grad():
        net(x, task_ids=IDS)
        optimizer.step()
        found = net(x, task_ids=IDS)
    assert_close(found, net(x, task_ids=IDS), atol=1e-12, rtol=1e-10)
    with torch.inference_mode():
        assert_close(net(x.transpose(0, 1).contiguous().transpose(0, 1), task_ids=IDS), net(x, task_ids=IDS))


@every
def test_inference_does_not_depend_on_an_earlier_autocast(name):
    net, _ = adapted(METHODS[name])
    net.eval()
    twin, x = copy.deepcopy(net), inputs(4, 5, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            net(x, task_ids=IDS)
        assert torch.equal(net(x, task_ids=IDS), twin(x, task_ids=IDS))


@pytest.mark.parametrize("name", sorted(set(EVERY) - BLOCKS - {n for n in EVERY if n.startswith(DECOMPOSES)}))
def test_stands_where_the_base_does(name):
    """What stays behind on the host is copied from there in every forward. Factors need numbers: no meta base."""
    layer = METHODS[name].build({"q": nn.Linear(16, 24, device="meta")}, TASKS)["q"]
    own = [*layer.named_parameters(), *layer.named_buffers()]
    assert {key: p.device.type for key, p in own} == dict.fromkeys((key for key, _ in own), "meta")


@every
def test_autocast_gives_bf16_outputs_and_fp32_gradients(name):
    net, adapter = adapted(METHODS[name], dtype=torch.float32)
    twin, exact = adapted(METHODS[name], dtype=torch.float64)
    exact.load_state_dict(adapter.state_dict())
    x = inputs(4, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, task_ids=IDS)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    want = twin(x.double(), task_ids=IDS)
    assert (y.double() - want).norm() / want.norm() < 0.05
    found = gradients(net, adapter).values()
    assert found
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)


@every
def test_a_hooked_base_runs_its_own_forward(name):
    """Something else stands on the base layer: the fast path must not pass it by."""
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    y = net(x, task_ids=IDS)
    seen = []
    first = adapter.layers[net.site].frozen()[0]
    handle = first.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    if name.startswith("moore-"):  # it stands for W: the base is not run at all
        assert_close(net(x, task_ids=IDS), y)
        return
    got = net(x, task_ids=IDS)
    assert seen == [(4, 5, first.out_features)] * (2 if name in TWO_FORWARDS else 1)
    assert_close(got, y, atol=1e-5, rtol=1e-5)
    handle.remove()


@every
def test_repr_is_the_recipe(name):
    method = METHODS[name]
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    with pytest.raises(ValueError, match="unexpected"):
        type(method)(no_such_field=1)


@every
def test_summary_counts(name):
    _, adapter = adapted(METHODS[name])
    summary = adapter.summary()
    assert summary.trainable_parameters == sum(p.numel() for p in adapter.parameters())
    assert summary.base_parameters == sum(p.numel() for p in base(METHODS[name]).parameters())
    assert 0 < summary.active_parameters <= summary.trainable_parameters
    second = 24 * 40 + 24 * 40 + 40 * 12 if name in BLOCKS else 24 * 12
    assert summary.flops_per_token > summary.base_flops_per_token == 2 * (16 * 24 + second)
    assert summary.merges.startswith("exactly") == (name in STATIC)
    assert str(summary.trainable_parameters)[-3:] in str(summary)
