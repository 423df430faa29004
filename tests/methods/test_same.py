"""SAME between tasks: what is remembered, and what it does to gradients and experts, against naive loops."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import polyrank.methods.same as same
from polyrank import Adapter, adapt
from polyrank.methods import SAME
from small import IDS, TASKS, Net, adapted, inputs

SIZES = {"num_experts": 3, "rank": 2, "alpha": 4}
PLAIN = {"routing": "plain", "scaling": "plain", "activation": "all"}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
EXACT = {"atol": 1e-10, "rtol": 1e-10}


class Run:
    """A net under a method, fed task by task; it knows every token that each layer has read."""

    def __init__(self, method, checkpointed=False, optimizer=torch.optim.SGD, dtype=torch.float64):
        self.net, self.adapter = adapted(method, dtype=dtype, checkpointed=checkpointed)
        self.net.context_fn = self.adapter.context.replay
        self.optimizer = optimizer(self.adapter.param_groups(0.05, 0.1))
        self.tokens = {name: [[]] for name in self.adapter.layers}  # of each task
        self.gates = {name: [[]] for name in self.adapter.layers}

    def layer(self, name):
        return self.adapter.layers[name]

    def forward(self, seed, mask=None, lean=0.0):
        """Gradients of one forward; what its layers read is written down."""
        x = inputs(4, 5, 16, seed=seed, dtype=next(self.net.parameters()).dtype)
        x = x * (1 + 3 * torch.arange(16) % 5) / 5 + lean * inputs(16, seed=900 + seed // 100, dtype=x.dtype)
        read, hooks = {}, []

        def note(name, module, args):
            read.setdefault(name, args[0].detach())

        for name, layer in self.adapter.layers.items():
            hooks.append(layer.register_forward_pre_hook(partial(note, name)))
        y = self.net(x, attention_mask=mask, task_ids=IDS)
        self.optimizer.zero_grad()
        (y - inputs(4, 5, 3, seed=seed + 50, dtype=y.dtype)).square().mean().backward()
        for hook in hooks:
            hook.remove()
        for name, tokens in read.items():
            for i, sample in enumerate(tokens):
                for j, token in enumerate(sample):
                    if mask is None or mask[i, j]:
                        self.tokens[name][-1].append(token)
                        self.gates[name][-1].append((self.layer(name).router.weight.detach() @ token).softmax(0))

    def gradients(self):
        found = {}
        for name, layer in self.adapter.layers.items():
            weights = {"G": layer.router.weight, "A": layer.experts.lora_A, "B": layer.experts.lora_B}
            found[name] = {key: p.grad.clone() for key, p in weights.items()}
        return found

    def step(self, seed, **how):
        """(gradients as the loss has them, gradients as the optimiser gets them)."""
        self.forward(seed, **how)
        before = self.gradients()
        self.adapter.before_step(0.5)
        after = self.gradients()
        self.optimizer.step()
        self.adapter.after_step()
        return before, after

    def over(self):
        self.adapter.after_task()
        for name in self.tokens:
            self.tokens[name].append([])
            self.gates[name].append([])


def two_tasks(method, **how):
    """After two tasks of two steps, of other inputs each."""
    run = Run(method, **how)
    for task in (0, 1):
        for step in (0, 1):
            run.step(100 * task + step, lean=2.0)
        run.over()
    return run


def covariance(tokens):
    total = torch.zeros(len(tokens[0]), len(tokens[0]), dtype=torch.float64)
    for token in tokens:
        total += torch.outer(token, token)
    return total / len(tokens)


def before_now(run, name):
    return [token for task in run.tokens[name][:-1] for token in task]


def leading(c, delta):
    """[(value, vector)] from the largest, until they have the share delta of the trace, and the mean of the rest."""
    values, vectors = torch.linalg.eigh(c)
    pairs, kept = sorted(zip(values.tolist(), vectors.t(), strict=True), key=lambda pair: -pair[0]), []
    while sum(value for value, _ in kept) < delta * float(c.trace()) and len(kept) < len(pairs):
        kept.append(pairs[len(kept)])
    rest = pairs[len(kept) :]
    return kept, sum(value for value, _ in rest) / max(1, len(rest))


def turned(rows, pairs, factors):
    """Each row, with its component along each vector times that vector's factor."""
    out = []
    for row in rows:
        new = row.clone()
        for (_, vector), factor in zip(pairs, factors, strict=True):
            new = new + (factor - 1) * torch.dot(row, vector) * vector
        out.append(new)
    return torch.stack(out)


