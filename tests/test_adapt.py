"""adapt(): which layers it takes, what it refuses, and what stays when it does."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from polyrank import Adapter, LoRA, MoORE, MoRE, adapt
from polyrank.mixture import MixtureLinear
from small import IDS, METHODS, Net, adapted, base, inputs


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first


def test_targets_by_regex_suffix_and_all_linear():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def model():
        return nn.ModuleDict(
            {"layers": nn.ModuleList([Block(), Block()]), "lm_head": nn.Linear(4, 9), "norm": nn.LayerNorm(4)}
        )

    def chosen(targets, exclude=None):
        return list(adapt(model(), LoRA(), tasks=["a"], targets=targets, exclude=exclude).layers)

    assert chosen(r"layers\.1\..*") == ["layers.1.q_proj", "layers.1.k_proj"]
    assert chosen(["q_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert chosen(["1.k_proj", "lm_head"]) == ["layers.1.k_proj", "lm_head"]
    assert chosen("all-linear") == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qk"]
    assert chosen("all-linear", exclude=r".*k_proj") == ["layers.0.q_proj", "layers.1.q_proj"]


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (Net(), ["query"], "end in"),
        (Net(), "nothing", "matches no linear layer"),
        (Net(), ["q", "w"], "'w' is the end of no"),
        (Net(), "[", "no regular expression"),
        (nn.LayerNorm(3), "all-linear", "has none"),
        (nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), "all-linear", r"a\.out_proj cannot .*MultiheadAttention"),
        (nn.ModuleDict({"l": nn.TransformerEncoderLayer(4, 2)}), ["linear1"], r"l\.linear1 .*set_fastpath_enabled"),
        (Twice(), "all-linear", "same module as"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(model, targets, message):
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        adapt(model, LoRA(), tasks=["a"], targets=targets)
    assert not any(isinstance(m, MixtureLinear) for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    "tasks", [[], ["a", "a"], ["a", "A"], ["a.b"], ["../up"], [""], ["x" * 101], ["con"], ["a\u202eb"]]
)
def test_bad_task_names_are_refused(tasks):
    net = Net()
    with pytest.raises(ValueError, match="task"):
        adapt(net, LoRA(), tasks=tasks)
    assert all(p.requires_grad for p in net.parameters())


def test_a_model_is_adapted_once():
    net = Net()
    adapter = adapt(net, LoRA(), tasks=["a"])
    with pytest.raises(ValueError, match="adapted already"):
        adapt(net, LoRA(), tasks=["a"])
    adapter.remove()
    adapt(net, LoRA(), tasks=["a"])


def test_a_failed_build_leaves_the_model_as_it_was():
    net = Net()
    with torch.no_grad():
        net.v.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        adapt(net, MoORE(), tasks=["a"], targets=["q", "v"])
    assert all(p.requires_grad for p in net.parameters())
    assert type(net.q) is nn.Linear
    net(inputs(4, 16))


def test_task_ids_are_checked():
    net = Net()
    adapter = adapt(net, MoRE(), tasks=list("abc"), targets=["q", "v"])
    x = inputs(4, 5, 16)
    for ids, error in [
        (torch.tensor([0, 1, 2]), ValueError),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), TypeError),
        ([0, 1, 2, 0], TypeError),
        (torch.tensor([0, -1, 2, 0]), ValueError),
        (torch.zeros(4, 6, dtype=torch.long), ValueError),
        (torch.zeros(0, dtype=torch.long), ValueError),
    ]:
        with pytest.raises(error, match="task_ids"):
            net(x, task_ids=ids)
    with pytest.raises(ValueError, match=r"unknown task 'd'.*a, b, c"), adapter.on("d"):
        pass
    assert_close(net(x, task_ids=IDS), net(x, task_ids=IDS))


def test_conv1d_is_the_same_layer_transposed():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear, conv = nn.Sequential(nn.Linear(16, 24)), nn.Sequential(Conv1D(24, 16))
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight.T)
        conv[0].bias.copy_(linear[0].bias)
    found = []
    for model in (linear, conv):
        torch.manual_seed(1)
        adapter = adapt(model, MoRE(rank=4), tasks=list("abc"), targets="0")
        for p in adapter.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(7))
        y = model(inputs(4, 5, 16), task_ids=IDS)
        y.square().sum().backward()
        merged = adapter.merge("b")
        found.append((y, merged(inputs(4, 5, 16)), adapter.method))
    assert_close(found[0][:2], found[1][:2])
    assert conv[0].weight.shape == (16, 24)


def test_moore_frees_and_restores_the_weight(tmp_path):
    """The faithful form stands for W: W can leave memory, and comes back bit for bit."""
    torch.manual_seed(1)
    net = Net()
    before = net.q.weight.detach().clone()
    adapter = adapt(net, MoORE(router_dim=4), tasks=list("abc"), targets=["q", "v"])
    y = net(inputs(4, 5, 16), task_ids=IDS)
    adapter.release_base(tmp_path / "weights")
    assert net.q.base.weight.device.type == "meta"
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)
    adapter.save(tmp_path / "adapter")
    adapter.remove()
    assert torch.equal(net.q.weight, before)
    assert net.q.weight.device.type == "cpu"
    loaded = Adapter.load(tmp_path / "adapter", net)
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)
    loaded.remove()
    lora = adapt(net, LoRA(), tasks=list("abc"), targets=["q"])
    with pytest.raises(ValueError, match="needs its base weight"):
        lora.release_base(tmp_path / "other")


def test_a_spent_adapter_says_so(tmp_path):
    net = Net()
    adapter = adapt(net, MoRE(), tasks=["a", "b"], targets=["q", "v"])
    adapter.save(tmp_path / "adapter")
    adapter.merge("a")
    for use in (lambda: adapter.merge("b"), lambda: adapter.on("b"), lambda: adapter.save(tmp_path / "adapter")):
        with pytest.raises(RuntimeError, match="merged or removed"):
            use()
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size > 1000


def test_a_base_that_is_more_than_its_weight():
    """Its own forward, or a hook: the fast path and merging must not pass them by; MoORE needs the weight itself."""
    net = Net()
    weight, bias = net.q.weight, net.q.bias
    net.q.forward = lambda x: nn.functional.linear(x, 2 * weight, bias)
    want = net(inputs(4, 5, 16))
    with pytest.raises(ValueError, match=r"q: the method decomposes the weight"):
        adapt(net, MoORE(), tasks=["a"], targets=["q"])
    adapter = adapt(net, LoRA(), tasks=["a"], targets=["q"])
    assert_close(net(inputs(4, 5, 16)), want)
    with pytest.raises(ValueError, match="not a plain linear layer"):
        adapter.merge("a")
    assert_close(net(inputs(4, 5, 16)), want)


def test_a_failing_merge_leaves_the_model_as_it_was(monkeypatch):
    net = Net()
    adapter = adapt(net, LoRA(), tasks=["a"], targets=["q", "v"])
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    y = net(inputs(4, 5, 16))
    monkeypatch.setattr(adapter.layers["v"], "task_weight", lambda task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.merge("a")
    assert torch.equal(net(inputs(4, 5, 16)), y)


@pytest.mark.parametrize(("size", "least", "most"), [(0.1, 0.01, 0.03), (0.001, 0.6, 1.0)])
def test_merging_into_16_bits_says_what_is_lost_of_the_change(size, least, most, caplog):
    """Of the change, not of the weight: bf16 has 8 bits, and a change of a thousandth of the weight hardly counts."""
    torch.manual_seed(0)
    net = Net().to(torch.bfloat16)
    adapter = adapt(net, LoRA(rank=4, alpha=4), tasks=["a"], targets=["q"])
    layer = adapter.layers["q"]
    nn.init.normal_(layer.experts.lora_B)
    before = layer.weight.detach().float().clone()
    with torch.no_grad():
        layer.experts.lora_B *= size * before.norm() / (layer.task_weight(0) - before).norm()
    exact = layer.task_weight(0)
    told = adapter.lost_by_merging("a")
    assert least < told["q"] < most
    with caplog.at_level("WARNING", "polyrank"):
        merged = adapter.merge("a")
    lost = (merged.q.weight.float() - exact).norm() / (exact - before).norm()
    assert_close(torch.tensor(told["q"]), lost, atol=1e-4, rtol=1e-3)
    assert f"{100 * told['q']:.1f} % in q" in caplog.text and "model.float()" in caplog.text


def test_merging_as_finely_as_the_adapter_loses_nothing(caplog):
    adapter = adapt(Net(), LoRA(), tasks=["a"], targets=["q"])
    nn.init.normal_(adapter.layers["q"].experts.lora_B)
    assert adapter.lost_by_merging("a") == {}
    with caplog.at_level("WARNING", "polyrank"):
        adapter.merge("a")
    assert caplog.text == ""


def test_one_string_is_no_list_of_tasks():
    with pytest.raises(ValueError, match="give a list"):
        adapt(Net(), LoRA(), tasks="news")


def test_off_is_the_base_bit_for_bit_and_on_again_the_adapter():
    for method in (MoRE(rank=4), MoORE(num_reflections=2), METHODS["xlora"], METHODS["mixlora"]):
        plain = base(method).eval()
        net, adapter = adapted(method)
        net.eval()
        x, ids = inputs(4, 5, 16), IDS
        with torch.no_grad():
            before = net(x, task_ids=ids)
            with adapter.off():
                assert torch.equal(net(x, task_ids=ids), plain(x)), method
                net.train()
            assert all(layer.training for layer in adapter.layers.values())
            net.eval()
            assert torch.equal(net(x, task_ids=ids), before), method
            assert not torch.equal(before, plain(x))


def test_a_fused_optimiser_s_step_is_seen_by_inference():
    """It raises no version of the weights that it writes."""
    net, adapter = adapted(MoRE(rank=4))
    optimizer = torch.optim.AdamW(adapter.param_groups(0.1), fused=True)
    x = inputs(4, 5, 16)

    def answer() -> Tensor:
        with torch.no_grad():
            return net.eval()(x, task_ids=IDS)

    answer()
    net.train()(x, task_ids=IDS).square().sum().backward()
    optimizer.step()
    adapter.after_step()
    twin, other = adapted(MoRE(rank=4))
    other.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        assert torch.equal(answer(), twin.eval()(x, task_ids=IDS))
