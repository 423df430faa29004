"""What PEFT and transformers offer for an adapter, row by row, with a POLYRANK one.

`make test-peft` runs this folder against the oldest PEFT that is supported and the newest, each with a transformers of
its time. Rows that hold for one of them alone say so.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import polyrank.peft
from polyrank import METHODS, adapt
from polyrank.mixture import Mixture
from polyrank.peft import PolyrankConfig, PolyrankLayer

HEAVY = pytest.mark.slow  # `make test` runs the cheapest rows, `make test-peft` all of them

TASKS = ["news", "mood", "pets"]
LINEAR = ["q_proj", "v_proj", "down_proj"]
MORE = {"name": "more", "rank": 4, "alpha": 4}
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [3, 4, 3, 4, 3], [7, 7, 7, 2, 2]])
IDS = torch.tensor([0, 2, 1, 2])

# of the default size where the fields are few; sizes that divide the tiny model's
FIELDS: dict[str, dict[str, object]] = {
    "moore": {"num_reflections": 4, "task_dim": 6, "router_dim": 5},
    "moore_topk": {"k": 5, "num_reflections": 4, "task_dim": 6, "router_dim": 5},
    "vb_lora": {"rank": 3, "num_vectors": 7, "vector_length": 2},
    "xlora": {"rank": 2},
    "faded": {"of": {"name": "hydralora", "num_experts": 2, "rank": 2}},
    "dropout": {"of": {"name": "more", "rank": 4, "alpha": 4}},
}
BLOCKS = [name for name, kind in METHODS.items() if kind.ADAPTS == "feed-forward blocks"]


@pytest.fixture(autouse=True)
def _quiet():
    """The libraries' own warnings are theirs, and differ between the pairs of versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(folder: Path | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder).eval()
    return model


def config(method: object = None, targets: object = None, **fields: object) -> PolyrankConfig:
    return PolyrankConfig(
        method=MORE if method is None else method,
        tasks=TASKS,
        target_modules=LINEAR if targets is None else targets,
        **{"task_type": "CAUSAL_LM"} | fields,
    )


@torch.no_grad()
def shaken(model: nn.Module, adapter: str | None = None, seed: int = 1) -> nn.Module:
    """With weights as training leaves them: no part is zero."""
    torch.manual_seed(seed)
    for p in polyrank.peft.handle(model, adapter).parameters():
        p.add_(0.3 * torch.randn_like(p))
    return model


def adapted(method: object = None, **fields: object) -> nn.Module:
    return shaken(get_peft_model(llama(), config(method, **fields)).eval())


def logits(model: nn.Module, **given: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **given).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in polyrank.peft.handle(model).named_parameters()}


# get_peft_model


