"""Each method against a loop written from its paper's equation: no primitive, no stacking, no batching. fp64, 1e-10."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from naive import NAIVE, by_name, svd
from polyrank import adapt
from small import BLOCKS, IDS, METHODS, NOISY, inputs

SHAPES = {"wide": (10, 14), "tall": (14, 10), "square": (12, 12)}


def both(method, net, adapter, x, target):
    """(outputs, gradients, loss) of the layer and of its naive twin."""
    layer = adapter.layers["0"]
    weight, bias = layer.base.weight.detach(), layer.base.bias
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()
    trained = {k.removeprefix("0."): p for k, p in adapter.named_parameters()}
    twin = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in trained.items()}
    found = []
    net.zero_grad()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y = net(xs[0], task_ids=IDS)
    loss = (y - target).square().mean() + sum(adapter.losses().values(), torch.zeros((), dtype=x.dtype))
    loss.backward()
    found.append((y, {k: p.grad for k, p in trained.items() if p.requires_grad}, xs[0].grad, loss))
    y, aux = NAIVE[type(method)](method, by_name(twin), weight, bias, xs[1], IDS)
    loss = (y - target).square().mean() + aux
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in twin.items() if p.requires_grad}
    found.append((y, grads, xs[1].grad, loss))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(set(METHODS) - BLOCKS))
def test_equals_the_equation(name, shape):
    """Outputs and all gradients, at the start and after three training steps."""
    method = METHODS[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(*SHAPES[shape], bias=shape != "square")).double()
    adapter = adapt(net, method, tasks=list("abc"), targets="0")
    net.train(not isinstance(method, NOISY))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.3)
    for step in range(5):
        x = inputs(4, 3, SHAPES[shape][0], seed=step, dtype=torch.float64)
        target = inputs(4, 3, SHAPES[shape][1], seed=50 + step, dtype=torch.float64)
        here, naive = both(method, net, adapter, x, target)
        for got, want in zip(here, naive, strict=True):
            assert_close(got, want, atol=1e-10, rtol=1e-10)
        adapter.before_step((step + 1) / 5)
        optimizer.step()
        adapter.after_step()
    assert (net(x, task_ids=IDS) - adapter.layers["0"].base(x)).abs().max() > 1e-3, (
        "nothing was learnt: the test is empty"
    )


@pytest.mark.parametrize("name", sorted(set(METHODS) - BLOCKS))
def test_equals_the_equation_under_autocast(name):
    """In bf16, outputs and gradients stay within its rounding (2^-8, a few products deep) of the fp64 equation."""
    method = METHODS[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(48, 32))
    adapter = adapt(net, method, tasks=list("abc"), targets="0")
    net.train(not isinstance(method, NOISY))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.3)
    for step in range(3):
        x, target = inputs(4, 3, 48, seed=step), inputs(4, 3, 32, seed=50 + step)
        optimizer.zero_grad()
        ((net(x, task_ids=IDS) - target).square().mean() + sum(adapter.losses().values(), torch.zeros(()))).backward()
        optimizer.step()
    net.zero_grad()
    x, target = x.bfloat16(), target.bfloat16()  # so that both see the same numbers
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.float(), task_ids=IDS)
    (y.double() - target.double()).square().mean().backward()
    got = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]).double()
    layer = adapter.layers["0"]
    twin = {k.removeprefix("0."): p.detach().double().requires_grad_() for k, p in adapter.named_parameters()}
    want, _ = NAIVE[type(method)](
        method, by_name(twin), layer.base.weight.detach().double(), layer.base.bias.detach().double(), x.double(), IDS
    )
    (want - target.double()).square().mean().backward()
    wanted = torch.cat(
        [twin[k.removeprefix("0.")].grad.flatten() for k, p in adapter.named_parameters() if p.grad is not None]
    )
    assert y.dtype == torch.bfloat16
    assert (y.double() - want).norm() / want.norm() < 4 * 2**-8
    if not any(part in name for part in ("ase",)):  # a near-tie may choose another expert: its gradient goes elsewhere
        assert (got - wanted).norm() / wanted.norm() < 8 * 2**-8
    assert math.isfinite(float(got.norm()))


def test_naive_svd_is_a_decomposition():
    """The twin itself must be right."""
    weight = inputs(7, 5, dtype=torch.float64)
    u, sigma, vt = svd(weight)
    assert_close(u @ torch.diag(sigma) @ vt, weight)
    assert_close(F.linear(torch.eye(5, dtype=torch.float64), vt), vt.t())
