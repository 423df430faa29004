"""AdaLoRA's budget: how it falls, what importance is, who is pruned and may come back, and that resumed runs agree."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from polyrank import Adapter, adapt
from polyrank.methods import AdaLoRA
from small import IDS, TASKS, Net, adapted, inputs

METHOD = AdaLoRA(init_rank=5, target_rank=2, alpha=40, begin=0.2, end=0.7, orthogonality=0.3)
STEPS = 20


def experts_of(adapter):
    return {name: layer.experts for name, layer in adapter.layers.items()}


def backward(net, adapter, step):
    """The gradients of one step, auxiliary losses included."""
    x = inputs(4, 5, 16, seed=step, dtype=torch.float64)
    target = inputs(4, 5, 3, seed=100 + step, dtype=torch.float64)
    net.zero_grad()
    loss = (net(x, task_ids=IDS) - target).square().mean() + sum(adapter.losses().values(), torch.zeros(()))
    loss.backward()


def train(net, adapter, optimizer, steps, total=STEPS):
    for step in steps:
        backward(net, adapter, step)
        adapter.before_step(step / total)
        optimizer.step()
        adapter.after_step()


def start(method=METHOD, trained=False):
    net, adapter = adapted(method, trained=trained, dtype=torch.float64)
    return net, adapter, torch.optim.Adam(adapter.param_groups(0.02))


def living(adapter):
    """How many lambdas of each layer are not zero."""
    return {name: int((experts.lora_E != 0).sum()) for name, experts in experts_of(adapter).items()}


def test_the_budget_by_hand():
    method = AdaLoRA(init_rank=12, target_rank=8, begin=0.1, end=0.5)
    # 3 layers: from 36 to 24; half way 24 + 12 / 8; three quarters 24 + 12 / 64
    want = {0: 36, 0.05: 36, 0.1: 36, 0.2: 24 + int(12 * 0.75**3), 0.3: 25, 0.4: 24, 0.5: 24, 0.7: 24, 0.999: 24}
    assert {done: method.budget(3, done) for done in want} == want
    assert want[0.2] == 29
    at_once = AdaLoRA(init_rank=6, target_rank=1, begin=0.4, end=0.4)
    assert [at_once.budget(2, done) for done in (0.39, 0.4, 0.41)] == [12, 2, 2]
    never = AdaLoRA(init_rank=6, target_rank=6)
    assert {never.budget(2, k / 10) for k in range(10)} == {12}


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="above init_rank=3"):
        AdaLoRA(init_rank=3, target_rank=4)
    with pytest.raises(ValueError, match=r"begin=0.6 is after end=0.5"):
        AdaLoRA(begin=0.6)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        AdaLoRA(end=7)


class Remembered:
    """s(w) of one number after the other, as the paper has it."""

    def __init__(self, beta1, beta2):
        self.beta1, self.beta2, self.mean, self.spread = beta1, beta2, 0.0, 0.0

    def see(self, weight, gradient):
        now = abs(weight * gradient)
        self.mean = self.beta1 * self.mean + (1 - self.beta1) * now
        self.spread = self.beta2 * self.spread + (1 - self.beta2) * abs(now - self.mean)
        return self.mean * self.spread


def test_importance_is_that_of_the_paper():
    """Three steps, number by number, with different betas."""
    net, adapter, optimizer = start(AdaLoRA(init_rank=3, target_rank=1, begin=0.9, end=1, beta1=0.6, beta2=0.8))
    memory, scores = {}, {}
    for step in range(3):
        backward(net, adapter, step)
        for name, experts in experts_of(adapter).items():
            for i in range(3):
                parts = []
                for part, tensor in (("E", experts.lora_E), ("P", experts.lora_B), ("Q", experts.lora_A)):
                    values, gradients = tensor[i].detach().reshape(-1), tensor.grad[i].reshape(-1)
                    each = [
                        memory.setdefault((name, i, part, j), Remembered(0.6, 0.8)).see(float(w), float(g))
                        for j, (w, g) in enumerate(zip(values, gradients, strict=True))
                    ]
                    parts.append(sum(each) / len(each))
                scores[name, i] = sum(parts)
        adapter.before_step(step / 3)
        optimizer.step()
        adapter.after_step()
        for name, experts in experts_of(adapter).items():
            want = torch.tensor([scores[name, i] for i in range(3)], dtype=torch.float64)
            assert want.min() > 0
            assert_close(experts.importance(), want, atol=0, rtol=1e-10)


def test_the_most_important_of_all_layers_live():
    """Exactly as many as the budget says, after every step."""
    net, adapter, optimizer = start()
    counts, uneven = [], False
    for step in range(STEPS):
        train(net, adapter, optimizer, [step])
        budget = METHOD.budget(2, step / STEPS)
        counts.append(budget)
        assert sum(living(adapter).values()) == budget
        uneven |= len(set(living(adapter).values())) > 1
        if step / STEPS < METHOD.end:  # as long as a choice is made: nobody outside scores more than anybody inside
            flat = [
                (score, value != 0)
                for experts in experts_of(adapter).values()
                for score, value in zip(experts.importance().tolist(), experts.lora_E.tolist(), strict=True)
            ]
            best = sorted(flat, key=lambda pair: -pair[0])[:budget]
            assert all(alive for _, alive in best)
    assert counts[0] == 10
    assert counts[-1] == 4
    assert counts == sorted(counts, reverse=True)
    assert uneven, "all layers kept the same rank: the test is empty"


def test_the_choice_stays_from_the_end_on():
    net, adapter, optimizer = start()
    train(net, adapter, optimizer, range(15))
    before = {name: experts.lora_E != 0 for name, experts in experts_of(adapter).items()}
    with torch.no_grad():
        for experts in experts_of(adapter).values():
            experts.sensitivity.copy_(inputs(*experts.sensitivity.shape, seed=4).abs() * 1e3)
    values = {name: experts.lora_E.detach().clone() for name, experts in experts_of(adapter).items()}
    train(net, adapter, optimizer, range(15, STEPS))
    for name, experts in experts_of(adapter).items():
        assert torch.equal(experts.lora_E != 0, before[name])
        assert not torch.equal(experts.lora_E, values[name]), "nothing was trained: the test is empty"


def test_a_pruned_triplet_may_come_back():
    """Only its lambda is zeroed: P_i, Q_i and the gradient of lambda_i are alive."""
    net, adapter, optimizer = start()
    train(net, adapter, optimizer, range(11))
    experts = adapter.layers["q"].experts
    pruned = int((experts.lora_E == 0).nonzero()[0])
    assert experts.lora_A[pruned].abs().max() > 0
    assert experts.lora_B[pruned].abs().max() > 0
    backward(net, adapter, 11)
    assert experts.lora_E.grad[pruned] != 0
    with torch.no_grad():
        experts.sensitivity[pruned] = 1e3  # it matters after all
    train(net, adapter, optimizer, [11])
    assert experts.lora_E[pruned] != 0
    assert sum(living(adapter).values()) == METHOD.budget(2, 11 / STEPS)


def test_pruning_at_once_where_no_step_fell_into_the_schedule():
    """A short training may jump over it."""
    net, adapter, optimizer = start(AdaLoRA(init_rank=5, target_rank=2, alpha=40, begin=0.4, end=0.4))
    train(net, adapter, optimizer, range(2), total=2)
    assert sum(living(adapter).values()) == 4


def test_the_orthogonality_loss_by_hand():
    """Rows (3, 4) / 5 and (0, 2): the first is a unit, the products are 1.6, the second is of length 4, squared."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    adapter = adapt(net, AdaLoRA(init_rank=2, target_rank=1, orthogonality=0.5), tasks=TASKS, targets=["0", "1"])
    first, second = (experts for experts in experts_of(adapter).values())
    with torch.no_grad():
        for rows in (first.lora_A, first.lora_B, second.lora_A, second.lora_B):
            rows.copy_(torch.eye(2))
        first.lora_A.copy_(torch.tensor([[0.6, 0.8], [0.0, 2.0]]))
        second.lora_B[1] *= 0
    x = inputs(4, 3, 2, dtype=torch.float64)
    net(x)
    of_first, of_second = 2 * 1.6**2 + (4 - 1) ** 2, 1.0
    loss = adapter.losses()["orthogonality"]
    assert_close(loss, torch.tensor(0.5 * (of_first + of_second) / 2, dtype=torch.float64))
    loss.backward()
    assert first.lora_A.grad.abs().max() > 0
    assert first.lora_B.grad.abs().max() == 0  # orthonormal already
    net.eval()
    net(x)
    assert adapter.losses() == {}


