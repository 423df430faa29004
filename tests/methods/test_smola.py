"""Omni-SMoLA: slots over the tokens of a sample, groups by modality, and encoders only."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from naive.mixed import naive_smola
from polyrank import adapt
from polyrank.methods import SMoLA
from small import METHODS, adapted, disturb, inputs

OMNI = SMoLA(num_experts=2, slots=2, rank=2, alpha=4)
THREE = SMoLA(num_experts=2, slots=2, rank=2, alpha=4, modalities=2)
# a sample of both modalities, one of the first alone, one with tokens of no modality, one that is all padding
MODALITY_IDS = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, -1, 1, -1, 0], [1, 0, 1, 0, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])

TEXT = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2)),
    "bloom": lambda: hf.BloomModel(hf.BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "bert-decoder": lambda: hf.BertModel(hf.BertConfig(**TEXT, is_decoder=True)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "rembert": lambda: hf.RemBertModel(hf.RemBertConfig(**TEXT, input_embedding_size=8)),
    "rembert-decoder": lambda: hf.RemBertModel(hf.RemBertConfig(**TEXT, input_embedding_size=8, is_decoder=True)),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    ),
}


class Masked(nn.Module):
    """One layer, and a mask for the route to find."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def one_layer(method, trained=True):
    torch.manual_seed(4)
    net = Masked().double()
    adapter = adapt(net, method, tasks=["a"], targets=["layer"])
    if trained:
        disturb(adapter, 1.0)
    return net, adapter


def tiny(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("masked", [False, True])
def test_groups_are_the_equations(masked):
    """Outputs and gradients against loops, with modalities; padding is in no group."""
    mask = MASK if masked else None
    net, adapter = one_layer(THREE)
    x = inputs(4, 5, 6, dtype=torch.float64)
    own = dict(adapter.named_parameters())
    twin = {key.removeprefix("layer."): p.detach().clone().requires_grad_() for key, p in own.items()}
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got = net(xs[0], attention_mask=mask, modality_ids=MODALITY_IDS)
    base = adapter.layers["layer"].base
    want, _ = naive_smola(THREE, twin, base.weight, base.bias, xs[1], None, mask, MODALITY_IDS)
    assert_close(got, want, atol=1e-10, rtol=1e-10)
    (got**2).sum().backward()
    (want**2).sum().backward()
    assert_close(xs[0].grad, xs[1].grad, atol=1e-10, rtol=1e-10)
    for key, p in own.items():
        assert_close(p.grad, twin[key.removeprefix("layer.")].grad, atol=1e-10, rtol=1e-10)


def test_a_group_has_tokens_of_its_modality_alone():
    """Tokens of another modality change nothing in its part, and get nothing of it."""
    net, adapter = one_layer(THREE)
    layer, x = adapter.layers["layer"], inputs(4, 5, 6, dtype=torch.float64)
    with torch.no_grad():  # the last group alone: of modality 1
        layer.experts.lora_B[: -THREE.num_experts * THREE.rank] = 0
    moved = torch.where((MODALITY_IDS == 1)[..., None], x, x + 10 * inputs(4, 5, 6, seed=9, dtype=torch.float64))
    part, after = (net(v, modality_ids=MODALITY_IDS) - layer.base(v) for v in (x, moved))
    mine = MODALITY_IDS == 1
    assert_close(part[mine], after[mine], atol=1e-12, rtol=0)
    assert (part[mine].abs().amax(-1) > 1e-3).all()
    assert part[~mine].abs().max() < 1e-12
    swapped = x.clone()
    swapped[0, 2] += 10  # one of its own does
    assert not torch.allclose((net(swapped, modality_ids=MODALITY_IDS) - layer.base(swapped))[0, 3], part[0, 3])


@pytest.mark.parametrize("method", [OMNI, THREE], ids=["omni", "modalities"])
def test_a_sample_of_padding_has_the_frozen_output_and_finite_gradients(method):
    net, adapter = one_layer(method)
    x = inputs(4, 5, 6, dtype=torch.float64).requires_grad_()
    y = net(x, attention_mask=MASK, modality_ids=MODALITY_IDS)
    assert_close(y[3], adapter.layers["layer"].base(x[3]))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *adapter.parameters()])


