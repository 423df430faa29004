"""Methods for feed-forward blocks: their equations, and what is said of their cost and their merging."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from naive import by_name
from naive.blocks import BLOCKS as NAIVE
from polyrank import Adapter, adapt
from polyrank.clusters import balanced_clusters
from polyrank.methods import EMTAL, Faded, FGMoE, HydraLoRA, MixLoRA
from small import BLOCKS, GLU, IDS, METHODS, BlockNet, Net, adapted, base, disturb, inputs

GATED = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


def one_block(method, gated, sizes=(10, 16, 8)):
    torch.manual_seed(2)
    net = nn.Sequential(GLU(*sizes, gated=gated)).double()
    frozen = {
        part: (layer.weight.detach(), layer.bias)
        for part, layer in (("up", net[0].up), ("gate", net[0].gate), ("down", net[0].down))
        if layer is not None
    }
    return net, frozen, adapt(net, method, tasks=list("abc"))


@GATED
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_equals_the_equation(name, gated):
    """Outputs, all gradients and losses, at the start and through five training steps."""
    method = METHODS[name]
    net, frozen, adapter = one_block(method, gated)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.3)
    for step in range(5):
        x, target = inputs(4, 3, 10, seed=step).double(), inputs(4, 3, 8, seed=50 + step).double()
        trained = {k.removeprefix("0."): p for k, p in adapter.named_parameters()}
        twin = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in trained.items()}
        xs = [x.clone().requires_grad_() for _ in range(2)]
        optimizer.zero_grad()
        y = net(xs[0], task_ids=IDS)
        loss = (y - target).square().mean() + sum(adapter.losses().values(), torch.zeros((), dtype=x.dtype))
        loss.backward()
        want, aux = NAIVE[type(method)](method, by_name(twin), frozen, xs[1], IDS)
        wanted = (want - target).square().mean() + aux
        wanted.backward()
        assert_close((y, loss, xs[0].grad), (want, wanted, xs[1].grad), atol=1e-10, rtol=1e-10)
        for key, p in trained.items():
            if p.requires_grad:
                grad = torch.zeros_like(p) if twin[key].grad is None else twin[key].grad
                assert_close(p.grad, grad, atol=1e-10, rtol=1e-10, msg=key)
        adapter.before_step((step + 1) / 5)
        optimizer.step()
        adapter.after_step()
    assert (net(x, task_ids=IDS) - adapter.layers["0"].base(x)).abs().max() > 1e-3, "nothing was learnt"


@GATED
def test_mixlora_runs_each_frozen_product_once_for_a_token(gated):
    """However many experts answer: two or three frozen products, each of as many rows as there are tokens."""
    net, _, adapter = one_block(MixLoRA(num_experts=4, k=3, rank=2), gated)
    rows = []
    for linear in adapter.layers["0"].frozen():
        linear.register_forward_hook(lambda module, given, output: rows.append(given[0].numel() // given[0].shape[-1]))
    net(inputs(4, 5, 10).double(), task_ids=IDS).sum().backward()
    assert rows == [20] * (3 if gated else 2)


@pytest.mark.parametrize("p", [0.05, 0.6, 1.0])
def test_top_p_takes_as_few_as_reach_p(p):
    _, _, adapter = one_block(MixLoRA(routing="top_p", p=p, balance=0, num_experts=6), gated=True)
    gate = adapter.layers["0"].gate
    logits = 2 * inputs(50, 6)
    weights, softmax = gate(logits), logits.softmax(-1)
    for row, full in zip(weights, softmax, strict=True):
        taken = row > 0
        assert_close(row[taken], full[taken])
        assert taken.all() or full[taken].min() >= full[~taken].max()
        assert full[taken].sum() >= p - 1e-6
        assert full[taken].sum() - full[taken].min() < p


def faded(net, adapter, width):
    """A few steps to the end of the training; returns the outputs by then."""
    optimizer = torch.optim.AdamW(adapter.param_groups(0.05))
    for step in range(6):
        optimizer.zero_grad()
        (net(inputs(4, 5, width, seed=step), task_ids=IDS) - inputs(4, 5, 3, seed=90 + step)).square().mean().backward()
        adapter.before_step((step + 1) / 6)
        optimizer.step()
        adapter.after_step()
    return net(inputs(4, 5, width), task_ids=IDS)


@pytest.mark.parametrize(
    "method",
    [
        EMTAL(num_experts=4, rank=2),
        EMTAL(num_experts=8, rank=2, fade=(0.3, 1.0), start="released"),
        Faded(of={"name": "hydralora", "num_experts": 3, "rank": 2}),
        Faded(of={"name": "mode", "num_experts": 3, "rank": 4, "block": 2}, fade=(0.0, 1.0)),
        Faded(of={"name": "teamlora", "num_experts": 3, "rank": 2, "router_dim": 4}),
        Faded(of={"name": "loramoe", "num_experts": 3, "rank": 2}),
        Faded(of={"name": "mtl_lora", "num_experts": 3, "rank": 2}),
        Faded(of={"name": "c_lorae", "rank": 4, "task_rank": 2}),
    ],
    ids=lambda method: str(method.of["name"]) if isinstance(method, Faded) else f"emtal-{method.start}",
)
def test_fades_to_an_exact_plain_model(method, tmp_path):
    """Before the end it refuses to merge; afterwards the plain model gives the same outputs, to 1e-5."""
    net, adapter = adapted(method)
    x = inputs(4, 5, 16)
    if "token" in adapter.layers[net.site].reads:
        with pytest.raises(ValueError, match="depends on the input"):
            adapter.merge("b")
    faded(net, adapter, 16)
    assert "token" not in adapter.layers[net.site].reads
    y = net(x, task_ids=torch.full((4,), 1))
    adapter.save(tmp_path / "adapter")
    plain = adapter.merge("b")
    assert not any("lora" in name or "router" in name for name, _ in plain.named_parameters())
    assert_close(plain(x), y, atol=1e-5, rtol=0)
    loaded = Adapter.load(tmp_path / "adapter", base(method))  # it is faded there too
    assert_close(loaded.merge("b")(x), y, atol=1e-5, rtol=0)


def test_fading_follows_the_training():
    method = EMTAL(num_experts=4, rank=2, fade=(0.25, 0.75))
    _, adapter = adapted(method)
    kept = []
    for done in (0.1, 0.25, 0.5, 0.625, 0.75, 1.0):
        adapter.before_step(done)
        kept.append(float(adapter.layers["v"].kept))
    assert kept == [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]


def test_without_its_router_a_released_emtal_is_the_block_and_loras():
    """a = 0: the gate is 1, and K does not matter."""
    x, found = inputs(4, 5, 16), []
    for count in (2, 8):
        net, adapter = adapted(EMTAL(num_experts=count, rank=2), trained=False)
        disturb(adapter)
        for layer in adapter.layers.values():
            for name, p in layer.named_parameters():
                if name.endswith(("lora_A", "lora_B")):
                    p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
        adapter.before_step(1.0)
        found.append(net(x, task_ids=IDS))
    assert_close(found[0], found[1])


def test_before_the_end_the_cure_is_to_go_on_fading():
    for method in (EMTAL(num_experts=4), Faded()):
        _, adapter = adapted(method)
        assert "until 50% of the training" in adapter.summary().merges
        with pytest.raises(ValueError, match="its router has not faded: train to the end of `fade`"):
            adapter.merge("a")
        adapter.before_step(1.0)
        adapter.merge("a")
    assert hash(Faded()) == hash(Faded(of="hydralora")) != hash(Faded(of="mode"))


@pytest.mark.parametrize("of", ["ase", "lora", "moore", "smora", "nothing", "mixlora"])
def test_what_cannot_fade_is_refused(of):
    with pytest.raises(ValueError, match=r"can fade|names no method|adapts feed-forward blocks"):
        adapt(Net(), Faded(of=of), tasks=list("abc"), targets=["q"])


def test_groups_are_balanced_near_and_the_same_again():
    torch.manual_seed(0)
    centres = 10 * torch.randn(4, 6)
    rows = (centres.repeat_interleave(5, 0) + 0.1 * torch.randn(20, 6))[torch.randperm(20)]
    ids = balanced_clusters(rows, 4)
    assert ids.bincount().tolist() == [5, 5, 5, 5]
    spread = sum((rows[ids == e] - rows[ids == e].mean(0)).square().sum() for e in range(4))
    assert spread < 20 * 6 * 0.1**2 * 2, "the four clouds were not found"
    assert torch.equal(ids, balanced_clusters(rows, 4))
    noise = torch.randn(60, 6)
    ids = balanced_clusters(noise, 5)
    assert ids.bincount().tolist() == [12] * 5
    cut = torch.arange(60) % 5

    def within(ids):
        return sum((noise[ids == e] - noise[ids == e].mean(0)).square().sum() for e in range(5))

    assert within(ids) < 0.85 * within(cut)
    with pytest.raises(ValueError, match="divisor"):
        balanced_clusters(noise, 7)


def test_sizes_that_do_not_divide_are_refused():
    for method in (EMTAL(num_experts=7), FGMoE(num_experts=7)):
        with pytest.raises(ValueError, match="divi"):
            adapt(BlockNet(), method, tasks=list("abc"))


def test_a_soft_mixture_fades_as_a_gate():
    """a = 0.5: halfway between the gate's weights and equal ones."""
    net, adapter = adapted(Faded(of={"name": "hydralora", "num_experts": 3, "rank": 2}, fade=(0.0, 1.0)))
    twin, other = adapted(HydraLoRA(num_experts=3, rank=2))
    other.load_state_dict({k: v for k, v in adapter.state_dict().items() if not k.endswith("kept")})
    adapter.before_step(0.5)
    x = inputs(6, 16)
    gate, plain = adapter.layers["q"].gate, other.layers["q"].gate
    logits = inputs(6, 3)
    assert_close(gate(logits), 0.5 * plain(logits) + 0.5 / 3)
    adapter.before_step(1e-12)
    ids = torch.zeros(6, dtype=torch.long)
    assert_close(net(x, task_ids=ids), twin(x, task_ids=ids))
