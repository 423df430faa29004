"""Each method against a loop written from its paper's equation: no primitive, no stacking, no batching. fp64, 1e-10."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from polyrank import ASE, LoRA, MoORE, MoORETopK, MoRE, adapt
from small import IDS, METHODS, inputs

SHAPES = {"wide": (10, 14), "tall": (14, 10), "square": (12, 12)}


def svd(weight):
    """LAPACK's own, with the sign convention of the factors: the largest entry of each right vector is positive."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    for i in range(len(vt)):
        if vt[i][vt[i].abs().argmax()] < 0:
            u[:, i], vt[i] = -u[:, i], -vt[i]
    return u, sigma, vt


def reflected(vectors, x):
    """x H_1 ... H_L, one reflection after the other."""
    for v in vectors:
        v = v / v.norm()
        x = x - 2 * (x @ v) * v
    return x


def moore_logits(method, p, prefix, x, sample, t):
    task = f"{prefix}router." if method.router == "task" else f"{prefix}router.routers.0."
    logits = p[f"{task}proj"] @ p[f"{task}embedding"][t]
    if method.router != "task":
        seen = x if method.router == "token" else sample.mean(0)
        logits = logits + p[f"{prefix}router.routers.1.up"] @ (p[f"{prefix}router.routers.1.down"] @ seen)
    return logits


def naive_lora(method, p, weight, bias, x, ids):
    y = torch.stack(
        [
            weight @ t + bias + method.alpha / method.rank * (p["experts.lora_B"].t() @ (p["experts.lora_A"] @ t))
            for t in x.flatten(0, 1)
        ]
    )
    return y.view(*x.shape[:2], -1), 0.0


def naive_moore(method, p, weight, bias, x, ids):
    u, sigma, vt = svd(weight)
    out = []
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            g = (sigma + moore_logits(method, p, "", token, sample, t)).clamp_min(0)
            turned = reflected(p["reflections.vectors"], token)
            out.append(sum(g[d] * u[:, d] * (vt[d] @ turned) for d in range(len(sigma))) + bias)
    return torch.stack(out).view(*x.shape[:2], -1), 0.0


def naive_moore_topk(method, p, weight, bias, x, ids):
    u, sigma, vt = svd(weight)
    out = []
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            s = sigma[: method.k]
            delta = (s + moore_logits(method, p, "", token, sample, t)).clamp_min(0) - s
            turned = reflected(p["experts.reflections.vectors"], token)
            y = weight @ turned + bias
            out.append(y + sum(delta[d] * u[:, d] * (vt[d] @ turned) for d in range(method.k)))
    return torch.stack(out).view(*x.shape[:2], -1), 0.0


def naive_more(method, p, weight, bias, x, ids):
    out, contrast = [], []
    for sample, t in zip(x, ids, strict=True):
        prob = torch.softmax(p["router.proj"] @ p["router.embedding"][t] + p["router.bias"], 0)
        r = int(prob.argmax())
        pi = prob[r] - prob[r].detach() + 1
        power = {"none": 0, "row": 1, "released": 2}[method.scaling]
        for token in sample:
            y = weight @ token + bias
            for i in range(r + 1):
                s = ((i + 1) / method.rank) ** power
                y = y + method.alpha / method.rank * pi * s * p["experts.lora_B"][i] * (p["experts.lora_A"][i] @ token)
            out.append(y)
        h = sample.mean(0) if method.pooling == "mean" else sample[0]
        near = torch.stack([torch.dot(h, e) / h.norm() / e.norm() for e in p["router.embedding"]])
        contrast.append(-torch.log_softmax(near / method.temperature, 0)[t])
    return torch.stack(out).view(*x.shape[:2], -1), method.contrastive * torch.stack(contrast).mean()


