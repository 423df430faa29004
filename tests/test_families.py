"""Text families from tiny random configurations, as folders, through the whole line: train, eval, predict, generate."""

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

import polyrank.recipe
import polyrank.recipe.runs
from polyrank.cli import app
from polyrank.evaluate import predict
from polyrank.recipe.loading import load_backbone
from polyrank.recipe.runs import Run
from polyrank.tasks import Prediction

WORDS = ["good", "bad", "cat", "dog", "fish", "a", "the", "is", "was", "very", "yes", "no", "Question:", "Answer:"]
OTHERS = ["Ein schöner Film, oder?", "すばらしい 映画 です", "Отличный 👍🏽 кот", "قطة جميلة", "💚🐈‍⬛ ¡qué gato!"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def byte_level(special: list[str]) -> Tokenizer:
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
    inner = byte_level(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    around(inner, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def like_roberta() -> PreTrainedTokenizerBase:
    inner = byte_level(["<s>", "<pad>", "</s>"])
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
    inner = around(byte_level(["<s>", "</s>", "<|user|>", "<|assistant|>"]), "<s> $A", "<s> $A $B", "<s>")
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )
    made.chat_template = CHAT
    return made


def like_gpt2() -> PreTrainedTokenizerBase:
    """One special token, that ends texts, and no padding."""
    return hf.PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>")


def like_t5() -> PreTrainedTokenizerBase:
    inner = around(byte_level(["<pad>", "</s>"]), "$A </s>", "$A </s> $B </s>", "</s>")
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def sizes(**more: Any) -> dict[str, Any]:
    return {"vocab_size": 320, "initializer_range": 0.3, **SMALL, **more}


DECODER = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Callable[[], PreTrainedTokenizerBase]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**sizes(max_position_embeddings=64))), like_bert),
    "roberta": (  # its positions begin at 2
        lambda: hf.RobertaModel(hf.RobertaConfig(**sizes(max_position_embeddings=66, type_vocab_size=1))),
        like_roberta,
    ),
    "deberta-v2": (  # relative positions, as in all that are published
        lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(
                **sizes(max_position_embeddings=64), relative_attention=True, share_att_key=True,
                pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", position_biased_input=False,
            )
        ),
        like_bert,
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes(**DECODER, max_position_embeddings=128))),
        like_llama,
    ),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes(**DECODER, max_position_embeddings=128), head_dim=8)),
        like_llama,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
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
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2},
    "moore": {"name": "moore", "num_reflections": 2, "task_dim": 4, "router_dim": 4, "router": "sample"},
    "more": {"name": "more", "rank": 3},
    "ase": {"name": "ase", "num_experts": 4, "k": 2, "rank": 1, "alpha": 1.0},
}


def save_family(family: str, folder: Path) -> Path:
    """A model folder as people have them."""
    model, tokenizer = FAMILIES[family]
    torch.manual_seed(0)
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(rng: random.Random, *given: str) -> str:
    some = [*given, *rng.choices(WORDS[5:10], k=rng.randrange(1, 5)), *rng.choices(OTHERS, k=rng.random() < 0.3)]
    rng.shuffle(some)
    return " ".join(some)


def pair(rng: random.Random) -> dict[str, Any]:
    label = rng.choice(["good", "bad"])
    return {"premise": words(rng, label), "hypothesis": words(rng, "cat"), "label": label}


def several(rng: random.Random) -> dict[str, Any]:
    labels = rng.sample(["cat", "dog", "fish"], rng.randrange(3))
    return {"text": words(rng, *labels), "labels": labels}


def number(rng: random.Random) -> dict[str, Any]:
    count = rng.randrange(5)
    return {"text": words(rng, *["very"] * count), "label": count + rng.random()}


def tagged(rng: random.Random) -> dict[str, Any]:
    found = words(rng, "cat", "a", "dog").split()
    return {"words": found, "tags": ["B-PET" if word in ("cat", "dog") else "O" for word in found]}


