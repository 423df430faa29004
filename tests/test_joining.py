"""A task joins an adapter, and LoRAs that were trained alone join a mixture."""

import pytest
import torch

import polyrank.methods.base as methods_base
from polyrank import Adapter, LoRA, adapt
from polyrank.methods import MELoRA, MoA, PiSSA
from small import BANKED, IDS, METHODS, TASKLESS, TASKS, Net, adapted, base, inputs

NEW = torch.full((4,), 3)
BY_TASK = sorted(set(METHODS) - TASKLESS)


def trained_on(net, adapter, ids, steps=3, lr=0.05):
    """AdamW with weight decay, which moves every weight it holds."""
    optimizer = torch.optim.AdamW(adapter.param_groups(lr, weight_decay=0.1))
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        loss = net(inputs(4, 5, 16, seed=step), task_ids=ids).square().mean()
        (loss + sum(adapter.losses().values(), torch.zeros(()))).backward()
        optimizer.step()
        adapter.after_step()


@pytest.mark.parametrize("name", BY_TASK)
def test_old_tasks_stay_bitwise_the_same(name, tmp_path):
    """When the task joins, and after training it. MoA's router may take the new LoRA in evaluation: it guesses."""
    net, adapter = adapted(METHODS[name])
    x = inputs(4, 5, 16)
    before = net(x, task_ids=IDS)
    adapter.add_task("d")
    assert adapter.tasks == (*TASKS, "d")
    assert torch.equal(net(x, task_ids=IDS), before)
    trained_on(net, adapter, NEW)
    assert torch.equal(net(x, task_ids=IDS), before)
    assert not torch.allclose(net(x, task_ids=NEW), before, atol=1e-3)
    adapter.save(tmp_path / "adapter")
    fresh = base(METHODS[name])
    Adapter.load(tmp_path / "adapter", fresh)
    fresh.train(net.training)
    assert torch.equal(fresh(x, task_ids=NEW), net(x, task_ids=NEW))


@pytest.mark.parametrize("name", BY_TASK)
def test_the_new_task_learns_by_its_own_parts_alone(name):
    net, adapter = adapted(METHODS[name])
    old = {key: p.clone() for key, p in adapter.state_dict().items()}
    adapter.add_task("d")
    fresh = {key: p.clone() for key, p in adapter.state_dict().items()}
    trained_on(net, adapter, NEW)
    now = adapter.state_dict()
    moved = {key for key in now if not torch.equal(now[key], fresh[key])}
    assert moved
    assert moved <= now.keys() - old.keys()
    assert moved == {key for key, p in adapter.named_parameters() if p.requires_grad}


def test_everything_may_train_on():
    net, adapter = adapted(METHODS["mtl_lora"])
    adapter.add_task("d", freeze=False)
    before = net(inputs(4, 5, 16), task_ids=IDS)
    trained_on(net, adapter, NEW)
    assert not torch.allclose(net(inputs(4, 5, 16), task_ids=IDS), before, atol=1e-3)


@pytest.mark.parametrize("name", sorted(TASKLESS - BANKED))
def test_a_method_without_parts_of_a_task_says_so(name):
    net, adapter = adapted(METHODS[name])
    y = net(inputs(4, 5, 16), task_ids=IDS)
    with pytest.raises(ValueError, match="keeps nothing of a task's own"):
        adapter.add_task("d")
    assert adapter.tasks == TASKS
    adapter.add_task("d", freeze=False)
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)


@pytest.mark.parametrize("name", sorted(BANKED))
def test_a_classifier_of_given_loras_takes_no_more_of_them(name):
    net, adapter = adapted(METHODS[name])
    y = net(inputs(4, 5, 16))
    for freeze in (True, False):
        with pytest.raises(ValueError, match="size depends on the number of tasks"):
            adapter.add_task("d", freeze=freeze)
    assert adapter.tasks == TASKS
    assert torch.equal(net(inputs(4, 5, 16)), y)


@pytest.mark.parametrize("name", ["A", "a", "x/y", ""])
def test_a_bad_name_changes_nothing(name):
    net, adapter = adapted(METHODS["moelora"])
    y = net(inputs(4, 5, 16), task_ids=IDS)
    with pytest.raises(ValueError, match="name"):
        adapter.add_task(name)
    assert adapter.tasks == TASKS
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)


def test_joins_a_released_base(tmp_path):
    net, adapter = adapted(METHODS["moore-task"])
    y = net(inputs(4, 5, 16), task_ids=IDS)
    adapter.release_base(tmp_path / "base")
    adapter.add_task("d")
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)


def bank(tmp_path, methods, targets=("q", "v")):
    """One adapter for each task, trained alone on the same base; their outputs."""
    folders, answers = {}, {}
    for i, (task, method) in enumerate(methods.items()):
        torch.manual_seed(1)
        net = Net()
        torch.manual_seed(20 + i)
        adapter = adapt(net, method, tasks=[task], targets=list(targets))
        trained_on(net, adapter, torch.zeros(4, dtype=torch.long), lr=0.2)
        adapter.save(tmp_path / task)
        folders[task], answers[task] = tmp_path / task, net(inputs(4, 5, 16), task_ids=torch.zeros(4).long())
    return folders, answers


