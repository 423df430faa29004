"""MoRE's selector is alive, and it adapts: it does not only change."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import MoRE, adapt
from polyrank.methods import selected_ranks
from small import IDS, inputs

STEPS, RANK, WIDTH, RATE = 400, 8, 24, 1e-2


def planted(seed: int) -> list[tuple[int, int]]:
    """Train on a task that needs rank 1 and one that needs rank 8, in mixed batches; their ranks after each step."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q for _ in range(2))
    change = torch.stack([u[:, RANK : RANK + 1] @ v[:, RANK : RANK + 1].T, u[:, :RANK] @ v[:, :RANK].T])  # (T, O, I)
    means = 0.5 * torch.randn(2, 1, WIDTH)
    adapter = adapt(net, MoRE(rank=RANK, alpha=8), tasks=["low", "high"], targets="0")
    optimizer = torch.optim.AdamW(adapter.param_groups(RATE))
    ranks = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        ids = torch.arange(16) % 2
        x = torch.randn(16, 4, WIDTH) + means[ids]
        target = x @ weight.T + bias + torch.einsum("bli,boi->blo", x, change[ids])
        optimizer.zero_grad()
        loss = (net(x, task_ids=ids) - target).square().sum(-1).mean() + adapter.losses()["contrastive"]
        loss.backward()
        optimizer.step()
        low, high = selected_ranks(adapter.layers)["0"]
        ranks.append((low, high))
    return ranks


def test_ranks_come_out_ordered_by_need():
    """At least 4 of 5 seeds; and the ranks still change after the first tenth of training."""
    runs = [planted(seed) for seed in range(5)]
    assert all(run[0] == (RANK, RANK) for run in runs)
    assert sum(low < high for low, high in (run[-1] for run in runs)) >= 4
    assert sum(len(set(run[STEPS // 10 :])) > 1 for run in runs) >= 4


def test_the_selector_has_gradient_through_the_chosen_probability_only():
    """d loss / d logits = d loss / d pi * p_r (onehot_r - p): a vector of that direction, and no other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8)).double()
    adapter = adapt(net, MoRE(rank=4, contrastive=0), tasks=list("abc"), targets="0")
    layer = adapter.layers["0"]
    torch.nn.init.normal_(layer.experts.lora_B)
    net(inputs(4, 5, 16, dtype=torch.float64), task_ids=IDS).square().sum().backward()
    p = torch.softmax(layer.router.logits().detach(), -1)  # (T, R)
    r = p.argmax(-1)
    direction = p.gather(-1, r[:, None]) * (nn.functional.one_hot(r, 4) - p)
    found = layer.router.bias.grad
    factor = torch.linalg.lstsq(direction.t(), found[:, None])
    assert found.abs().max() > 1e-3
    assert_close(direction.t() @ factor.solution, found[:, None], atol=1e-10, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_contrastive_loss_leaves_padding_out(pooling):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    net.forward = lambda x, attention_mask=None: net[0](x)  # a root that takes a mask
    adapter = adapt(net, MoRE(rank=4, pooling=pooling), tasks=list("abc"), targets="0")
    x, mask = inputs(4, 5, 16), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    found = []
    for padding in (0.0, 7.0):
        x[:, 3:] = padding
        net(x, attention_mask=mask, task_ids=IDS)
        found.append(adapter.losses()["contrastive"])
    assert_close(found[0], found[1])