def answered(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(["good", "bad"])
    return {"prompt": f"Question: {words(rng, word)} Answer:", "completion": {"good": "yes 👍🏽", "bad": "no"}[word]}


def talked(rng: random.Random) -> dict[str, Any]:
    row = answered(rng)
    turns = ("user", row["prompt"]), ("assistant", row["completion"])
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chosen(rng: random.Random) -> dict[str, Any]:
    options = rng.sample(["cat", "a very good dog", "fish", OTHERS[0]], rng.choice([2, 3]))
    return {"prompt": f"Question: {words(rng, 'is')}?", "options": options, "answer": rng.randrange(len(options))}


KINDS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any]]] = {
    "pairs": (pair, {"text": ["premise", "hypothesis"], "metric": "macro_f1"}),
    "topics": (several, {"type": "multi_label"}),
    "score": (number, {"type": "regression", "metric": "pearson"}),
    "tags": (tagged, {"type": "token_classification"}),
    "answer": (answered, {"type": "generation", "metric": "token_accuracy"}),
    "talk": (talked, {"type": "generation", "metric": "token_accuracy"}),
    "choice": (chosen, {"type": "multiple_choice", "normalise": "tokens"}),
}


def made(name: str, count: int, seed: str = "train") -> list[dict[str, Any]]:
    rng = random.Random(f"{name}/{seed}")
    return [KINDS[name][0](rng) for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def source(folder: Path, name: str, train: list[dict[str, Any]] | None = None, test: list | None = None) -> dict:
    """A task of a recipe, with its files."""
    parts = {"train": train or made(name, 16), "test": test or made(name, 4, "test")}
    for part, rows in parts.items():
        write_rows(folder / f"{name}-{part}.jsonl", rows)
    return {"name": name, **{part: f"{name}-{part}.jsonl" for part in parts}, **KINDS[name][1]}


def write_recipe(folder: Path, family: str, method: str, tasks: list[dict[str, Any]], **more: Any) -> Path:
    """For three steps; what is kept is the last one."""
    content: dict[str, Any] = {
        "model": str(folder / family),
        "method": METHODS[method],
        "tasks": tasks,
        "max_length": 48,
        "training": {"steps": 3, "batch_size": 8, "lr": 1e-2, "holdout": 0.0},
        "out": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | more))
    return folder / "recipe.yaml"


def call(*given: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in given])


