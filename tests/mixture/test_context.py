"""Routes: ids fold over what the model folded, masks pool, nothing stays."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from polyrank.mixture import Route, RouteContext, Site
from small import IDS, METHODS, adapted, inputs

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.linear}


@pytest.mark.parametrize(
    ("ids", "shape", "want"),
    [
        ([0, 1], (2, 5, 3), [[0], [1]]),
        ([0, 1], (6, 5, 3), [[0], [0], [0], [1], [1], [1]]),
        ([2], (3, 4), [2, 2, 2]),
        ([0, 1], (2, 4, 4, 3), [[[0]], [[1]]]),
        ([[0, 1, 1]], (1, 3, 8), [[0, 1, 1]]),
    ],
)
def test_ids_broadcast(ids, shape, want):
    assert Route(task_ids=torch.tensor(ids)).ids(torch.empty(shape)).tolist() == want


@pytest.mark.parametrize(
    ("ids", "shape"), [([0, 1], (3, 5, 2)), ([0, 1], (1, 5, 2)), ([[0, 1]], (1, 3, 2)), ([0], (7,))]
)
def test_sizes_that_do_not_fit_are_errors(ids, shape):
    with pytest.raises(ValueError, match="task_ids"):
        Route(task_ids=torch.tensor(ids)).ids(torch.empty(shape))


def test_pooling_is_the_masked_mean():
    x, mask = inputs(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    pooled = Route(batch=3, masks={"input": mask}).pool(x, "input")
    assert_close(pooled, torch.stack([x[0, :2].mean(0), x[1].mean(0), torch.zeros(5)]))
    assert_close(Route(batch=3, masks={"input": None}).pool(x, "input"), x.mean(1))
    windows = x.reshape(6, 2, 5)  # two windows of each sample
    assert_close(Route(batch=3, masks={"input": mask}).pool(windows, "input"), pooled)
    assert_close(Route(batch=3, masks={"input": mask}).pool(x[:, 0], "input"), x[:, 0])  # one token a sample: a pooler
    with pytest.raises(ValueError, match="mask"):
        Route(batch=3, masks={"input": mask[:, :3]}).pool(x, "input")
    with pytest.raises(ValueError, match="attention_mask"):
        Route(batch=3).pool(x, "input")


def test_each_context_is_its_own():
    """Two adapted models at once, one called inside the other's block."""
    first, one = adapted(METHODS["more"])
    second, _ = adapted(METHODS["more"])
    x = inputs(4, 5, 16)
    with one.on("b"):
        first(x)
        with pytest.raises(ValueError, match="routes by task"):
            second(x)


def test_notes_are_those_of_the_last_forward_only():
    net, adapter = adapted(METHODS["more"])
    x, ids = inputs(4, 5, 16), torch.tensor([0, 1, 2, 0])
    net(x, task_ids=ids)
    net(x, task_ids=ids)
    assert len(adapter.context.notes["contrastive"]) == 2  # one of each layer, not four
    assert set(adapter.losses()) == {"contrastive"}
    assert adapter.losses() == {}
    net.eval()
    net(x, task_ids=ids)
    with torch.no_grad():
        net.train()(x, task_ids=ids)
    assert adapter.losses() == {}


def test_a_site_elsewhere_does_not_touch_the_model():
    context = RouteContext(["a", "b"])
    assert Site("x", "input", context).on(1, torch.device("cpu")).ids(torch.empty(3, 2)).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="routes by task"):
        _ = context.route


def test_an_interrupted_forward_leaves_no_task_behind():
    """torch calls no hook after KeyboardInterrupt: a later block must not see that forward's tasks."""
    net, adapter = adapted(METHODS["more"])
    x = inputs(4, 5, 16)
    with adapter.on("b"):
        want = net.body(x)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = net.out.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x, task_ids=torch.tensor([0, 0, 0, 0]))
    handle.remove()
    with adapter.on("b"):
        assert_close(net.body(x), want)


def test_a_forward_inside_a_forward_keeps_its_own_tasks():
    net, adapter = adapted(METHODS["more"])
    x, ids = inputs(4, 5, 16), torch.tensor([2, 2, 2, 2])
    want = net(x, task_ids=ids)
    plain = net.body

    def body(x):
        net.body = plain
        net(x, task_ids=torch.tensor([0, 0, 0, 0]))
        return plain(x)

    net.body = body
    with adapter.on("a"):
        assert_close(net(x, task_ids=ids), want)


def test_a_failed_forward_leaves_no_notes():
    net, adapter = adapted(METHODS["more"])
    x, ids = inputs(4, 5, 16), torch.tensor([0, 1, 2, 0])
    handle = net.out.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x, task_ids=ids)
    handle.remove()
    assert adapter.losses() == {}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lora", "loramoe", "mola", "smora", "more", "same", "ase", "moore-token", "c_lorae"])
def test_a_recomputation_multiplies_no_more_than_its_forward(name):
    """Routers and their notes have no second cost when they are recomputed; what is only counted is not redone."""
    x, found = inputs(4, 5, 16).requires_grad_(), []
    for checkpointed in (False, True):
        net, adapter = adapted(METHODS[name], checkpointed=checkpointed)
        net.context_fn = adapter.context.replay
        with Products() as forward:
            y = net(x, task_ids=IDS)
            loss = sum(adapter.losses().values(), y.square().sum())
        with Products() as backward:
            loss.backward()
        found.append((forward.count, backward.count))
    (forward, plain), (_, checkpointed) = found
    assert plain < checkpointed
    counted_only = 4 if name == "same" else 0  # two products of each of two layers, for its covariance
    assert checkpointed - plain <= forward - 1 - counted_only  # the head is not in the checkpoint
