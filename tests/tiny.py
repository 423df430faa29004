"""A tiny text encoder with its tokenizer, and tasks that a few words decide: for tests, without downloads."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyrank.models import HeadModel
from polyrank.tasks import Classification, Examples

WORDS = ["good", "bad", "cat", "dog", "fish", "a", "the", "is", "was", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def backbone(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config).eval()


def decoder(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=15,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path) -> Path:
    """A model folder as people have them."""
    backbone().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence(word: str, rng: random.Random) -> str:
    words = [*rng.choices(WORDS[5:], k=rng.randrange(1, 8)), word]
    rng.shuffle(words)
    return " ".join(words)


def examples(words: tuple[str, ...], size: int, seed: int) -> Examples:
    rng = random.Random(seed)
    labels = [words[i % len(words)] for i in range(size)]
    return Examples([sentence(label, rng) for label in labels], labels)


def tasks(size: int = 48) -> list[Classification]:
    """Two tasks of two and three labels."""
    sources = {"mood": ("bad", "good"), "pet": ("cat", "dog", "fish")}
    return [
        Classification.from_examples(name, examples(words, size, 1), examples(words, 12, 2))
        for name, words in sources.items()
    ]


def model(of: list[Classification], seed: int = 0) -> HeadModel:
    return HeadModel(backbone(seed), tokenizer(), of, max_length=16)