@pytest.mark.parametrize("delta", [0.8, 0.95])
@pytest.mark.parametrize("damping", ["full", "released"])
def test_the_routers_gradient_spares_what_the_tasks_before_used(delta, damping):
    run = two_tasks(SAME(**SIZES, **PLAIN | {"routing": "spectral"}, delta=delta, damping=damping))
    before, after = run.step(200)
    for name in ("q", "v"):
        pairs, rest = leading(covariance(before_now(run, name)), delta)
        if damping == "full":
            factors = [(rest / value) ** 0.5 for value, _ in pairs]
        else:
            roots = [value**0.5 for value, _ in pairs]
            smooth = [sum(roots[max(0, j - 2) : j + 1]) / len(roots[max(0, j - 2) : j + 1]) for j in range(len(roots))]
            factors = [max(0.8, min(smooth) / root) for root in smooth]
        assert_close(after[name]["G"], turned(before[name]["G"], pairs, factors), **EXACT)
        assert (after[name]["G"] - before[name]["G"]).abs().max() > 1e-3 * before[name]["G"].abs().max()
        assert torch.equal(after[name]["A"], before[name]["A"]) and torch.equal(after[name]["B"], before[name]["B"])


@pytest.mark.parametrize("delta", [0.6, 1.0])
def test_the_gradient_of_a_is_scaled_by_the_inverse_covariance(delta):
    mu = 0.7
    run = two_tasks(SAME(**SIZES, **PLAIN | {"scaling": "curvature"}, delta=delta, mu=mu))
    before, after = run.step(200)
    for name in ("q", "v"):
        c = covariance(before_now(run, name))
        pairs, _ = leading(c, delta)
        part = sum(value * torch.outer(vector, vector) for value, vector in pairs)
        whole = c if delta == 1 else part
        want = mu * before[name]["A"] @ torch.linalg.inv(whole + mu * torch.eye(len(c), dtype=c.dtype))
        assert_close(after[name]["A"], want, **EXACT)
        assert (after[name]["A"] - before[name]["A"]).abs().max() > 0.1 * before[name]["A"].abs().max()
        assert torch.equal(after[name]["G"], before[name]["G"]) and torch.equal(after[name]["B"], before[name]["B"])


def spread(mass):
    low, high = min(mass), max(mass)
    return [(one - low) / (high - low) for one in mass]


def naive_frozen(run, name, tau, frozen):
    """Which experts are frozen from this step on, in one layer."""
    mass = {}
    for key, gates in (
        ("old", [g for task in run.gates[name][:-1] for g in task]),
        ("new", run.gates[name][-1]),
    ):
        mass[key] = spread([float(sum(gate[i] for gate in gates)) for i in range(3)])
    scores = [new - old for old, new in zip(mass["old"], mass["new"], strict=True)]
    now = {i for i in range(3) if i in frozen or scores[i] < tau}
    if len(now) == 3:
        now.remove(max(set(range(3)) - frozen, key=lambda i: scores[i]))
    return now


@pytest.mark.parametrize("tau", [-0.2, 0.1, 0.9])
def test_experts_of_old_tasks_are_frozen_bit_for_bit_whatever_the_optimiser(tau):
    """AdamW's weight decay and moments move rows that have no gradient; so the same run with other rows shows."""
    method = SAME(**SIZES, **PLAIN | {"activation": "adaptive"}, tau=tau)
    run = two_tasks(method, optimizer=torch.optim.AdamW)
    frozen, kept, ever = {"q": set(), "v": set()}, {}, 0
    for step in range(5):
        weights = {
            (name, i): (
                run.layer(name).experts.lora_A[2 * i : 2 * i + 2].detach().clone(),
                run.layer(name).experts.lora_B[2 * i : 2 * i + 2].detach().clone(),
            )
            for name in ("q", "v")
            for i in range(3)
        }
        before, after = run.step(200 + step, lean=2.0)
        for name in ("q", "v"):
            frozen[name] = naive_frozen(run, name, tau, frozen[name])
            assert set(run.layer(name).router.frozen.nonzero().flatten().tolist()) == frozen[name]
            for i in range(3):
                rows, experts = slice(2 * i, 2 * i + 2), run.layer(name).experts
                now = experts.lora_A[rows].detach().clone(), experts.lora_B[rows].detach().clone()
                if i in frozen[name]:
                    ever += 1
                    kept.setdefault((name, i), weights[name, i])
                    assert all(torch.equal(a, b) for a, b in zip(now, kept[name, i], strict=True))
                    assert not after[name]["A"][rows].any() and not after[name]["B"][rows].any()
                else:
                    assert not torch.equal(now[0], weights[name, i][0])
                    assert torch.equal(after[name]["A"][rows], before[name]["A"][rows])
    assert 0 < ever < 30, "nothing, or everything, was frozen: the test is empty"
    run.over()
    run.step(300)
    assert not run.layer("q").router.frozen.all(), "the next task decides anew"


