"""Text families from tiny random configurations, as folders, through the whole line: train, eval, predict, generate."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from polyrank.cli import app

WORDS = ["good", "bad", "cat", "dog", "fish", "a", "the", "is", "was", "very", "yes", "no", "Question:", "Answer:"]
OTHERS = ["Ein schöner Film, oder?", "すばらしい 映画 です", "Отличный 👍🏽 кот", "قطة جميلة", "💚🐈‍⬛ ¡qué gato!"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
POSITIONS = {"max_position_embeddings": 66}


def trained(special: list[str]) -> Tokenizer:
    """Byte-level, so that every script has tokens; the special tokens come first, in their order."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return inner


def around(inner: Tokenizer, single: str, pair: str, *tokens: str) -> Tokenizer:
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, inner.token_to_id(token)) for token in tokens]
    )
    return inner


def like_bert() -> PreTrainedTokenizerBase:
    inner = trained(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    around(inner, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def like_roberta() -> PreTrainedTokenizerBase:
    inner = trained(["<s>", "<pad>", "</s>"])
    around(inner, "<s> $A </s>", "<s> $A </s> </s> $B </s>", "<s>", "</s>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"
    )


CHAT = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def like_llama() -> PreTrainedTokenizerBase:
    """A start token, no padding token of its own, padding on the left, a chat template."""
    inner = around(trained(["<s>", "</s>", "<|user|>", "<|assistant|>"]), "<s> $A", "<s> $A $B", "<s>")
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )
    made.chat_template = CHAT
    return made


def like_gpt2() -> PreTrainedTokenizerBase:
    """One special token, that ends texts, and no padding."""
    return hf.PreTrainedTokenizerFast(tokenizer_object=trained(["<|endoftext|>"]), eos_token="<|endoftext|>")


def like_t5() -> PreTrainedTokenizerBase:
    inner = around(trained(["<pad>", "</s>"]), "$A </s>", "$A </s> $B </s>", "</s>")
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def positions(**more: Any) -> dict[str, Any]:
    return {"vocab_size": 320, "initializer_range": 0.3, **SMALL, **more}


START = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Callable[[], PreTrainedTokenizerBase]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**positions(max_position_embeddings=64))), like_bert),
    "roberta": (  # counts its positions from 2
        lambda: hf.RobertaModel(
            hf.RobertaConfig(**positions(max_position_embeddings=66, type_vocab_size=1), bos_token_id=0, pad_token_id=1)
        ),
        like_roberta,
    ),
    "deberta-v2": (  # as the published ones are
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(
                **positions(max_position_embeddings=64, type_vocab_size=0), relative_attention=True,
                share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm",
                position_biased_input=False,
            )
        ),
        like_bert,
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**positions(**START))), like_llama),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**positions(**START), head_dim=8)), like_llama),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
                          bos_token_id=0, eos_token_id=0)
        ),
        like_gpt2,
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
                        eos_token_id=1, decoder_start_token_id=0)
        ),
        like_t5,
    ),
}  # fmt: skip


def save_family(family: str, folder: Path) -> Path:
    model, tokenizer = FAMILIES[family]
    if not folder.exists():
        torch.manual_seed(0)
        model().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def said(rng: random.Random, word: str) -> str:
    words = [*rng.choices(WORDS[5:10], k=rng.randrange(1, 5)), word, *rng.choices(OTHERS, k=rng.random() < 0.3)]
    return " ".join(words)


def pair(rng: random.Random) -> dict[str, Any]:
    label = rng.choice(["good", "bad"])
    return {"premise": said(rng, label), "hypothesis": said(rng, "cat"), "label": label}


def several(rng: random.Random) -> dict[str, Any]:
    labels = rng.sample(["cat", "dog", "fish"], rng.randrange(3))
    return {"text": said(rng, " ".join(labels) or "no"), "labels": labels}


def number(rng: random.Random) -> dict[str, Any]:
    return {"text": "very " * rng.randrange(5) + said(rng, "good"), "label": rng.random()}


def tagged(rng: random.Random) -> dict[str, Any]:
    words = said(rng, rng.choice(["cat", "dog"])).split()
    return {"words": words, "tags": ["B-PET" if word in ("cat", "dog") else "O" for word in words]}


def answered(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(["good", "bad"])
    return {"prompt": f"Question: {said(rng, word)} Answer:", "completion": {"good": "yes 👍🏽", "bad": "no"}[word]}


def talked(rng: random.Random) -> dict[str, Any]:
    row = answered(rng)
    turns = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chosen(rng: random.Random) -> dict[str, Any]:
    options = rng.sample(["cat", "a very good dog", "fish", OTHERS[0]], rng.choice([2, 3]))
    return {"prompt": f"Question: {said(rng, 'is')}?", "options": options, "answer": rng.randrange(len(options))}


KINDS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any]]] = {
    "pairs": (pair, {"text": ["premise", "hypothesis"], "metric": "macro_f1"}),
    "topics": (several, {"type": "multi_label"}),
    "score": (number, {"type": "regression"}),
    "tags": (tagged, {"type": "token_classification"}),
    "answer": (answered, {"type": "generation", "metric": "token_accuracy"}),
    "talk": (talked, {"type": "generation"}),
    "choice": (chosen, {"type": "multiple_choice", "normalise": "tokens"}),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def task(folder: Path, name: str, train: int = 20, test: int = 6) -> dict[str, Any]:
    """A task of the recipe, with its files."""
    make, fields = KINDS[name]
    sizes = {"train": train, "test": test}
    for split, size in sizes.items():
        rng = random.Random(f"{name}/{split}")
        write_rows(folder / f"{name}-{split}.jsonl", [make(rng) for _ in range(size)])
    return {"name": name, **{split: f"{name}-{split}.jsonl" for split in sizes}, **fields}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2},
    "moore": {"name": "moore", "num_reflections": 2, "task_dim": 4, "router_dim": 4, "router": "sample"},
    "more": {"name": "more", "rank": 3},
    "ase": {"name": "ase", "num_experts": 4, "k": 2, "rank": 1, "alpha": 1.0},
}


def call(*words: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


def answers(*words: object) -> list[dict[str, Any]]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


def recipe(folder: Path, family: str, method: str, tasks: list[dict[str, Any]], **more: Any) -> Path:
    content = {
        "model": str(save_family(family, folder / family)),
        "method": METHODS[method],
        "tasks": tasks,
        "max_length": 48,
        "training": {"steps": 3, "batch_size": 8, "lr": 1e-2},
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
