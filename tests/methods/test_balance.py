"""Balance losses: their scale, what they leave out, and where their gradient goes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import adapt
from polyrank.methods import LoRAMoE, MALoRA, MoLA
from polyrank.mixture import load_balance
from small import IDS, TASKS, adapted, inputs

MOLA = MoLA(num_experts=(4,), k=2, rank=2, alpha=4, balance=0.1)
METHODS = {
    "mola": MOLA,
    "malora": MALoRA(num_experts=4, k=2, rank=3, subspace=5, alpha=6, balance=0.1),
    "loramoe": LoRAMoE(num_experts=4, rank=2, alpha=4, balance=0.1),
    "loramoe-kinds": LoRAMoE(num_experts=4, rank=2, alpha=4, balance=0.1, delta=0.2, knowledge=("b",)),
}


def test_load_balance_is_1_for_even_routing_and_the_number_of_experts_for_collapse():
    even, one = torch.full((5,), 8.0), 40 * torch.eye(5)[2]
    assert_close(load_balance(torch.stack([even, even])), torch.tensor(1.0))
    assert_close(load_balance(torch.stack([one, one])), torch.tensor(5.0))
    assert_close(load_balance(torch.stack([one, even])), torch.tensor(1.0))
    layers = torch.stack([torch.stack([even, even]), torch.stack([one, one])])
    assert_close(load_balance(layers), torch.tensor([1.0, 5.0]))


def test_load_balance_by_hand():
    """Counts of two choices a token, masses of one: f and P are shares of each."""
    load = torch.tensor([[6.0, 2.0, 2.0], [3.5, 0.5, 1.0]], requires_grad=True)
    loss = load_balance(load)
    assert_close(loss, torch.tensor(3 * (0.6 * 0.7 + 0.2 * 0.1 + 0.2 * 0.2)))
    loss.backward()
    assert not load.grad[0].any(), "counts have no gradient"
    assert load.grad[1].any()


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_left_out(name):
    """Whatever stands in padded tokens, and whether there are any, the loss is that of the others."""
    net, adapter = adapted(METHODS[name])
    x, mask = inputs(4, 5, 16), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    net(x[:, :3], task_ids=IDS)
    want = adapter.losses()["balance"]
    for padding in (x[:, 3:].clone(), 9.0):
        x[:, 3:] = padding
        net(x, attention_mask=mask, task_ids=IDS)
        assert_close(adapter.losses()["balance"], want)
    net(x, task_ids=IDS)
    assert (adapter.losses()["balance"] - want).abs() > 1e-4, "padding does not matter: the test is empty"


@pytest.mark.parametrize("name", METHODS)
def test_padding_of_every_length_is_left_out(name):
    net, adapter = adapted(METHODS[name])
    x, mask = inputs(4, 5, 16), torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 3, 1, 2)])
    losses = []
    for padding in (0.0, 9.0):
        x[mask == 0] = padding
        net(x, attention_mask=mask, task_ids=IDS)
        losses.append(adapter.losses()["balance"])
    assert_close(losses[0], losses[1])


def test_no_balance_no_loss():
    net, adapter = adapted(MoLA(num_experts=(4,), k=2, rank=2, balance=0))
    net(inputs(4, 5, 16))
    assert adapter.losses() == {}
    net, adapter = adapted(MOLA)
    net.eval()
    net(inputs(4, 5, 16))
    assert adapter.losses() == {}


def test_gradient_pushes_a_skewed_router_towards_even_loads():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    adapter = adapt(net, MOLA, tasks=TASKS, targets="0")
    x = inputs(8, 16, 16) + 1  # tokens lean towards what the rows below lean towards
    router = adapter.layers["0"].router.weight
    with torch.no_grad():
        router += torch.tensor([0.2, 0.15, 0.0, 0.0]).unsqueeze(1)
    optimizer = torch.optim.SGD(adapter.parameters(), 1.0)

    def loss():
        net(x)
        return adapter.losses()["balance"] / MOLA.balance

    def loads():
        chosen = (x @ router.detach().t()).topk(2, -1).indices
        return torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()

    first, skewed = loss(), loads()
    assert first > 1.5
    assert skewed.max() > 0.45
    optimizer.zero_grad()
    first.backward()
    optimizer.step()
    assert loss() < first - 0.01
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 1.1
    assert loads().max() < 0.35


def localized(knowledge, own, delta=0.2):
    """LoRAMoE's loss where each kind of sample gives the share ``own`` of its gate to its own half of the experts."""
    net = nn.Sequential(nn.Linear(2, 3)).double()
    method = LoRAMoE(num_experts=4, rank=2, balance=1, delta=delta, knowledge=knowledge)
    adapter = adapt(net, method, tasks=["b", "a"], targets="0")
    to_own, to_other = torch.tensor(own / 2).log().item(), torch.tensor((1 - own) / 2).log().item()
    columns = [[to_own, to_own, to_other, to_other], [to_other, to_other, to_own, to_own]]
    with torch.no_grad():
        adapter.layers["0"].router.weight.copy_(torch.tensor(columns).t())
    ids = torch.tensor([0, 1])
    x = torch.eye(2, dtype=torch.float64)[ids].unsqueeze(1).expand(2, 5, 2)  # a sample's tokens tell its kind
    net(x, task_ids=ids)
    return adapter.losses()["balance"].item()


GRID = [i / 20 for i in range(1, 20)]


def test_localized_balance_ties_each_half_to_its_kind():
    """Its minimum gives a kind's own half of the experts (1 + delta) / 2 of the gate; turned round, it costs more."""
    best = min(GRID, key=lambda own: localized(("b",), own))
    assert best == 0.6
    assert localized(("b",), 0.6) < localized(("b",), 0.4)


def test_localized_balance_without_kinds_is_even():
    assert min(GRID, key=lambda own: localized((), own)) == 0.5
    assert localized((), 0.5) < 1e-12
    assert_close(localized((), 0.7), 0.4**2)  # Z is 0.7 and 0.3 of 2.5: deviations of 0.4 of the mean


def test_knowledge_names_tasks():
    with pytest.raises(ValueError, match=r"nowhere.*the tasks are \['a', 'b', 'c'\]"):
        adapted(LoRAMoE(num_experts=4, rank=2, knowledge=("b", "nowhere")))
