"""A Llama model and its tokenizer out of a GGUF file, as a plain folder for ``from_pretrained``.

A model that ``transformers`` loads from GGUF itself counts as quantised: it refuses ``save_pretrained``, and PEFT
takes its layers for something other than ``nn.Linear``. Its GGUF reader also drops the digit split of the ``smollm``
pre-tokenizer (seen in 5.23), so that blanks and line ends before a digit become other tokens than in training. So we
read the file with the ``gguf`` package and write what the model's authors would have published.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here asks a hub for anything.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

__all__ = ["DTYPE", "EXTRA", "FORMAT", "NEEDS", "convert"]

# Raise it when `convert` writes something else: it is in the name of the cached folder.
FORMAT = 1
DTYPE = "bf16"
NEEDS = ("gguf", "transformers")
EXTRA = "hf"

# GGUF name: transformers name, first outside the layers, then inside one
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the token type of <|im_start|> and its like


def convert(file: Path, into: Path) -> None:
    """Write config, bf16 weights, generation config and tokenizer of ``file`` into the folder ``into``.

    Weights are de-quantised to fp32 and rounded to bf16 once: what the GGUF's own rounding lost stays lost.

    Raises:
        ValueError: not a Llama with the ``smollm`` tokenizer, or a tensor that such a model does not have.
        OSError: the folder cannot be written.
    """
    from gguf import GGUFReader
    from safetensors.torch import save
    from transformers import GenerationConfig

    reader = GGUFReader(file)
    kind = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise ValueError(f"{file} has (architecture, tokenizer) {kind}: only ('llama', 'smollm') can be converted")
    config = _config(reader)
    config.save_pretrained(into)
    GenerationConfig.from_model_config(config).save_pretrained(into)
    _tokenizer(reader).save_pretrained(into)
    # not save_file: its error on a full disk is no OSError
    (into / "model.safetensors").write_bytes(save(_weights(reader, config), {"format": "pt"}))


def _field(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key!r}: it cannot be converted")
    return field.contents()


def _config(reader: "GGUFReader") -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _tokenizer(reader: "GGUFReader") -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # "smollm": each digit alone, then as GPT-2
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _weights(reader: "GGUFReader", config: "LlamaConfig") -> dict[str, "torch.Tensor"]:
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for stored in reader.tensors:
        name, part = _renamed(stored.name)
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        if part in heads:
            weight = _halves(weight, heads[part])
        weights[name] = weight.to(torch.bfloat16).contiguous()
    return weights


def _renamed(name: str) -> tuple[str, str]:
    """The name in transformers, and the part in GGUF's words: blk.3.attn_q.weight has the part attn_q."""
    match name.split("."):
        case [part, "weight"] if part in OUTSIDE:
            return f"{OUTSIDE[part]}.weight", part
        case ["blk", layer, part, "weight"] if part in INSIDE:
            return f"model.layers.{layer}.{INSIDE[part]}.weight", part
    raise ValueError(f"the GGUF file has a tensor {name!r}, which no plain Llama has: it cannot be converted")


def _halves(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of each head from pairs, as ggml rotates them, back to two halves, as transformers does."""
    rows, columns = weight.shape  # (heads * pairs * 2, I)
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