def naive_ase(method, p, weight, bias, x, ids):
    n, s, r = method.num_experts, method.num_shared, method.rank
    out, joint = [], [[0.0] * (n - s) for _ in range(len(p["router.weights"]))]
    for sample, t in zip(x, ids, strict=True):
        for token in sample:
            z = p["router.weights"][t] @ token
            routed = sorted(range(s, n), key=lambda e: -z[e].item())[: method.k]
            if method.gate in ("joint", "renormalised"):
                active = [*range(s), *routed]
                total = sum(z[e].exp() for e in active)
                gate = {e: z[e].exp() / total for e in active}
            else:
                total = sum(z[e].exp() for e in range(s, n))
                gate = {e: z[e].exp() / total for e in routed} | dict.fromkeys(range(s), 1.0)
            y = weight @ token + bias
            for e, g in gate.items():
                rows = slice(e * r, (e + 1) * r)
                y = y + method.alpha / r * g * (p["experts.lora_B"][rows].t() @ (p["experts.lora_A"][rows] @ token))
            out.append(y)
            prob = torch.softmax(z[s:], 0)
            joint[int(t)] = [a + b for a, b in zip(joint[int(t)], prob, strict=True)]
    tokens = x.shape[0] * x.shape[1]
    aux = torch.zeros((), dtype=x.dtype)
    for i in range(len(joint)):
        for j in range(n - s):
            here = joint[i][j] / tokens
            if isinstance(here, torch.Tensor):
                pi = sum(joint[i]) / tokens
                pj = sum(row[j] for row in joint) / tokens
                aux = aux - here * torch.log(here / (pi * pj) + 1e-4)
    return torch.stack(out).view(*x.shape[:2], -1), method.mutual_information * aux


NAIVE = {LoRA: naive_lora, MoORE: naive_moore, MoORETopK: naive_moore_topk, MoRE: naive_more, ASE: naive_ase}


def both(method, net, adapter, x, target):
    """(outputs, gradients, loss) of the layer and of its naive twin."""
    layer = adapter.layers["0"]
    weight, bias = layer.base.weight.detach(), layer.base.bias
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()
    twin = {k.removeprefix("0."): p.detach().clone().requires_grad_() for k, p in adapter.named_parameters()}
    found = []
    net.zero_grad()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    y = net(xs[0], task_ids=IDS)
    loss = (y - target).square().mean() + sum(adapter.losses().values(), torch.zeros((), dtype=x.dtype))
    loss.backward()
    found.append((y, {k.removeprefix("0."): p.grad for k, p in adapter.named_parameters()}, xs[0].grad, loss))
    y, aux = NAIVE[type(method)](method, twin, weight, bias, xs[1], IDS)
    loss = (y - target).square().mean() + aux
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in twin.items()}
    found.append((y, grads, xs[1].grad, loss))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_equals_the_equation(name, shape):
    """Outputs and all gradients, at the start and after three training steps."""
    method = METHODS[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(*SHAPES[shape], bias=shape != "square")).double()
    adapter = adapt(net, method, tasks=list("abc"), targets="0")
    optimizer = torch.optim.SGD(adapter.parameters(), 0.3)
    for step in range(5):
        x = inputs(4, 3, SHAPES[shape][0], seed=step, dtype=torch.float64)
        target = inputs(4, 3, SHAPES[shape][1], seed=50 + step, dtype=torch.float64)
        here, naive = both(method, net, adapter, x, target)
        for got, want in zip(here, naive, strict=True):
            assert_close(got, want, atol=1e-10, rtol=1e-10)
        optimizer.step()
    assert (net(x, task_ids=IDS) - adapter.layers["0"].base(x)).abs().max() > 1e-3, (
        "nothing was learnt: the test is empty"
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_equals_the_equation_under_autocast(name):
    """In bf16, outputs and gradients stay within its rounding (2^-8, a few products deep) of the fp64 equation."""
    method = METHODS[name]
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(48, 32))
    adapter = adapt(net, method, tasks=list("abc"), targets="0")
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
        method, twin, layer.base.weight.detach().double(), layer.base.bias.detach().double(), x.double(), IDS
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
