"""Ten architectures from tiny random configurations: forward, checkpointing, generation, files, and back."""

import copy

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from polyrank import ASE, Adapter, LoRA, Method, MoORE, MoORETopK, MoRE, adapt

TASKS = ("a", "b", "c")
IDS = torch.tensor([0, 2, 1])
TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, **SMALL, max_position_embeddings=64)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=8)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=16, patch_size=8)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, **SMALL, max_position_embeddings=64)),
    "deberta-v2": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(
            **TEXT, **SMALL, max_position_embeddings=64, relative_attention=True, share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", position_biased_input=False,
        )
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, **SMALL, num_key_value_heads=2, head_dim=8)),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
        )
    ),
}  # fmt: skip
# DeBERTa multiplies its table of relative positions, which belongs to no sample, with these
EXCLUDE = {"deberta-v2": r".*\.(query|key)_proj"}
IMAGES = ("vit", "dinov2", "swin")
ENCODERS = ("bert", "roberta", "deberta-v2", *IMAGES)
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "moore": MoORE(num_reflections=4, task_dim=6, router_dim=5),
    "moore-sample": MoORE(num_reflections=4, task_dim=6, router_dim=5, router="sample"),
    "moore_topk": MoORETopK(k=6, num_reflections=4, task_dim=6, router="task"),
    "more": MoRE(rank=4, alpha=4),
    "ase": ASE(num_experts=6, k=2, rank=2, alpha=2),
}
# the last four families meet one method of each way of routing; every method meets the first six
FEW, FEW_METHODS = ("roberta", "deberta-v2", "qwen3", "swin"), ("moore-sample", "more", "ase")
GRID = [(family, method) for family in CONFIGS for method in METHODS if family not in FEW or method in FEW_METHODS]
GENERATES = [(family, method) for family, method in GRID if family in ("llama", "gpt2", "t5", "qwen3")]


def fresh(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return CONFIGS[family]().eval()


def adapted(family: str, method: str) -> tuple[torch.nn.Module, Adapter]:
    model = fresh(family)
    adapter = adapt(model, METHODS[method], tasks=TASKS, exclude=EXCLUDE.get(family))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model, adapter


def batch(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if family in IMAGES:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 97, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        labels = torch.randint(3, 97, (3, 9), generator=generator)  # as long as the input, to tell the masks apart
        labels[0, 4:] = -100
        inputs["labels"] = labels
    return inputs


def answer(family: str, output) -> torch.Tensor:
    return output.last_hidden_state if family in ENCODERS else output.logits


@pytest.mark.parametrize(("family", "method"), GRID)
def test_a_family_carries_a_method(family, method, tmp_path):
    """Starts as the base, mixed batch equals single ones, saves, loads into a fresh base, and is taken out again."""
    base, model = fresh(family), fresh(family)
    adapter = adapt(model, METHODS[method], tasks=TASKS, exclude=EXCLUDE.get(family))
    inputs = batch(family)
    assert_close(answer(family, model(**inputs, task_ids=IDS)), answer(family, base(**inputs)), atol=2e-5, rtol=1e-5)
    adapter.remove()
    assert_close(dict(model.state_dict()), dict(base.state_dict()), atol=0, rtol=0)

    model, adapter = adapted(family, method)
    y = answer(family, model(**inputs, task_ids=IDS))
    alone = [
        answer(family, model(**{k: v[i : i + 1] for k, v in inputs.items()}, task_ids=IDS[i : i + 1])) for i in range(3)
    ]
    assert_close(torch.cat(alone), y, atol=2e-4, rtol=1e-4)
    adapter.save(tmp_path / "adapter")
    other = fresh(family)
    Adapter.load(tmp_path / "adapter", other)
    assert_close(answer(family, other(**inputs, task_ids=IDS)), y, atol=0, rtol=0)
    assert_close(answer(family, copy.deepcopy(other)(**inputs, task_ids=IDS)), y, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "method"), GRID)
def test_checkpointing_of_the_model_gives_the_same_gradients(family, method):
    found = []
    for checkpointing in (False, True):
        model, adapter = adapted(family, method)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        if checkpointing:
            adapter.enable_checkpointing()
        loss = sum(
            answer(family, model(**batch(family), task_ids=ids)).square().mean()
            + sum(adapter.losses().values(), torch.zeros(()))
            for ids in (IDS, IDS.flip(0))
        )
        loss.backward()
        found.append({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert_close(found[1][name], found[0][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), GENERATES)
def test_generation_of_a_mixed_batch_equals_single_ones(family, method):
    """Greedy and with beams: T5's encoder bypasses the root, beams fold into the batch, the prompt's gate is kept."""
    model, adapter = adapted(family, method)
    inputs = {k: v for k, v in batch(family).items() if k != "labels"}
    if family != "t5":  # decoders pad on the left
        inputs = {k: torch.cat([v[:1], v[1:2].roll(3, 1), v[2:]]) for k, v in inputs.items()}
    for beams in (1, 2):
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        with adapter.on([TASKS[i] for i in IDS], attention_mask=inputs["attention_mask"]):
            whole = model.generate(**inputs, **how)
        for i in range(3):
            one = {k: v[i : i + 1] for k, v in inputs.items()}
            with adapter.on(TASKS[IDS[i]], attention_mask=one["attention_mask"]):
                assert torch.equal(model.generate(**one, **how)[0], whole[i])
    with (
        pytest.raises(ValueError, match="task") if adapter.layers and METHODS[method] != METHODS["lora"] else _nothing()
    ):
        model.generate(**inputs, max_new_tokens=2, pad_token_id=0)


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return False


def test_a_decoding_step_uses_the_gate_of_its_prompt():
    """With the cache, token by token, equals one forward over prompt and answer with the prompt marked."""
    model, adapter = adapted("llama", "moore-sample")
    ids = batch("llama")["input_ids"][:2]
    prompt_mask = torch.zeros_like(ids)
    prompt_mask[:, :6] = 1
    whole = model(input_ids=ids, task_ids=IDS[:2], prompt_mask=prompt_mask).logits
    with adapter.on(IDS[:2]):
        step = model(input_ids=ids[:, :6], use_cache=True)
        logits = [step.logits]
        for i in range(6, 9):
            step = model(input_ids=ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"inside `with adapter\.on"):
        model(input_ids=ids[:, :1], past_key_values=step.past_key_values, task_ids=IDS[:2])


def test_padding_does_not_matter_to_a_pooled_router():
    model, _ = adapted("bert", "moore-sample")
    inputs = batch("bert")
    y = model(**inputs, task_ids=IDS).last_hidden_state
    changed = inputs | {"input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 5)}
    assert_close(model(**changed, task_ids=IDS).last_hidden_state[1, :6], y[1, :6], atol=1e-5, rtol=1e-5)
    short = {k: v[1:2, :6] for k, v in inputs.items()}
    assert_close(model(**short, task_ids=IDS[1:2]).last_hidden_state, y[1:2, :6], atol=1e-5, rtol=1e-5)


def test_the_mask_may_be_positional():
    model, _ = adapted("bert", "moore-sample")
    inputs = batch("bert")
    y = model(**inputs, task_ids=IDS).last_hidden_state
    assert_close(model(inputs["input_ids"], inputs["attention_mask"], task_ids=IDS).last_hidden_state, y)