def test_it_computes_what_adapt_computes():
    model = adapted()
    twin = llama()
    adapter = adapt(twin, config().build(), tasks=TASKS, targets=LINEAR)
    adapter.load_state_dict(weights(model))
    assert_close(logits(model, task_id=IDS), logits(twin, task_ids=IDS), rtol=0, atol=0)

    def gradients(net: nn.Module, of: object, **given: Tensor) -> list[Tensor]:
        net(input_ids=TOKENS, labels=TOKENS, **given).loss.backward()
        return [p.grad for _, p in of.named_parameters() if p.grad is not None]

    ours = gradients(model, polyrank.peft.handle(model), task_id=IDS)
    for one, other in zip(ours, gradients(twin, adapter, task_ids=IDS), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert len(ours) > 4 and all(p.grad is None for p in llama().parameters())


@HEAVY
def test_it_starts_as_the_base_and_trains_the_adapter_alone(capsys: pytest.CaptureFixture):
    model = get_peft_model(llama(), config())
    assert_close(logits(model, task_id="mood"), logits(llama()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("polyrank_" in name for name in trained)
    model.print_trainable_parameters()
    count = sum(p.numel() for p in polyrank.peft.handle(model).parameters())
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.requires_grad["default"] is True
    assert status.peft_types == {"default": "POLYRANK"}


@HEAVY
def test_the_task_is_a_tensor_a_name_or_names():
    model = adapted()
    every = logits(model, task_id=IDS)
    assert_close(logits(model, task_id=["news", "pets", "mood", "pets"]), every, rtol=0, atol=0)
    assert_close(logits(model, task_id="pets")[[1, 3]], every[[1, 3]])
    with polyrank.peft.on(model, "pets"):
        assert_close(logits(model), logits(model, task_id="pets"))
    assert float((every[0] - logits(model, task_id="pets")[0]).abs().max()) > 1e-3


def test_no_task_is_an_error_and_never_a_fall_through():
    model = adapted()
    for given in ({}, {"task_ids": IDS}):  # PEFT swallows the second
        with pytest.raises(ValueError, match=r"routes by task and none was given.*task_id=.*not task_ids"):
            logits(model, **given)
    with pytest.raises(ValueError, match="routes by task"):
        model.generate(input_ids=TOKENS)
    with pytest.raises(ValueError, match="unknown task 'sport'; the adapter's tasks are: news, mood, pets"):
        logits(model, task_id="sport")
    with pytest.raises(TypeError, match="task_id must be a LongTensor"):
        logits(model, task_id=3)
    assert_close(logits(adapted("lora")), logits(adapted("lora"), task_id=IDS))  # needs none, and minds none
    logits(model, task_id=IDS)
    with pytest.raises(ValueError, match="routes by task"):  # nothing of the last batch is left
        logits(model)


@pytest.mark.parametrize(
    "name", [name if name in ("more", "moore", "vb_lora") else pytest.param(name, marks=HEAVY) for name in METHODS]
)
def test_every_method(name: str, tmp_path: Path):
    """Built by PEFT, it computes what `adapt` does, and its files hold all of it."""
    method = {"name": name} | FIELDS.get(name, {})
    targets = [*LINEAR, "gate_proj", "up_proj"] if name in BLOCKS else LINEAR
    if name == "smola":
        with pytest.raises(ValueError, match="causal"):
            get_peft_model(llama(), config(method))
        return
    model = shaken(get_peft_model(llama(), config(method, targets)).eval())
    twin = llama()
    adapter = adapt(twin, config(method).build(), tasks=TASKS, targets=targets)
    adapter.load_state_dict(weights(model))
    expected = logits(twin, task_ids=IDS)
    assert_close(logits(model, task_id=IDS), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
        assert_close(logits(loaded, task_id=IDS), expected, rtol=0, atol=0)
        assert not any(p.requires_grad or p.device.type == "meta" for p in loaded.parameters())


# Files


def test_the_files_are_small_plain_and_the_same_for_every_version(tmp_path: Path):
    model = adapted()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(value.shape != (16, 16) for value in saved.values())  # nothing of the base
    place = "base_model.model.model.layers.0.self_attn.q_proj.polyrank_"
    names = {name.removeprefix(place) for name in saved if name.startswith(place)}
    own = {name for name, _ in polyrank.peft.handle(model).layers["model.layers.0.self_attn.q_proj"].named_parameters()}
    own = {name.replace(".", "__") for name in own if not name.startswith("base.")}
    assert own <= names and names - own <= {n for n in names if n.startswith("projection__")}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "POLYRANK" and written["tasks"] == TASKS
    assert written["method"]["rank"] == 4 and written["target_modules"] == sorted(LINEAR)
    assert written["polyrank_version"] == polyrank.__version__
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, PolyrankConfig) and read.build() == config().build()


@HEAVY
def test_loading_by_every_door(tmp_path: Path):
    base = tmp_path / "base"
    model = shaken(get_peft_model(llama(base), config()).eval())
    expected = logits(model, task_id=IDS)
    model.save_pretrained(tmp_path / "adapter")
    doors = [
        PeftModel.from_pretrained(llama(base), tmp_path / "adapter"),
        PeftModel.from_pretrained(llama(base), tmp_path / "adapter", adapter_name="other"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ]
    for loaded in doors:
        assert_close(logits(loaded.eval(), task_id=IDS), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="routes by task"):
        logits(doors[-1])
    trained = PeftModel.from_pretrained(llama(base), tmp_path / "adapter", is_trainable=True)
    assert all(p.requires_grad for p in polyrank.peft.handle(trained).parameters())


@HEAVY
def test_without_our_import_peft_does_not_know_the_type(tmp_path: Path):
    adapted().save_pretrained(tmp_path)
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    for first, error in (("", "KeyError: 'POLYRANK'"), ("import polyrank.peft; ", "")):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", first + code, str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert error in done.stderr and bool(done.returncode) == bool(error), done.stderr


@HEAVY
def test_registration_is_idempotent_and_guarded():
    from importlib import reload

    from polyrank.peft import register
    from polyrank.peft.register import NAME

    register(PolyrankConfig, polyrank.peft.PolyrankModel)
    reload(sys.modules["polyrank.peft.register"])
    kind = peft.PeftType(NAME)
    assert kind is peft.PeftType[NAME] is peft.PeftType.POLYRANK and [*peft.PeftType].count(NAME) == 1
    assert kind.value == NAME and kind.name == NAME and peft.utils.peft_types.PeftType.LORA is peft.PeftType("LORA")
    with pytest.raises(ImportError, match="a type POLYRANK of its own"):
        register(type("Other", (PolyrankConfig,), {"__module__": "elsewhere"}), polyrank.peft.PolyrankModel)


@pytest.mark.skipif("POLYRANK_PEFT_EXCHANGE" not in os.environ, reason="make test-peft says where versions meet")
def test_versions_read_each_other():
    """Each run leaves its adapter there, and reads those that others left: names, values and outputs are the same."""
    folder = Path(os.environ["POLYRANK_PEFT_EXCHANGE"])
    model = adapted({"name": "moore"} | FIELDS["moore"])
    model.save_pretrained(folder / peft.__version__)
    mine = load_file(folder / peft.__version__ / "adapter_model.safetensors")
    for other in folder.iterdir():
        theirs = load_file(other / "adapter_model.safetensors")
        assert {name: value.shape for name, value in mine.items()} == {k: v.shape for k, v in theirs.items()}, other
        loaded = PeftModel.from_pretrained(llama(), other)
        assert_close(logits(loaded, task_id=IDS), logits(model, task_id=IDS))


# Frozen parts


@pytest.mark.parametrize("name", ["moore", *(pytest.param(name, marks=HEAVY) for name in ("moore_topk", "pissa"))])
def test_frozen_parts_are_checked_when_loaded(name: str, tmp_path: Path):
    model = adapted({"name": name} | FIELDS.get(name, {"rank": 4}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    projected = [key for key in saved if "polyrank_projection__" in key and saved[key].numel() > 1]
    assert projected and not any("polyrank_frozen__" in key for key in saved)
    one = saved[projected[-1]]
    save_file(saved | {projected[-1]: one.flip(0).contiguous()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"trained with another .* than this base gives here"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file(saved, path, {"format": "pt"})
    torch.manual_seed(5)
    other = LlamaForCausalLM(llama().config).eval()
    with pytest.raises(ValueError, match="load the base that it was trained on"):
        PeftModel.from_pretrained(other, tmp_path)


@HEAVY
def test_frozen_parts_are_saved_whole_on_demand(tmp_path: Path):
    method = {"name": "moore"} | FIELDS["moore"]
    model = adapted(method, with_factors=True)
    with torch.no_grad():  # as if they had come out mirrored here: the pair stands for the same W
        for layer in polyrank.peft.handle(model).layers.values():
            layer.u.neg_()
            layer.vt.neg_()
    expected = logits(model, task_id=IDS)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
        layer = next(iter(polyrank.peft.handle(loaded).layers.values()))
        mine = polyrank.peft.handle(model).layers[layer.site.name]
        assert torch.equal(layer.u, mine.u) and torch.equal(layer.vt, mine.vt)
        assert_close(logits(loaded, task_id=IDS), expected, rtol=0, atol=0)


@HEAVY
def test_masters_stay_in_fp32_beside_a_16_bit_base(tmp_path: Path):
    model = shaken(get_peft_model(llama().bfloat16(), config()).eval())
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert {p.dtype for p in weights(loaded).values()} == {torch.float32}
        for name, p in weights(model).items():
            assert torch.equal(p, weights(loaded)[name])


# Several adapters


def test_adapters_side_by_side(tmp_path: Path):
    model = adapted()
    first = logits(model, task_id=IDS)
    model.add_adapter("other", config("hydralora", ["k_proj", "v_proj"]))
    assert_close(logits(model, task_id=IDS), first, rtol=0, atol=0)
    assert not any(p.requires_grad for p in polyrank.peft.handle(model, "other").parameters())
    model.set_adapter("other")
    shaken(model, "other")
    second = logits(model)
    assert polyrank.peft.handle(model).method.__class__.__name__ == "HydraLoRA"
    assert float((second - first).abs().max()) > 1e-3
    assert all(p.requires_grad for p in polyrank.peft.handle(model, "other").parameters())
    assert not any(p.requires_grad for p in polyrank.peft.handle(model, "default").parameters())
    with model.disable_adapter():
        assert_close(logits(model, task_id=IDS), logits(llama()))
    assert_close(logits(model), second, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(llama(), tmp_path / "other")
    assert_close(logits(alone), second, rtol=0, atol=0)
    alone.load_adapter(tmp_path, "default_again")
    alone.set_adapter("default_again")
    assert_close(logits(alone, task_id=IDS), first, rtol=0, atol=0)
    with pytest.raises(ValueError, match="one POLYRANK adapter is active at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_close(logits(model, task_id=IDS), first, rtol=0, atol=0)
    assert not any("other" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    with pytest.raises(ValueError, match="no adapter 'other'"):
        polyrank.peft.handle(model, "other")
    base = model.unload()
    assert_close(logits(base), logits(llama()), rtol=0, atol=0)
    assert not any(isinstance(module, PolyrankLayer | Mixture) for module in base.modules())
    assert not base._forward_pre_hooks and not base._forward_hooks


@HEAVY
def test_blocks_stand_alone():
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(llama(), config("mixlora", targets))
    with pytest.raises(ValueError, match="stands alone"):
        model.add_adapter("other", config("lora", ["q_proj"]))
    other = get_peft_model(llama(), config("lora", ["q_proj"]))
    with pytest.raises(ValueError, match="stands alone"):
        other.add_adapter("blocks", config("mixlora", targets))
    assert [*other.peft_config] == ["default"]
    with pytest.raises(ValueError, match="target all of it, or none"):
        get_peft_model(llama(), config("mixlora", ["up_proj", "down_proj"]))


def test_injected_without_a_peft_model():
    model = llama()
    before = logits(model)
    injected = inject_adapter_in_model(config(), model)
    assert injected is model
    shaken(model)
    twin = adapted()
    assert_close(logits(model, task_id=IDS), logits(twin, task_id=IDS), rtol=0, atol=0)
    with pytest.raises(TypeError, match="the keyword is task_id"):
        logits(model, task_ids=IDS)
    with polyrank.peft.on(model, "mood"):
        assert_close(logits(model), logits(twin, task_id="mood"))
        assert model.generate(TOKENS, max_new_tokens=3).shape == (4, 8)
    assert float((logits(model, task_id=IDS) - before).abs().max()) > 1e-3


@HEAVY
def test_added_by_transformers():
    model = llama()
    before = logits(model)
    model.add_adapter(config(), adapter_name="one")
    model.add_adapter(config("lora"), adapter_name="two")
    model.set_adapter("one")
    shaken(model)
    assert_close(logits(model, task_id=IDS), logits(adapted(), task_id=IDS), rtol=0, atol=0)
    model.set_adapter("two")
    assert_close(logits(model), before)
    model.set_adapter("one")
    model.disable_adapters()
    assert_close(logits(model, task_id=IDS), before)
    model.enable_adapters()
    with pytest.raises(ValueError, match="routes by task"):
        logits(model)


# Types of tasks


@HEAVY
def test_classification(tmp_path: Path):
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    base = BertForSequenceClassification(bert).eval()
    start = {name: p.clone() for name, p in base.state_dict().items()}

    def fresh() -> nn.Module:
        model = BertForSequenceClassification(bert)
        model.load_state_dict(start)
        return model.eval()

    model = shaken(get_peft_model(fresh(), config(targets=["query", "value"], task_type="SEQ_CLS")).eval())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    model.classifier.modules_to_save["default"].weight.data.add_(1.0)
    expected = logits(model, task_id=IDS)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(fresh(), tmp_path), task_id=IDS), expected, rtol=0, atol=0)
    siblings = r".*layer\.\d+\.(intermediate|output)\.dense"
    block = shaken(get_peft_model(fresh(), config("mixlora", siblings, task_type="SEQ_CLS")))
    assert float((logits(block.eval(), task_id=IDS) - logits(base)).abs().max()) > 1e-4
    with block.disable_adapter():  # of two siblings one stands empty
        assert_close(logits(block), logits(base))
    assert_close(logits(block.unload()), logits(base), rtol=0, atol=0)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    t5_config = T5Config(
        vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=15, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(t5_config).eval()


@HEAVY
@pytest.mark.parametrize("kind", [None, "SEQ_2_SEQ_LM"])
def test_sequence_to_sequence(kind: str | None):
    model = shaken(get_peft_model(t5(), config(targets=["q", "v", "wo"], task_type=kind)).eval())
    mask = torch.ones_like(TOKENS)
    model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS, task_id=IDS).loss.backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    with pytest.raises(ValueError, match="routes by task"):  # its encoder is called around the model's forward
        model.generate(input_ids=TOKENS, attention_mask=mask)
    check_generation(model, TOKENS, mask, by_keyword=kind is not None)


def check_generation(model: nn.Module, tokens: Tensor, mask: Tensor, by_keyword: bool = True) -> None:
    """A mixed batch generates what each of its samples does alone, with beams and returned sequences too."""

    def generated(rows: slice, how: dict[str, object]) -> Tensor:
        names = [TASKS[i] for i in IDS[rows]]
        given = {"input_ids": tokens[rows], "attention_mask": mask[rows]} | how
        with polyrank.peft.on(model, names, mask[rows]):
            pinned = model.generate(**given)
        if by_keyword:
            assert torch.equal(model.generate(**given, task_id=names), pinned)
        return pinned

    for how in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | how
        times = how.get("num_return_sequences", 1)
        together = generated(slice(0, len(tokens)), how)
        assert len(together) == len(tokens) * times
        for i in range(len(tokens)):
            assert torch.equal(generated(slice(i, i + 1), how), together[i * times : (i + 1) * times])


@HEAVY
@pytest.mark.parametrize("name", ["more", "moore"])
def test_generation(name: str):
    model = adapted({"name": name} | FIELDS.get(name, MORE))
    check_generation(model, TOKENS, torch.ones_like(TOKENS))


@HEAVY
def test_generation_of_a_gate_that_pools_its_prompt():
    model = adapted({"name": "moore", "router": "sample", "num_reflections": 4, "task_dim": 6, "router_dim": 5})
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    check_generation(model, TOKENS, mask)


@HEAVY
def test_images(tmp_path: Path):
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    base = ViTForImageClassification(vit).eval()
    start, pixels = {name: p.clone() for name, p in base.state_dict().items()}, torch.randn(4, 3, 8, 8)
    before = base(pixels).logits
    targets = r".*attention.*\.(query|value|q_proj|v_proj)"
    model = shaken(get_peft_model(base, config(targets=targets, task_type=None, modules_to_save=["classifier"])).eval())
    after = model(pixel_values=pixels, task_id=IDS).logits
    assert float((after - before).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification(vit)
    again.load_state_dict(start)
    assert_close(PeftModel.from_pretrained(again, tmp_path)(pixels, task_id=IDS).logits, after)
    with pytest.raises(ValueError, match="routes by task"):
        model(pixels)


# Training


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_forwards_before_one_backward(reentrant: bool):
    def gradients(checkpointed: bool) -> list[Tensor]:
        model = adapted({"name": "mtl_lora", "num_experts": 3, "rank": 2}).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one = model(input_ids=TOKENS, labels=TOKENS, task_id=IDS).loss
        two = model(input_ids=TOKENS.flip(1), labels=TOKENS, task_id="mood").loss
        (one + 2 * two).backward()
        return [p.grad for p in polyrank.peft.handle(model).parameters()]

    for kept, made_again in zip(gradients(False), gradients(True), strict=True):
        assert_close(made_again, kept)


@HEAVY
def test_checkpointing_refuses_what_it_would_lose():
    model = adapted({"name": "mixlora", "num_experts": 4, "rank": 2}, targets=["gate_proj", "up_proj", "down_proj"])
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="auxiliary losses, which re-entrant checkpointing loses"):
        model(input_ids=TOKENS, labels=TOKENS, task_id=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=TOKENS, labels=TOKENS, task_id=IDS).loss.backward()
    assert set(polyrank.peft.handle(model).losses()) == {"balance"}


@HEAVY
def test_the_moments_of_a_method_are_reached():
    model = get_peft_model(llama(), config({"name": "ase", "num_experts": 4, "k": 2, "rank": 2})).train()
    handle = polyrank.peft.handle(nn.DataParallel(model) if torch.cuda.is_available() else nn.Sequential(model))
    model(input_ids=TOKENS, labels=TOKENS, task_id=IDS).loss.backward()
    losses = handle.losses()
    assert losses and all(value.requires_grad for value in losses.values()) and not handle.losses()
    (group,) = handle.param_groups(0.1)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    budget = get_peft_model(llama(), config({"name": "adalora", "init_rank": 4, "target_rank": 1}))
    handle = polyrank.peft.handle(budget)
    before = {name: p.clone() for name, p in handle.named_parameters()}
    budget(input_ids=TOKENS, labels=TOKENS).loss.backward()
    handle.before_step(1.0)
    handle.after_step()
    assert handle.settles > 0
    assert before.keys() == dict(handle.named_parameters()).keys()


@HEAVY
def test_a_bank_of_adapters_joins(tmp_path: Path):
    """X-LoRA mixes LoRAs that were trained before, by `adapt`."""
    alone = adapt(llama(), METHODS["lora"](rank=2), tasks=["mood"], targets=LINEAR)
    with torch.no_grad():
        for p in alone.parameters():
            p.add_(0.3 * torch.randn_like(p))
    alone.save(tmp_path / "mood")
    model = get_peft_model(llama(), config({"name": "xlora", "rank": 2})).eval()
    before = logits(model)
    polyrank.peft.handle(model).load_bank({"mood": tmp_path / "mood"})
    assert float((logits(model) - before).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="no bank of one expert for each task"):
        polyrank.peft.handle(adapted()).load_bank({"mood": tmp_path / "mood"})
    model.add_adapter("other", config("lora"))
    assert len(model.base_model.model._forward_pre_hooks) == 2
    model.set_adapter("other")  # X-LoRA's extra forward is gone with it
    assert len(model.base_model.model._forward_pre_hooks) == 1
    assert_close(logits(model), logits(llama()))


# Merging, and what is LoRA's alone


def test_merging():
    task_only = {"name": "moore_topk", "router": "task", "k": 5, "num_reflections": 4, "task_dim": 6}
    model = adapted(task_only)
    expected = logits(model, task_id="mood")
    with pytest.raises(ValueError, match=r"another model for each task: pin one, `with polyrank.peft.on"):
        model.merge_and_unload()
    assert_close(logits(model, task_id="mood"), expected, rtol=0, atol=0)
    with polyrank.peft.on(model, "mood"):
        model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert_close(logits(model, task_id="mood"), expected, rtol=0, atol=0)
    with polyrank.peft.on(model, "mood"):
        merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, LlamaForCausalLM) and not any("polyrank" in name for name in merged.state_dict())
    assert_close(logits(merged), expected)
    lora = adapted("lora")
    expected = logits(lora)
    assert_close(logits(lora.merge_and_unload()), expected)
    routed = adapted("hydralora")
    expected = logits(routed)
    with pytest.raises(ValueError, match="the gate depends on the input"), polyrank.peft.on(routed, "mood"):
        routed.merge_and_unload()
    assert_close(logits(routed), expected, rtol=0, atol=0)


@HEAVY
def test_what_is_for_lora_alone_refuses_in_words(tmp_path: Path):
    from peft.utils.hotswap import hotswap_adapter

    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="add_weighted_adapter is LoRA's alone"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match=r"adapter_names=.* is LoRA's alone.*give task_id"):
        logits(model, task_id=IDS, adapter_names=["default"] * 4)
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)hotswapping only support"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(ValueError, match=r"POLYRANK.*not compatible"):
        get_peft_model(llama(), config(), mixed=True)


def test_a_configuration_is_checked_when_it_is_made():
    assert PolyrankConfig(method="more", tasks=["a"]).build() == METHODS["more"]()
    for fields, error in [
        ({"method": "mroe"}, "unknown method 'mroe'; did you mean"),
        ({"method": {"name": "more", "rnak": 2}}, "rnak"),
        ({"method": {"name": "more", "rank": 0}}, "rank"),
        ({"method": {"rank": 2}}, "give a method's name"),
        ({"tasks": "news"}, "is one string"),
        ({"tasks": ["a", "A"]}, "different names"),
        ({"tasks": ["a/b"]}, "cannot be used"),
        ({"tasks": []}, "one or more"),
    ]:
        with pytest.raises(ValueError, match=error):
            PolyrankConfig(**{"method": "more", "tasks": ["a"]} | fields)
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, and POLYRANK adapts linear layers"):
        get_peft_model(llama(), config(targets=["embed_tokens"]))
    names = polyrank.peft.handle(get_peft_model(llama(), config(exclude_modules=["down_proj"]))).layers
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    everything = polyrank.peft.handle(get_peft_model(llama(), config(targets="all-linear"))).layers
    assert len(everything) == 14 and "lm_head" not in everything