def test_padding_changes_nothing():
    """Of a real encoder: neither what stands there, nor how much of it."""
    model = tiny("bert")
    adapter = adapt(model, OMNI, tasks=["a"], exclude=r"pooler\..*")
    disturb(adapter)
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    y = model(input_ids=ids, attention_mask=mask).last_hidden_state
    other = torch.where(mask == 1, ids, 5)
    assert_close(model(input_ids=other, attention_mask=mask).last_hidden_state[1, :6], y[1, :6], atol=1e-5, rtol=1e-5)
    short = model(input_ids=ids[1:2, :6], attention_mask=mask[1:2, :6]).last_hidden_state
    assert_close(short, y[1:2, :6], atol=1e-5, rtol=1e-5)
    unmasked = model(input_ids=ids).last_hidden_state
    assert not torch.allclose(unmasked[1, :6], y[1, :6], atol=1e-2), "the mask does not matter: the test is empty"


def test_a_pooled_vector_is_a_sample_of_one_token():
    """A slot of one token is that token, and the weights of the slots are the token's own."""
    net, adapter = adapted(METHODS["smola"], dtype=torch.float64)
    layer, x = adapter.layers["q"], inputs(4, 16, dtype=torch.float64)
    p = {key.removeprefix("q."): value for key, value in adapter.state_dict().items() if key.startswith("q.")}
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    want, _ = naive_smola(METHODS["smola"], p, layer.base.weight, layer.base.bias, x.unsqueeze(1), None)
    assert_close(seen[0], want.squeeze(1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "modality_ids=<LongTensor"),
        ({"modality_ids": MODALITY_IDS[:, :4]}, "do not fit"),
        ({"modality_ids": MODALITY_IDS + 1}, "there are 2 groups"),
        ({"modality_ids": MODALITY_IDS, "task_ids": torch.zeros(4, 5, dtype=torch.long)}, "a row of its own"),
    ],
    ids=["none", "too few", "too high", "flattened"],
)
def test_what_cannot_be_grouped_is_refused(given, message):
    net, _ = one_layer(THREE)
    with pytest.raises(ValueError, match=message) as caught:
        net(inputs(4, 5, 6, dtype=torch.float64), **given)
    assert "layer" in str(caught.value)


def test_the_padding_must_be_known():
    _, adapter = one_layer(OMNI)
    x = inputs(4, 5, 6, dtype=torch.float64)
    with adapter.on("a"), pytest.raises(ValueError, match="attention_mask=mask"):
        adapter.layers["layer"](x)
    with adapter.on("a", MASK):
        adapter.layers["layer"](x)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", "all-linear", "self_attn is causal"),
        ("llama", ["up_proj"], "self_attn is causal"),
        ("llama", r"lm_head", "self_attn is causal"),
        ("gpt2", "all-linear", "attn is causal"),
        ("bloom", "all-linear", "past_key_values"),
        ("t5", "all-linear", r"SelfAttention is causal: target an encoder alone"),
        ("t5", ["EncDecAttention.q"], "SelfAttention is causal"),
        ("t5", r"decoder.*wo", "SelfAttention is causal"),
        ("bert-decoder", "all-linear", "is causal"),
        ("rembert-decoder", "all-linear", "is_decoder=True"),
    ],
)
def test_causal_models_are_refused(name, targets, message):
    model = tiny(name)
    modules, grads = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        adapt(model, OMNI, tasks=["a"], targets=targets)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == grads
    adapt(model, METHODS["lora"], tasks=["a"], targets=targets)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("t5", r"encoder\..*"), ("bert", "all-linear"), ("rembert", "all-linear"), ("vit", "all-linear")],
)
def test_encoders_are_accepted_and_learn(name, targets):
    model = tiny(name)
    adapter = adapt(model, OMNI, tasks=["a"], targets=targets)
    disturb(adapter)
    if name == "vit":
        given = {"pixel_values": inputs(2, 3, 16, 16)}
    else:
        ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(3))
        given = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    if name == "t5":
        given["labels"] = ids
    out = model(**given)
    y = out.logits if name == "t5" else out.last_hidden_state.square().mean() + out.pooler_output.square().mean()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
