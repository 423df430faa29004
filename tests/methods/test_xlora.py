"""X-LoRA: given LoRAs, scaled by what the base model makes of each token in a forward of its own."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from polyrank import LoRA, adapt
from polyrank.methods import XLoRA
from small import METHODS, TASKS, Net, adapted, disturb, fill_bank, inputs

METHOD = XLoRA(rank=2, alpha=4, temperature=0.5)
SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 9])


def bert(dropout=0.0):
    torch.manual_seed(0)
    noise = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertModel(hf.BertConfig(**SIZES, **noise)).eval()


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)).eval()


def t5():
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config).eval()


def with_loras(model, method=METHOD, **how):
    adapter = adapt(model, method, tasks=TASKS, **how)
    fill_bank(adapter)
    disturb(adapter)
    return adapter


def watched(module, **given):
    """(input, output) of each call of a module during calls of a model."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    given["model"](**{key: value for key, value in given.items() if key != "model"})
    handle.remove()
    return seen


def test_scalings_are_of_the_base_models_states():
    """Every layer of a real encoder against the equation: h from an untouched copy of the model."""
    model, base = bert().double(), bert().double()
    adapter = with_loras(model, exclude=r"pooler\..*")
    h = watched(base.encoder.layer[1].intermediate.dense, model=base, input_ids=IDS, attention_mask=MASK)[0][0]
    names, state = [*adapter.layers], adapter.state_dict()
    assert names[-2:] == ["encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"]
    q, c = (state[f"{names[0]}.router.classifier.{key}"] for key in ("weight", "bias"))
    for l, name in enumerate(names):
        (_, zero), (x, y) = watched(adapter.layers[name], model=model, input_ids=IDS, attention_mask=MASK)
        logits = (h @ q.t() + c).view(*IDS.shape, len(names), 3)[:, :, l] / METHOD.temperature
        scalings = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        layer = adapter.layers[name]
        want = layer.base(x)
        for e in range(3):
            a, b = (state[f"{name}.experts.lora_{key}.rows.{e}"] for key in "AB")
            want = want + METHOD.alpha / METHOD.rank * (x * scalings[..., e : e + 1]) @ a.t() @ b
        assert_close(y, want, atol=1e-10, rtol=1e-10)
        there = watched(base.get_submodule(name), model=base, input_ids=IDS, attention_mask=MASK)[0][1]
        assert_close(zero, there, atol=1e-12, rtol=0)  # the extra forward is the base's


def test_one_lora_alone_is_that_lora(tmp_path):
    """A bank that was trained elsewhere; a classifier that is sure of one of them."""
    answers, folders = [], {}
    for i, task in enumerate(TASKS):
        torch.manual_seed(1)
        net = Net()
        alone = adapt(net, LoRA(rank=2, alpha=3 + i), tasks=[task], targets=["q", "v"])
        disturb(alone)
        with torch.no_grad():
            next(alone.parameters()).mul_(i + 1)
        alone.save(tmp_path / task)
        folders[task] = tmp_path / task
        answers.append(net(inputs(4, 5, 16)))
    net, adapter = adapted(XLoRA(rank=3), trained=False)
    adapter.load_bank(folders)
    bias = adapter.layers["q"].router.classifier.bias
    for i, answer in enumerate(answers):
        with torch.no_grad():
            bias.copy_(torch.where(torch.arange(6) % 3 == i, 100.0, 0.0))
        assert_close(net(inputs(4, 5, 16)), answer, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers[0], answers[1], atol=1e-2)


def test_only_the_classifier_learns():
    net, adapter = adapted(METHOD)
    trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"q.router.classifier.weight", "q.router.classifier.bias"}
    assert {*adapter.shared_parameters()} == {*adapter.parameters()}  # tasks may conflict in it
    before = {name: p.clone() for name, p in adapter.state_dict().items()}
    net(inputs(4, 5, 16)).square().mean().backward()
    torch.optim.SGD(adapter.param_groups(0.1)).step()
    assert {name for name, p in adapter.state_dict().items() if not torch.equal(p, before[name])} == trained


def test_k_keeps_the_largest_and_does_not_renormalise():
    net, _ = adapted(XLoRA(rank=2, k=2))
    classifier = net.q.router.classifier
    scalings = classifier(inputs(4, 5, 16))  # (4, 5, L, E)
    assert ((scalings > 0).sum(-1) == 2).all()
    assert (scalings.sum(-1) < 1).all()
    classifier.gate = type(adapted(METHOD)[0].q.router.classifier.gate)()
    whole = classifier(inputs(4, 5, 16))
    assert_close(scalings, torch.where(whole == whole.amin(-1, keepdim=True), 0.0, whole))
    with pytest.raises(ValueError, match="k=4 of 3"):
        adapted(XLoRA(k=4))


def test_the_extra_forward_has_no_noise_and_leaves_the_modes():
    model = bert(dropout=0.5)
    adapter = with_loras(model, exclude=r"pooler\..*")
    classifier = adapter.layers["encoder.layer.0.attention.self.query"].router.classifier
    quiet = watched(classifier, model=model, input_ids=IDS)[0][1]
    model.train()
    model.encoder.layer[0].eval()
    modes = [part.training for part in model.modules()]
    torch.manual_seed(0)
    noisy = watched(classifier, model=model, input_ids=IDS)[0][1]
    assert_close(noisy, quiet)
    assert [part.training for part in model.modules()] == modes
    torch.manual_seed(0)
    assert not torch.equal(model(input_ids=IDS).last_hidden_state, model(input_ids=IDS).last_hidden_state)
    handle = model.encoder.layer[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS)
    handle.remove()
    assert [part.training for part in model.modules()] == modes
    model.eval()
    assert_close(watched(classifier, model=model, input_ids=IDS)[0][1], quiet)  # and nothing of it stayed


