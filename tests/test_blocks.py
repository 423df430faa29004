"""Feed-forward blocks are found by what they compute, in every family, and refused where there are none."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from polyrank import Adapter, adapt
from polyrank.assets import model_folder
from polyrank.blocks import find
from polyrank.methods import EMTAL, MixLoRA
from small import GLU, BlockNet, disturb

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
T5 = dict(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
IMAGE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def gpt2():
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return hf.GPT2LMHeadModel(config)


FAMILIES = {
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(vocab_size=50, **SMALL)),
    "qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(vocab_size=50, num_key_value_heads=2, **SMALL)),
    "gpt2": gpt2,
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(feed_forward_proj="gated-gelu", **T5)),
    "bert": lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **SMALL)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=50, **SMALL)),
    "deberta": lambda: hf.DebertaV2Model(hf.DebertaV2Config(vocab_size=50, **SMALL)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=8, **SMALL)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(image_size=28, patch_size=14, **IMAGE)),
    "dinov2-swiglu": lambda: hf.Dinov2Model(
        hf.Dinov2Config(image_size=28, patch_size=14, use_swiglu_ffn=True, **IMAGE)
    ),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
}
GATED = {"llama", "qwen2", "t5-gated", "dinov2-swiglu"}
SIBLINGS = {"bert", "roberta", "deberta"}
every = pytest.mark.parametrize("family", sorted(FAMILIES))


def built(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def given(family, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "dinov2", "dinov2-swiglu", "swin"):
        side = {"vit": 16, "swin": 32}.get(family, 28)
        return {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if family.startswith("t5") else {})


def output(model, family, **more):
    return model(**given(family), **more)[0]


@every
def test_finds_every_block(family):
    blocks = list(find(built(family)))
    assert len(blocks) == (4 if family.startswith("t5") else 2)
    assert all((block.parts.gate is not None) == (family in GATED) for block in blocks)
    assert all(bool(block.elsewhere) == (family in SIBLINGS) for block in blocks)


@every
def test_a_mixture_in_every_block_from_start_to_end(family, tmp_path):
    """Starts as the base, has gradients, is saved and loaded, and leaves the model as it was."""
    model = built(family)
    before, modules = output(model, family), [type(module) for module in model.modules()]
    adapter = adapt(model, MixLoRA(num_experts=3, rank=2, alpha=4), tasks=["a", "b"])
    ids = torch.tensor([0, 1])
    assert_close(output(model, family, task_ids=ids), before, atol=1e-5, rtol=1e-4)
    assert any(name.endswith(("mlp", "intermediate", "DenseReluDense")) for name in adapter.layers)
    disturb(adapter)
    y = output(model, family, task_ids=ids)
    assert not torch.allclose(y, before, atol=1e-3)
    y.square().mean().backward()
    idle = {name for name, p in adapter.named_parameters() if p.grad is None}
    assert all(name.startswith("pooler.") for name in idle)  # it comes after the states that were read
    adapter.save(tmp_path / "adapter")
    fresh = built(family)
    Adapter.load(tmp_path / "adapter", fresh)
    assert torch.equal(output(fresh.eval(), family, task_ids=ids), y)
    adapter.remove()
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(output(model, family), before)


@every
def test_a_faded_emtal_leaves_a_plain_model(family):
    model = built(family)
    modules = [type(module) for module in model.modules()]
    adapter = adapt(model, EMTAL(num_experts=4, rank=2), tasks=["a"])
    disturb(adapter, by=0.1)
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="depends on the input"):
        adapter.merge("a")
    adapter.before_step(0.5)
    y = output(model, family, task_ids=ids)
    plain = adapter.merge("a")
    assert [type(module) for module in plain.modules()] == modules
    assert_close(output(plain, family), y, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_faded_emtal_leaves_minilm_as_a_plain_model():
    """The real model, whose answers to real sentences stay the same to 1e-5."""
    folder = model_folder("minilm")
    model = hf.BertModel.from_pretrained(folder).eval()
    adapter = adapt(model, EMTAL(), tasks=["a"], exclude=r"pooler\..*")
    disturb(adapter, by=0.03)
    adapter.before_step(1.0)
    texts = ["Oil prices fell on Monday.", "The film is a quiet wonder, and far too long for its own good."]
    batch = hf.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    before = hf.BertModel.from_pretrained(folder).eval()(**batch)[0]
    with torch.no_grad():
        y = model(**batch, task_ids=torch.zeros(2, dtype=torch.long))[0]
        assert (y - before).abs().max() > 0.1
        assert_close(adapter.merge("a")(**batch)[0], y, atol=1e-5, rtol=1e-5)


class Unlike(nn.Module):
    """Two linear layers and an activation that are no feed-forward block."""

    def __init__(self):
        super().__init__()
        self.mlp = GLU(8, 12, 8, gated=False)
        self.mlp.forward = lambda x: self.mlp.down(self.mlp.act(self.mlp.up(x)) ** 2)

    def forward(self, x):
        return self.mlp(x)


def test_refuses_what_computes_something_else():
    with pytest.raises(ValueError, match=r"MixLoRA adapts feed-forward blocks, .* mlp \(GLU\) computes something else"):
        adapt(Unlike(), MixLoRA(), tasks=["a"])  # its activation is squared
    config = hf.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    )
    opt = hf.OPTModel(config)  # its feed-forward layers stand in the layer itself, beside attention
    trained = [p.requires_grad for p in opt.parameters()]
    with pytest.raises(ValueError, match="take a method for linear layers"):
        adapt(opt, MixLoRA(), tasks=["a"])
    assert [p.requires_grad for p in opt.parameters()] == trained


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(12, 8), nn.BatchNorm1d(3)

    def forward(self, h, residual):
        return self.norm(self.dense(h) + residual)


class Normed(nn.Module):
    """The second of two siblings has statistics that training moves."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(8, 12), nn.GELU()), Second()

    def forward(self, x):
        return self.two(self.one(x), x)