def test_without_momentum_and_decay_being_undone_the_rows_would_move():
    """The test above can fail: what is put back had moved."""
    run = two_tasks(SAME(**SIZES, **PLAIN | {"activation": "adaptive"}, tau=0.9), optimizer=torch.optim.AdamW)
    run.step(200)
    run.forward(201)
    run.adapter.before_step(0.5)
    frozen, held, _ = run.layer("q").router.held
    run.optimizer.step()
    rows = frozen.repeat_interleave(2)
    assert not torch.equal(run.layer("q").experts.lora_A[rows], held)


def test_a_first_task_is_trained_as_by_the_plain_mixture():
    one, other = Run(SAME(**SIZES)), Run(SAME(**SIZES, **PLAIN))
    for step in range(3):
        before, after = one.step(step)
        other.step(step)
        assert_close(after, before, atol=0, rtol=0)
    weights = [[p.detach() for p in run.adapter.parameters()] for run in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    one.over(), other.over()
    _, after = one.step(7)
    before, _ = other.step(7)
    assert not torch.equal(after["q"]["G"], before["q"]["G"]) and not torch.equal(after["q"]["A"], before["q"]["A"])


def state(run):
    return {key: value.clone() for key, value in run.adapter.state_dict().items()}


def test_what_is_saved_in_the_middle_of_a_task_is_all_there_is(tmp_path):
    """The next step of a loaded adapter is the same, bit for bit."""
    run = two_tasks(SAME(**SIZES, tau=0.0), dtype=torch.float32)
    for step in (200, 201):
        run.step(step, lean=2.0)
    run.adapter.save(tmp_path / "adapter")
    other = Run(SAME(**SIZES, tau=0.0), dtype=torch.float32)
    torch.manual_seed(1)
    fresh = Net()
    other.net, other.adapter = fresh, Adapter.load(tmp_path / "adapter", fresh)
    other.optimizer = torch.optim.SGD(other.adapter.param_groups(0.05, 0.1))
    assert state(run)["q.router.frozen"].any() and state(run)["q.router.present"].any()
    for step in (202, 203):
        run.step(step, lean=2.0), other.step(step, lean=2.0)
    run.over(), other.over()
    run.step(300), other.step(300)
    assert_close(state(other), state(run), atol=0, rtol=0)


def remembered(run, name):
    router = run.layer(name).router
    return router.sketch @ router.onto.t(), router.totals, router.present


def check_counts(run, name, tokens):
    moment, totals, present = remembered(run, name)
    assert_close(moment, len(tokens) * covariance(tokens), **EXACT)
    assert float(totals[0]) == len(tokens)
    assert_close(totals[1], sum(token @ token for token in tokens), **EXACT)
    assert_close(present, sum(run.gates[name][-1]), **EXACT)


def test_padding_does_not_count():
    run = Run(SAME(**SIZES))
    run.step(0, mask=MASK)
    run.step(1)
    for name in ("q", "v"):
        assert len(run.tokens[name][0]) == int(MASK.sum()) + 20
        check_counts(run, name, run.tokens[name][0])


def test_recomputation_does_not_count_again():
    run = Run(SAME(**SIZES), checkpointed=True)
    run.step(0)
    for name in ("q", "v"):
        check_counts(run, name, run.tokens[name][0])


def test_only_training_counts_and_a_refused_step_leaves_nothing():
    run = Run(SAME(**SIZES))
    run.step(0)
    before = state(run)
    run.net.eval()
    run.forward(1)
    run.net.train()
    with torch.no_grad():
        run.net(inputs(4, 5, 16, dtype=torch.float64), task_ids=IDS)
    run.adapter.before_step(0.1)
    run.adapter.after_step()
    assert_close(state(run), before, atol=0, rtol=0)
    run.net(torch.full((4, 5, 16), torch.inf, dtype=torch.float64), task_ids=IDS)
    run.adapter.before_step(0.2)  # not finite: the optimiser makes no step, and after_step is not called
    for name in ("q", "v"):
        del run.tokens[name][0][20:], run.gates[name][0][20:]
    run.step(2)
    for name in ("q", "v"):
        check_counts(run, name, run.tokens[name][0])


def test_a_refused_step_puts_nothing_back_later():
    """What was held for it is old by then."""
    run = two_tasks(SAME(**SIZES, tau=0.9))
    run.forward(200)
    run.adapter.before_step(0.5)
    with torch.no_grad():
        for p in run.adapter.parameters():
            p.zero_()
    run.adapter.before_step(0.5)
    run.adapter.after_step()
    assert not run.layer("q").experts.lora_A.any()


def test_all_processes_remember_what_each_of_them_read(monkeypatch):
    """Two halves of a batch, summed as the processes do it, are the whole."""
    whole, half = Run(SAME(**SIZES)), Run(SAME(**SIZES))
    x = inputs(4, 5, 16, dtype=torch.float64)
    whole.net(x, task_ids=IDS).sum().backward()
    whole.adapter.before_step(0)
    whole.adapter.after_step()
    half.net(x[2:], task_ids=IDS[2:]).sum().backward()
    theirs = iter([layer.router.heard for layer in half.adapter.layers.values()])
    for layer in half.adapter.layers.values():
        layer.router.heard = torch.zeros(0)
    half.net(x[:2], task_ids=IDS[:2]).sum().backward()
    monkeypatch.setattr(same, "global_sum", lambda mine: mine + next(theirs))
    half.adapter.before_step(0)
    half.adapter.after_step()
    assert_close(state(half), state(whole), **EXACT)


def test_a_wide_layers_sketch_is_exact_up_to_its_rank_and_never_too_large():
    components, width = 3, 40
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(width, 5)).double()
    adapter = adapt(net, SAME(**SIZES, components=components, delta=1.0), tasks=TASKS)
    router = adapter.layers["0"].router
    assert router.sketch.shape == (width, 6) and router.vectors.shape == (3, width)
    low = inputs(6, width, seed=1, dtype=torch.float64)  # six directions
    x = inputs(60, 6, seed=2, dtype=torch.float64) @ low
    net(x).sum().backward()
    adapter.before_step(0)
    adapter.after_step()
    c = covariance(list(x))
    values, vectors = same.eigenpairs(router.sketch / 60, router.onto)
    assert_close((vectors.t() * values) @ vectors, c, atol=1e-9, rtol=1e-9)
    adapter.after_task()
    pairs, rest = leading(c, 1.0)
    for j in range(components):
        assert_close(router.values[j], c.new_tensor(pairs[j][0]), atol=1e-9, rtol=1e-9)
        assert_close(router.vectors[j].outer(router.vectors[j]), pairs[j][1].outer(pairs[j][1]), atol=1e-9, rtol=1e-9)
    assert rest < 1e-9 < float(router.floor), "what is left of the trace counts, also where it was not kept"
    adapter.after_task()  # of a task without a step: nothing new
    assert_close(router.values[0], c.new_tensor(pairs[0][0]), atol=1e-9, rtol=1e-9)


def test_neighbours_count_only_where_it_is_said():
    """gate="batch": the mean over the batch's tokens without padding."""
    net, adapter = adapted(SAME(**SIZES, gate="batch"), dtype=torch.float64)
    x, layer, found = inputs(4, 5, 16, dtype=torch.float64), adapter.layers["q"], []
    layer.gate.register_forward_hook(lambda module, args, output: found.append(output))
    net(x, attention_mask=MASK, task_ids=IDS)
    gates = [(layer.router.weight @ x[i, j]).softmax(0) for i in range(4) for j in range(5) if MASK[i, j]]
    assert found[0].shape == (1, 1, 3)
    assert_close(found[0].flatten(), sum(gates) / len(gates), **EXACT)


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"delta": 1.1}, {"mu": 0.0}, {"routing": "none"}], ids=str)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        SAME(**wrong)