def test_a_trained_head_in_the_model_learns_under_autocast():
    """Autocast keeps copies of weights, and in older torch those of the extra forward have no gradient: keep none."""
    net, _ = adapted(METHOD)
    net.out.weight.requires_grad_()
    keeps = []
    net.out.register_forward_pre_hook(lambda module, args: keeps.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        net(inputs(4, 5, 16)).float().square().sum().backward()
    assert keeps == [False, True]
    assert net.out.weight.grad is not None
    assert net.out.weight.grad.abs().max() > 0


def test_the_callers_cache_is_written_once_and_a_filled_one_is_refused():
    model = llama()
    with_loras(model)
    asked = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True
    )
    model(input_ids=IDS, use_cache=True)
    assert asked == [False, True]
    for given in ({"past_key_values": hf.DynamicCache(config=model.config)}, {}):
        step = model(input_ids=IDS, use_cache=True, **given)
        assert step.past_key_values.get_seq_length() == 9
        assert_close(step.logits, model(input_ids=IDS, use_cache=False).logits)
        for _ in range(2):
            with pytest.raises(ValueError, match="use_cache=False"):
                model(input_ids=IDS[:, :1], past_key_values=step.past_key_values, use_cache=True)
        assert step.past_key_values.get_seq_length() == 9
    cache = hf.DynamicCache(config=model.config)
    assert_close(model(IDS, None, None, cache).logits, step.logits)  # by position
    assert cache.get_seq_length() == 9


def test_generation_without_a_cache():
    model = llama()
    with_loras(model)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **how)
    want = IDS
    for _ in range(4):
        logits = model(input_ids=want).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf
        want = torch.cat([want, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, want)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), **how)


def test_a_later_token_changes_nothing_of_a_causal_model():
    model = llama()
    with_loras(model)
    other = IDS.clone()
    other[:, 5:] = 7
    y, moved = model(input_ids=IDS).logits, model(input_ids=other).logits
    assert_close(y[:, :5], moved[:, :5], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(y[:, 5:], moved[:, 5:], atol=1e-2)


def test_checkpointing_of_a_real_model_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = llama()
        adapter = with_loras(model)
        model.train()
        if checkpointing:
            adapter.enable_checkpointing()
        sum(model(input_ids=ids).logits.square().mean() for ids in (IDS, IDS.flip(0, 1))).backward()
        found.append([p.grad for p in adapter.parameters()])
    assert_close(found[1], found[0])
    assert all(grad.abs().max() > 0 for grad in found[0])


def test_one_stream_of_tokens_at_a_time():
    """T5's encoder or its decoder; the encoder alone, as in generation, has no scalings."""
    with pytest.raises(ValueError, match="of one stream"):
        adapt(t5(), METHOD, tasks=TASKS)
    for targets in (r"encoder\..*", r"decoder\..*(SelfAttention\.[qkvo]|DenseReluDense\.w[io]|EncDecAttention\.[qo])"):
        model = t5()
        base = t5()(input_ids=IDS, labels=IDS[:, :4].contiguous()).logits
        adapter = with_loras(model, targets=targets)
        y = model(input_ids=IDS, labels=IDS[:, :4].contiguous()).logits
        assert not torch.allclose(y, base, atol=1e-2)
        y.square().mean().backward()
        assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    model = t5()
    adapter = with_loras(model, targets=r"encoder\..*")
    with adapter.on("a"), pytest.raises(ValueError, match="outside of one"):
        model.encoder(input_ids=IDS)


def test_a_layer_of_other_tokens_is_named():
    model = bert()
    with_loras(model)  # with the pooler
    with pytest.raises(ValueError, match=r"query: .*such as a pooler"):
        model(input_ids=IDS)


class Branches(nn.Module):
    """Which layer runs depends on the call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, which):
        return self.get_submodule(which)(x)


def test_a_layer_that_did_not_run_is_told():
    net = Branches()
    with_loras(net)
    net(inputs(2, 6), "two")
    with pytest.raises(ValueError, match="did not run"):
        net(inputs(2, 6), "one")


def test_a_copy_has_a_classifier_of_its_own():
    net, adapter = adapted(METHODS["xlora"])
    twin = copy.deepcopy(net)
    y = net(inputs(4, 5, 16))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1.0 * torch.arange(p.numel()).view_as(p).cos())
    assert torch.equal(twin(inputs(4, 5, 16)), y)
    assert not torch.allclose(net(inputs(4, 5, 16)), y, atol=1e-3)


def test_what_it_costs():
    """All layers run twice; the classifier works once, LoRAs are no trained weights."""
    _, adapter = adapted(METHOD)
    summary = adapter.summary()
    classifier, loras = 2 * 3 * (16 + 1), 3 * 2 * (16 + 24 + 24 + 12)
    assert summary.trainable_parameters == summary.active_parameters == classifier
    assert summary.flops_per_token == 2 * (summary.base_flops_per_token + 2 * loras) + 2 * classifier