class Branches(nn.Module):
    """Two branches side by side that look like one block, and a block; some of their weights are zero."""

    def __init__(self):
        super().__init__()
        self.key, self.value = (nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(2))
        self.mlp = GLU(8, 12, 8)
        nn.init.zeros_(self.mlp.down.weight)
        nn.init.zeros_(self.mlp.down.bias)
        self.chain = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
        self.head = Head()

    def forward(self, x):
        return self.chain(self.key(x) * self.value(x) + self.mlp(x))


class Head(nn.Module):
    """It has a feed-forward block's parts and wants something else than hidden states."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, out):
        return self.b(self.act(self.a(out.last_hidden_state)))


def test_neighbours_that_do_not_follow_each_other_are_no_block():
    model = Branches()
    (block,) = find(model)
    assert block.name == "mlp"
    assert block.parts.up is model.mlp.up
    assert block.parts.gate is model.mlp.gate


def test_weights_do_not_decide_what_is_found():
    """Zero, tiny, or of several dtypes: the parts are the same ones."""
    for change in (lambda mlp: mlp.down.weight.data.zero_(), lambda mlp: mlp.gate.weight.data.mul_(0.01)):
        model = BlockNet()
        change(model.v)
        (block,) = find(model)
        assert (block.parts.up, block.parts.gate, block.parts.down) == (model.v.up, model.v.gate, model.v.down)
    t5 = built("t5").to(torch.float16)
    for block in find(t5):
        block.parts.down.to(torch.float32)  # as transformers loads it
    assert len(list(find(t5))) == 4


class Functional(nn.Module):
    def __init__(self, f, gated):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12) if gated else None, nn.Linear(12, 8)
        self.f = f

    def forward(self, x):
        return self.c(self.f(self.a(x)) if self.b is None else self.f(self.b(x)) * self.a(x))


@pytest.mark.parametrize("f", [F.relu, F.silu, F.gelu, torch.tanh])
@pytest.mark.parametrize("gated", [True, False])
def test_an_activation_may_be_a_function(f, gated):
    model, x = nn.Sequential(Functional(f, gated)), torch.randn(2, 3, 8)
    (block,) = find(model)
    assert block.parts.gate is model[0].b
    assert_close(block.parts(x), model(x))
    assert not list(find(nn.Sequential(Functional(torch.sin, gated))))


def test_dropout_on_both_sides():
    inner, outer = nn.Dropout(0.1), nn.Dropout(0.2)
    (block,) = find(nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.GELU(), inner, nn.Linear(12, 8), outer)))
    assert block.parts.inner is inner
    assert block.parts.outer is outer


def test_a_block_with_hooks_is_refused_and_modes_come_back():
    model = BlockNet()
    handle = model.v.register_forward_hook(lambda module, given, output: None)
    with pytest.raises(ValueError, match="v has hooks"):
        adapt(model, MixLoRA(), tasks=["a"])
    handle.remove()
    adapter = adapt(model.train(), MixLoRA(), tasks=["a"])
    model.eval()
    adapter.remove()
    assert not any(module.training for module in model.modules())


def test_looking_for_blocks_leaves_the_model_as_it_was():
    model = Normed().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(4)
    noise = torch.rand(3)
    torch.manual_seed(4)
    assert [block.name for block in find(model)] == ["one"]
    assert torch.equal(torch.rand(3), noise)
    assert_close(dict(model.state_dict()), before, atol=0, rtol=0)
    assert not any(module.training for module in model.modules())


def test_refuses_half_a_block_and_targets_outside_of_any():
    with pytest.raises(ValueError, match=r"v is a feed-forward block .* leave out v\.gate, v\.down"):
        adapt(BlockNet(), MixLoRA(), tasks=["a"], targets=["q", "v.up"])
    with pytest.raises(ValueError, match=r"no target stands in one: .* v\.up"):
        adapt(BlockNet(), MixLoRA(), tasks=["a"], targets=["q"])


def test_blocks_alone_can_be_targeted():
    adapter = adapt(
        built("bert"), MixLoRA(num_experts=3, rank=2), tasks=["a"], targets=r".*(intermediate|\d\.output)\.dense"
    )
    assert list(adapter.layers) == ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"]


def test_dropout_stands_where_the_model_has_it():
    """In training, with the same noise, the parts and the block are the same: T5 drops inside, GPT-2 after."""
    for family in ("t5", "gpt2"):
        model = built(family)
        for block in find(model):
            module, x = model.get_submodule(block.name), torch.randn(2, 5, 16)
            outputs = []
            for one in (module, block.parts):
                one.train()
                torch.manual_seed(3)
                outputs.append(one(x))
            assert_close(*outputs)
            assert (outputs[0] == 0).any() == (family == "gpt2")
        assert not model.training


def test_no_row_of_a_micro_batch_counts():
    """All padding: the losses are 0, not NaN."""
    notes = {"z": [("v", torch.zeros(2))], "load": [("v", torch.zeros(2, 3))]}
    assert {name: float(loss) for name, loss in MixLoRA(z_loss=0.1).losses(notes).items()} == {"balance": 0, "z": 0}
