"""What inference computes once: for as long as no weight changed, and never beyond."""

import copy

import pytest
import torch
from torch import nn

from polyrank.mixture import Kept, drop_kept


class Doubled(nn.Module):
    """2 w, and how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.made, self.kept = nn.Parameter(torch.ones(3)), 0, Kept()

    def forward(self, name="name"):
        return self.kept(name, (self, None), self.make)

    def make(self):
        self.made += 1
        return 2 * self.w.detach()


@torch.no_grad()
def test_once_until_the_weight_changes():
    model = Doubled()
    first = model()
    assert model() is first and model.made == 1
    model.w.add_(1)
    assert torch.equal(model(), 2 * model.w) and model.made == 2
    model.w = nn.Parameter(torch.full((3,), 5.0))
    assert torch.equal(model(), 2 * model.w) and model.made == 3
    model.load_state_dict({"w": torch.full((3,), 7.0)}, assign=True)
    assert torch.equal(model(), 2 * model.w) and model.made == 4
    model.w.data = torch.full((3,), 8.0)  # another tensor: noticed; written into, it would not be
    assert torch.equal(model(), 2 * model.w) and model.made == 5
    model("another")
    assert model.made == 6


def test_an_optimisers_step_and_gradients():
    model = Doubled()
    optimizer = torch.optim.AdamW([model.w], lr=0.1)
    with torch.no_grad():
        model()
    model.w.sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(), 2 * model.w)
    model()
    assert model.kept._value is None, "a forward with gradients frees it"


@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_autograd_does_not_count(build):
    model = Doubled()
    optimizer = build([model.w], lr=0.1, fused=True)
    model.w.sum().backward()
    with torch.no_grad():
        model()
        version = model.w._version
        optimizer.step()
        assert model.w._version == version, "then this test shows nothing"
        assert torch.equal(model(), 2 * model.w)


@torch.no_grad()
def test_a_part_that_was_replaced():
    outer = nn.Module()
    outer.inner, kept = nn.Sequential(nn.Linear(2, 2)), Kept()
    weight = lambda: kept("name", (outer,), lambda: outer.inner[0].weight.clone())  # noqa: E731
    weight()
    outer.inner[0] = nn.Linear(2, 2)
    assert torch.equal(weight(), outer.inner[0].weight)


@torch.no_grad()
def test_what_passes_unseen_has_a_cure():
    model = nn.Sequential(Doubled())
    model[0]()
    model[0].w.data.mul_(3)
    drop_kept(model)
    assert torch.equal(model[0](), 2 * model[0].w)


@torch.no_grad()
def test_copies_keep_nothing():
    model = Doubled()
    model()
    twin = copy.deepcopy(model)
    twin.w.data.fill_(4)  # not even what passes unseen
    assert torch.equal(twin(), 2 * twin.w) and torch.equal(model(), 2 * model.w)


def test_weights_of_inference_mode_are_never_kept():
    with torch.inference_mode():
        model = Doubled()
        for value in (1.0, 2.0):
            model.w.fill_(value)
            assert torch.equal(model(), 2 * model.w)
        assert model.made == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_ways_to_infer(mode):
    model = Doubled()
    with mode():
        assert model() is model()