def test_a_bank_of_loras_answers_as_they_did_alone(tmp_path):
    """Also LoRAs of another scale and a smaller rank, and any method of which a LoRA is a merged form."""
    methods = {"a": LoRA(rank=3, alpha=3), "b": LoRA(rank=2, alpha=8), "c": MELoRA(num_experts=2, rank=1, alpha=2)}
    folders, answers = bank(tmp_path, methods)
    net, adapter = adapted(MoA(rank=3, alpha=5), trained=False)
    adapter.load_bank(folders)
    for i, task in enumerate(TASKS):
        y = net(inputs(4, 5, 16), task_ids=torch.full((4,), i))
        torch.testing.assert_close(y, answers[task], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers["a"], answers["b"], atol=1e-2)


def test_ranks_that_a_bank_has_not_can_be_trained(tmp_path):
    folders, _ = bank(tmp_path, {"a": LoRA(rank=1)})
    net, adapter = adapted(MoA(rank=3), trained=False)
    adapter.load_bank(folders)
    trained_on(net, adapter, torch.zeros(4).long())
    for layer in adapter.layers.values():
        assert (layer.experts.lora_B.each()[0].abs().sum(1) > 0).all()


@pytest.mark.parametrize("with_factors", [False, True])
def test_a_bank_on_other_singular_directions(with_factors, tmp_path, monkeypatch):
    """On another machine near-equal singular values may swap: refused, or right with the factors that were shipped."""
    method = PiSSA(rank=2)
    torch.manual_seed(1)
    net = Net()
    alone = adapt(net, method, tasks=["a"], targets=["q", "v"])
    trained_on(net, alone, torch.zeros(4).long())
    alone.save(tmp_path / "a", with_factors=with_factors)
    want = net(inputs(4, 5, 16), task_ids=torch.zeros(4).long())
    honest = methods_base.factorise

    def swapped(weight):
        found = honest(weight)
        order = torch.tensor([1, 0, *range(2, len(found.sigma))])
        return type(found)(found.u[:, order], found.sigma[order], found.vt[order])

    monkeypatch.setattr(methods_base, "factorise", swapped)
    other, adapter = adapted(MoA(rank=4), trained=False)
    if with_factors:
        adapter.load_bank({"a": tmp_path / "a"})
        torch.testing.assert_close(other(inputs(4, 5, 16), task_ids=torch.zeros(4).long()), want, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(ValueError, match="comes out differently"):
        adapter.load_bank({"a": tmp_path / "a"})


def test_a_new_domain_joins_and_the_old_loras_stay(tmp_path):
    folders, _ = bank(tmp_path, dict.fromkeys("abcd", LoRA(rank=2)))
    new = folders.pop("d")
    net, adapter = adapted(MoA(rank=2), trained=False)
    adapter.load_bank(folders)
    trained_on(net, adapter, IDS)
    before = {key: p.clone() for key, p in adapter.state_dict().items()}
    adapter.add_task("d")
    adapter.load_bank({"d": new})
    trained_on(net, adapter, NEW, steps=5)
    after = adapter.state_dict()
    assert all(torch.equal(after[key], p) for key, p in before.items())
    assert {key.rpartition(".")[2] for key in after.keys() - before.keys()} == {"3"}


def test_what_does_not_fit_is_refused_whole(tmp_path):
    folders, _ = bank(tmp_path, {"a": LoRA(rank=2), "b": LoRA(rank=4)})
    (tmp_path / "narrow").mkdir()
    narrow, _ = bank(tmp_path / "narrow", {"a": LoRA(rank=2)}, targets=["q"])
    _, adapter = adapted(MoA(rank=2))
    before = {key: p.clone() for key, p in adapter.state_dict().items()}
    for given, message in [
        (folders, "rank 4 does not fit"),
        ({"a": folders["a"], "x": folders["b"]}, "unknown task"),
        (narrow, "adapts other layers, such as v"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter.load_bank(given)
    with pytest.raises(FileNotFoundError):
        adapter.load_bank({"a": tmp_path / "nowhere"})
    assert all(torch.equal(adapter.state_dict()[key], p) for key, p in before.items())
    _, other = adapted(METHODS["moelora"])
    with pytest.raises(ValueError, match="no bank"):
        other.load_bank({"a": folders["a"]})
    torch.manual_seed(7)
    foreign = adapt(Net(), MoA(rank=2), tasks=TASKS, targets=["q", "v"])
    with pytest.raises(ValueError, match="another base model"):
        foreign.load_bank({"a": folders["a"]})
    (tmp_path / "routed").mkdir()
    routed, _ = bank(tmp_path / "routed", {"a": METHODS["hydralora"]})
    with pytest.raises(ValueError, match="depends on the input"):
        adapter.load_bank(routed)


def test_shared_weights_are_those_of_no_task():
    for name, count in [("lora", 0), ("moore_topk-task", 2 * 3), ("mtl_lora", 2 * 2 * 3), ("moelora", 3), ("moa", 18)]:
        _, adapter = adapted(METHODS[name])
        shared, every = set(adapter.shared_parameters()), list(adapter.parameters())
        assert len(every) - len(shared) == count, name