def entries(*given: object) -> list[dict[str, Any]]:
    result = call(*given, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return [json.loads(line) for line in result.stdout.splitlines()]


def trained(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> tuple[Run, dict[str, torch.Tensor]]:
    """`polyrank train RECIPE`: the run that it holds in the end, and its adapter's weights before training."""
    runs: list[Run] = []
    before: dict[str, torch.Tensor] = {}
    train, run = polyrank.recipe.runs.train, polyrank.recipe.run

    def watched(model: Any, adapter: Any, *rest: Any, **more: Any) -> Any:
        before.update({name: p.detach().clone() for name, p in adapter.named_parameters()})
        return train(model, adapter, *rest, **more)

    def kept(*given: Any, **more: Any) -> Run:
        runs.append(run(*given, **more))
        return runs[0]

    with monkeypatch.context() as patch:
        patch.setattr(polyrank.recipe.runs, "train", watched)
        patch.setattr(polyrank.recipe, "run", kept)
        result = call("train", recipe)
    assert result.exit_code == 0, (result.output, result.exception)
    return runs[0], before


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: save_family(family, folder / family) for family in FAMILIES}


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    tasks: tuple[str, str]
    more: dict[str, Any]

    @property
    def speaks(self) -> bool:
        """Whether it needs a language model."""
        return "choice" in self.tasks


def case(family: str, method: str, *tasks: str, **more: Any) -> Any:
    return pytest.param(Case(family, method, (tasks[0], tasks[1]), more), id=f"{family}-{method}-{'-'.join(tasks)}")


# DeBERTa's other projections also read its table of relative positions, which has no task
DEBERTA = {"targets": ["value_proj", "dense"]}
HEADS = [
    case("bert", "moore", "pairs", "tags"),
    case("bert", "more", "topics", "score"),
    case("roberta", "ase", "pairs", "topics"),
    case("roberta", "more", "score", "tags"),
    case("deberta-v2", "ase", "pairs", "score", **DEBERTA),
    case("deberta-v2", "more", "topics", "tags", **DEBERTA),
    case("deberta-v2", "lora", "pairs", "tags"),
    case("llama", "moore", "score", "pairs", pooling="last"),
    case("llama", "more", "tags", "topics", pooling="last"),
    case("t5", "ase", "tags", "topics"),
    case("t5", "more", "pairs", "score"),
]
LANGUAGE = [
    case("llama", "moore", "talk", "choice"),
    case("llama", "more", "answer", "choice"),
    case("qwen3", "ase", "talk", "choice"),
    case("qwen3", "more", "answer", "choice"),
    case("gpt2", "moore", "answer", "choice"),
    case("gpt2", "more", "choice", "answer"),
    case("gpt2", "lora", "answer", "choice"),
    case("t5", "ase", "choice", "answer"),
    case("t5", "more", "answer", "choice"),
]


@pytest.mark.parametrize("of", HEADS + LANGUAGE)
def test_a_family_goes_through_the_whole_line(
    of: Case, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only the adapter learns; the folder alone gives the same scores and answers."""
    tasks = [source(tmp_path, name) for name in of.tasks]
    recipe = write_recipe(tmp_path, of.family, of.method, tasks, model=str(families[of.family]), **of.more)
    run, before = trained(monkeypatch, recipe)

    after = dict(run.adapter.named_parameters())
    for layer in run.adapter.layers:
        own = [name for name in after if name.startswith(f"{layer}.")]
        assert own and any(not torch.equal(after[name], before[name]) for name in own), layer
    assert all(p.isfinite().all() for p in after.values())

    (found,) = entries("eval", run.folder)
    written = json.loads((run.folder / "results.json").read_text())
    assert found["tasks"] == {name: row["adapted"] for name, row in written["tasks"].items()}
    assert list(found["tasks"]) == list(of.tasks) and found["mean"] == pytest.approx(written["mean"]["adapted"])

    for task in run.model.tasks:
        if task.kind == "generation" and of.method != "ase":
            continue  # 64 new tokens take their time
        rows = made(task.name, 4, "test")[: 1 if task.kind == "generation" else 4]
        write_rows(tmp_path / "asked.jsonl", rows)
        said = entries("predict", run.folder, "--task", task.name, "--file", tmp_path / "asked.jsonl")
        texts = task.test.texts[: len(rows)]
        answers = predict(run.model, texts, task.name)
        assert said == [entry(task.name, *both) for both in zip(texts, answers, strict=True)]
        fits(task.name, said, rows)

    if of.speaks:
        prompt = f"Question: {OTHERS[4]} {OTHERS[3]}? Answer:"
        said = entries("generate", run.folder, prompt, "--max-new-tokens", 6)
        expected = run.model.generate([prompt] * 2, torch.tensor([0, 1]), max_new_tokens=6)
        assert said == [{"task": n, "prompt": prompt, "text": t} for n, t in zip(of.tasks, expected, strict=True)]

    run.adapter.remove()
    base = load_backbone(run.recipe, of.speaks)[0].state_dict()
    here = run.model.backbone.state_dict()
    assert here.keys() == base.keys() and all(torch.equal(here[name], base[name]) for name in base)


def entry(task: str, text: Any, answer: Prediction) -> dict[str, Any]:
    """What `predict --json` prints."""
    shares = {"probabilities": answer.probabilities} if answer.probabilities else {}
    return json.loads(json.dumps({"task": task, "text": text, "answer": answer.answer} | shares))


def fits(task: str, said: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Every answer is one that the task can have."""
    assert len(said) == len(rows)
    for one, row in zip(said, rows, strict=True):
        answer, shares = one["answer"], one.get("probabilities", {})
        if task in ("pairs", "choice"):
            assert set(shares) == set(row.get("options", ("good", "bad"))) and answer == max(shares, key=shares.get)
            assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
        elif task == "topics":
            assert answer == [name for name in ("cat", "dog", "fish") if shares[name] > 0.5]
        elif task == "score":
            assert isinstance(answer, float)
        elif task == "tags":
            assert len(answer) == len(row["words"]) and set(answer) <= {"B-PET", "O"}
        else:
            assert isinstance(answer, str)


def test_each_type_meets_two_families_and_each_family_both_ways_of_routing():
    cases = [one.values[0] for one in HEADS + LANGUAGE]
    for kind in KINDS:
        assert len({one.family for one in cases if kind in one.tasks}) >= 2, kind
    for part in (HEADS, LANGUAGE):
        for family in {one.values[0].family for one in part}:
            own = {one.values[0].method for one in part if one.values[0].family == family}
            assert own & {"moore", "ase"} and "more" in own, family


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_completion_too_long_is_cut_and_learned(
    family: str, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long = {"prompt": "a cat " * 60 + "good?", "completion": "very good " * 60}
    task = source(tmp_path, "answer", [long, *made("answer", 8)], [long, *made("answer", 2, "test")])
    recipe = write_recipe(tmp_path, family, "moore", [task], model=str(families[family]), max_length=24)
    run, _ = trained(monkeypatch, recipe)
    (row, *_) = run.model.tasks[0].rows(run.model.tasks[0].test, run.model.reader)
    assert len(row.ids) == 24 and len(row.target) == (24 if family == "t5" else 23)
    (found,) = entries("eval", run.folder)
    assert found["tasks"] == {"answer": run.results["tasks"]["answer"]["adapted"]}
    (said,) = entries("generate", run.folder, long["prompt"], "--max-new-tokens", 4)
    assert said["text"] == run.model.generate([long["prompt"]], torch.tensor([0]), max_new_tokens=4)[0]


def test_tasks_of_very_different_sizes_and_steps_without_one_of_them(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tasks = [source(tmp_path, "pairs", made("pairs", 150)), source(tmp_path, "tags", made("tags", 1))]
    training = {"steps": 4, "batch_size": 4, "lr": 1e-2, "accumulation": 2}
    recipe = write_recipe(tmp_path, "bert", "ase", tasks, model=str(families["bert"]), training=training)
    run, _ = trained(monkeypatch, recipe)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["losses"] for line in lines if "losses" in line]
    assert len(steps) == 4 and any(set(losses) == {"pairs"} for losses in steps)
    (found,) = entries("eval", run.folder)
    assert found["tasks"] == {name: row["adapted"] for name, row in run.results["tasks"].items()}


def test_rows_without_a_label_are_not_scored_and_not_learned(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same scores as without them, and losses over the same number of labels, for every type with a head."""
    labels = {"pairs": "label", "topics": "labels", "score": "label", "tags": "tags"}
    found = []
    for part, gaps in (("without", 0), ("with", 6)):
        folder = tmp_path / part
        folder.mkdir()
        tasks = []
        for name, label in labels.items():
            gap = [{**row, label: None} for row in made(name, gaps, "gap")]
            tasks.append(source(folder, name, made(name, 12) + gap, made(name, 6, "test") + gap))
        training = {"steps": 1, "batch_size": 128, "holdout": 0.0}
        recipe = write_recipe(folder, "bert", "more", tasks, model=str(families["bert"]), training=training)
        run, _ = trained(monkeypatch, recipe)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses = next(line["losses"] for line in lines if "losses" in line)
        rows = run.results["tasks"]
        found.append([[losses[name], rows[name]["majority"], rows[name]["frozen"]] for name in labels])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), atol=1e-4, rtol=1e-4)


def slow(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def talkless(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def foreign(folder: Path) -> None:
    """A model with fewer embeddings than its tokenizer has tokens."""
    hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes(**DECODER, max_position_embeddings=128) | {"vocab_size": 9})
    ).save_pretrained(folder)


def seeing(folder: Path) -> None:
    hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(folder)


REFUSED: dict[str, tuple[str, list[str], dict[str, Any], str]] = {
    "bert asked for text": ("bert", ["answer"], {}, "cannot generate"),
    "roberta asked to choose": ("roberta", ["choice"], {}, "cannot generate"),
    "heads and language": ("bert", ["pairs", "answer"], {}, "train two recipes"),
    "language and heads": ("llama", ["talk", "tags"], {}, "train two recipes"),
    "4 bits": ("llama", ["answer"], {"quantise": "4bit"}, "pip install bitsandbytes"),
    "8 bits": ("bert", ["pairs"], {"quantise": "8bit"}, "pip install bitsandbytes"),
    "texts too long for bert": ("bert", ["pairs"], {"max_length": 65}, "at most 64 tokens"),
    "texts too long for gpt2": ("gpt2", ["answer"], {"max_length": 129}, "at most 128 tokens"),
    "texts too long for roberta": ("roberta", ["pairs"], {"max_length": 66}, "lower max_length"),
    "a layer that reads positions": ("deberta-v2", ["pairs"], {}, "a table of positions"),
    "texts too long for llama": ("llama", ["answer"], {"max_length": 129}, "at most 128 tokens"),
    "no such layers": ("t5", ["pairs"], {"targets": ["q_proj"]}, "'q_proj' is the end of no linear layer"),
}


def refuse(recipe: Path, message: str) -> None:
    result = call("train", recipe)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert "error: " in result.output and message in result.output and "Traceback" not in result.output
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_cure(
    name: str, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    family, tasks, more, message = REFUSED[name]
    there, gone = importlib.util.find_spec, "bitsandbytes"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == gone else there(name, *a))
    sources = [source(tmp_path, task) for task in tasks]
    method = "more" if "positions" in name else "lora"
    refuse(write_recipe(tmp_path, family, method, sources, model=str(families[family]), **more), message)


@pytest.mark.parametrize(
    ("family", "task", "spoil", "message"),
    [
        ("t5", "pairs", slow, "tokenizer.json file"),
        ("t5", "answer", slow, "tokenizer.json file"),
        ("llama", "answer", without("tokenizer.json"), "the tokenizer"),
        ("llama", "answer", without("tokenizer.json", "tokenizer_config.json"), "the tokenizer"),
        ("gpt2", "answer", without("tokenizer.json", "config.json"), "config.json"),
        ("bert", "pairs", without("tokenizer.json", "tokenizer_config.json"), "knows no word"),
        ("llama", "talk", talkless, "no chat template"),
        ("llama", "answer", foreign, "give it its own"),
        ("bert", "pairs", seeing, "which reads pixel_values"),
    ],
)
def test_a_folder_without_a_fast_tokenizer_is_refused(
    family: str, task: str, spoil: Callable[[Path], Any], message: str, tmp_path: Path
):
    spoil(save_family(family, tmp_path / family))
    refuse(write_recipe(tmp_path, family, "lora", [source(tmp_path, task)]), message)


@pytest.mark.parametrize(
    ("family", "task", "fields", "message"),
    [
        ("bert", "pairs", {"hypothesis": ""}, "'hypothesis' is empty"),
        ("bert", "pairs", {"premise": None}, "'premise' is null"),
        ("bert", "tags", {"words": []}, "'words' has no words"),
        ("bert", "tags", {"tags": ["O"]}, "one tag for each word"),
        ("llama", "answer", {"completion": ""}, "'completion' is empty"),
        ("llama", "talk", {"messages": [{"role": "user", "content": "a cat"}]}, "not the assistant's"),
        ("llama", "choice", {"options": ["cat"]}, "1 options"),
        ("llama", "choice", {"answer": "neither"}, "not an option"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(
    family: str, task: str, fields: dict[str, Any], message: str, families: dict[str, Path], tmp_path: Path
):
    rows = made(task, 6)
    rows[2] |= fields
    recipe = write_recipe(tmp_path, family, "lora", [source(tmp_path, task, rows)], model=str(families[family]))
    refuse(recipe, f"{task}-train.jsonl:3: ")
    refuse(recipe, message)