def test_the_orthogonality_loss_keeps_its_precision_under_autocast():
    net, adapter = adapted(METHOD)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            net(inputs(4, 5, 16), task_ids=IDS)
            found.append(adapter.losses()["orthogonality"])
    assert_close(found[1], found[0], atol=0, rtol=1e-6)


def test_a_step_that_is_not_finite_leaves_nothing_behind():
    """The loop does not take it; importance must not remember it either."""
    net, adapter, optimizer = start()
    train(net, adapter, optimizer, range(8))
    before = {name: p.clone() for name, p in adapter.state_dict().items()}
    for bad in (math.nan, math.inf):
        backward(net, adapter, 8)
        adapter.layers["v"].experts.lora_A.grad[1, 2] = bad
        adapter.before_step(8 / STEPS)
        assert_close(adapter.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("cut", [2, 9, 16], ids=["before", "while-it-falls", "after"])
def test_a_resumed_run_goes_on_bit_for_bit(cut, tmp_path):
    """Through the adapter's files and the optimiser's state, into a model built anew."""
    net, adapter, optimizer = start()
    train(net, adapter, optimizer, range(cut))
    adapter.save(tmp_path / "adapter")
    moments = copy.deepcopy(optimizer.state_dict())
    train(net, adapter, optimizer, range(cut, STEPS))
    torch.manual_seed(1)
    fresh = Net().double()
    resumed = Adapter.load(tmp_path / "adapter", fresh)
    again = torch.optim.Adam(resumed.param_groups(0.02))
    again.load_state_dict(moments)
    train(fresh, resumed, again, range(cut, STEPS))
    assert living(resumed) == living(adapter)
    assert_close(resumed.state_dict(), adapter.state_dict(), atol=0, rtol=0)


def test_what_is_saved_is_three_times_the_weights():
    _, adapter = adapted(METHOD)
    trained = sum(p.numel() for p in adapter.parameters())
    assert trained == 5 * (16 + 24 + 1) + 5 * (24 + 12 + 1)
    assert sum(p.numel() for p in adapter.state_dict().values()) == 3 * trained + 2 * 5  # and who lives
    grouped = [p for group in adapter.param_groups(0.1) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in adapter.parameters()}


def test_the_change_has_the_rank_that_lives():
    net, adapter, optimizer = start()
    train(net, adapter, optimizer, range(STEPS))
    ranks = living(adapter)
    changes = {name: layer.task_weight(0) - layer.weight for name, layer in adapter.layers.items()}
    assert {name: int(torch.linalg.matrix_rank(change)) for name, change in changes.items()} == ranks
    assert sum(ranks.values()) == 4
    assert adapter.summary().active_parameters == ranks["q"] * (16 + 24 + 1) + ranks["v"] * (24 + 12 + 1)
    x = inputs(4, 5, 16, dtype=torch.float64)
    y = net(x)
    assert_close(adapter.merge("a")(x), y, atol=1e-12, rtol=1e-12)
