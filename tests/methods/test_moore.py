"""MoORE's two promises: experts stay orthonormal, and the adapted weight stays inside the range of W."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import LoRA, MoORE, MoORETopK, adapt
from polyrank.svd import expert_gram, factorise, outside_range

WEIGHTS = {
    "wide": (10, 18, 10),
    "tall": (18, 10, 10),
    "rank-deficient": (16, 16, 5),
    "tall rank-deficient": (20, 12, 4),
}


def trained(method, kind, steps=5):
    """A layer with a given (O, I, rank of W), after a few live steps on random targets of two tasks."""
    torch.manual_seed(4)
    out_features, in_features, rank = WEIGHTS[kind]
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(
            torch.randn(out_features, rank).double() @ torch.randn(rank, in_features).double() / rank**0.5
        )
    net = nn.Sequential(base)
    adapter = adapt(net, method, tasks=["a", "b"], targets="0")
    optimizer = torch.optim.SGD(adapter.parameters(), 0.02)
    for _ in range(steps):
        x, y = torch.randn(8, in_features).double(), torch.randn(8, out_features).double()
        optimizer.zero_grad()
        (net(x, task_ids=torch.arange(8) % 2) - y).square().mean().backward()
        optimizer.step()
    return net, adapter.layers["0"]


def change(net, layer, task):
    """What the layer adds to W, from its outputs alone; a linear map because the gate is the task's."""
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    bias = layer.bias
    return (net(eye, task_ids=torch.full((len(eye),), task)) - bias).T.detach() - layer.base.weight


@pytest.mark.parametrize("kind", WEIGHTS)
def test_experts_stay_orthonormal(kind):
    _, layer = trained(MoORE(num_reflections=4, router="task"), kind)
    moved = layer.reflections.vectors.detach()
    assert (moved[0] - moved[1]).abs().max() > 1e-4, "the reflections did not move: the test is empty"
    p = layer.reflections.matrix().detach()
    assert_close(p.T @ p, torch.eye(len(p), dtype=torch.float64), atol=1e-10, rtol=0)
    gram = expert_gram(*layer.experts()).detach()
    assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("tokens", [2, 40])
def test_transposed_input_of_few_and_many_tokens(tokens):
    net, layer = trained(MoORE(num_reflections=4, router="task"), "wide")
    x = torch.randn(3, tokens, layer.in_features, dtype=torch.float64)
    ids = torch.zeros(tokens, dtype=torch.long)
    assert_close(net(x.transpose(0, 1), task_ids=ids), net(x.transpose(0, 1).contiguous(), task_ids=ids))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    "method",
    [MoORE(num_reflections=4, router="task"), MoORETopK(k=3, num_reflections=4, router="task")],
    ids=["full", "topk"],
)
def test_the_change_stays_inside_the_range_of_the_weight(method, kind):
    net, layer = trained(method, kind)
    for task in range(2):
        delta = change(net, layer, task)
        share = delta.norm() / layer.base.weight.norm()
        left = (layer.base.weight + delta).norm() / layer.base.weight.norm()
        assert min(share, left) > 1e-2, "nothing changed, or every gate closed: the test is empty"
        assert outside_range(layer.base.weight, delta) < 1e-10


def test_lora_and_the_released_form_leave_the_range():
    """So the test above can fail: LoRA on a tall weight, and relu(sigma + ...) that opens null directions."""
    for method, kind in [
        (LoRA(rank=4), "tall"),
        (MoORE(num_reflections=4, router="task", null_directions="released"), "rank-deficient"),
    ]:
        net, layer = trained(method, kind)
        assert outside_range(layer.base.weight, change(net, layer, 0)) > 0.01


@pytest.mark.parametrize("shape", [(300, 280), (280, 900), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors(shape, dtype, tmp_path, monkeypatch):
    """Exact to the dtype, orthonormal, ordered; the same from the cache; a damaged cache file is computed anew."""
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    first, again = factorise(weight), factorise(weight)
    eps = 1e-12 if dtype == torch.float64 else 1e-5
    k = min(shape)
    assert_close(first.u @ torch.diag(first.sigma) @ first.vt, weight.to(first.u.dtype), atol=eps * 10, rtol=eps * 10)
    for part in (first.u.T @ first.u, first.vt @ first.vt.T):
        assert_close(part, torch.eye(k, dtype=part.dtype), atol=eps, rtol=0)
    assert (first.sigma.diff() <= 0).all()
    assert torch.equal(first.vt, again.vt)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"cut")
    assert torch.equal(factorise(weight).u, first.u)


def test_a_weight_without_svd_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        factorise(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("router", ["token", "sample", "task"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_layer_equals_plain_autograd(router, tokens):
    """Fewer tokens than directions and more: P is folded into x, or into V. The gate is made again for gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10).double())
    method = MoORE(router=router, router_dim=3, task_dim=4, num_reflections=4)
    adapter = adapt(net, method, tasks=["a", "b"], targets="0")
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.5)
    layer, trained = adapter.layers["0"], list(adapter.parameters())
    x = torch.randn(2, tokens, 12).double().requires_grad_()
    ids, dy = torch.tensor([1, 0]), torch.randn(2, tokens, 10).double()

    def plain():
        routers = [layer.router] if router == "task" else list(layer.router.routers)
        logits = (torch.stack(routers[0].embedding.each()) @ routers[0].proj.T)[ids][:, None]
        if router != "task":
            seen = x if router == "token" else x.mean(1, keepdim=True)
            logits = logits + seen @ routers[1].down.T @ routers[1].up.T
        h = x @ layer.reflections.matrix() @ layer.vt.T
        return (torch.relu(layer.sigma + logits) * h) @ layer.u.T + layer.bias

    y, want = net(x, task_ids=ids), plain()
    assert_close(y, want, atol=1e-10, rtol=1e-10)
    got = torch.autograd.grad(y, [x, *trained], dy)
    assert_close(got, torch.autograd.grad(want, [x, *trained], dy), atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        net.eval()
        assert_close(net(x, task_ids=ids), want, atol=1e-10, rtol=1e-10)


def test_the_layer_is_differentiable_once_and_says_so():
    net = nn.Sequential(nn.Linear(12, 10))
    adapter = adapt(net, MoORE(router_dim=3), tasks=["a"], targets="0")
    x = torch.randn(2, 12, requires_grad=True)
    (g,) = torch.autograd.grad(net(x, task_ids=torch.tensor([0])).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    assert adapter.layers
