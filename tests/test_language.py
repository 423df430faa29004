"""Language models: rows of prompts and completions, losses on the completion only, likelihoods, generation."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from polyrank import LoRA, MoORE, adapt
from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate, predict, read
from polyrank.mixture import context_of
from polyrank.models import LanguageModel
from polyrank.reader import CausalReader, HeadReader, Seq2SeqReader
from polyrank.tasks import Examples, Generation, MultipleChoice, Row

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["the cat sat on the mat", "is it a good film or a bad one?", "Answer: yes", "Answer: no", "say it again"]


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Byte-level, as GPT-2's and Llama 3's are."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side=side)
    made.chat_template = CHAT
    return made


SMALL = {
    "initializer_range": 0.3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
END = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=320, **SMALL, **END, num_key_value_heads=2)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=320, **SMALL, **END, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
                      **END)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
                    pad_token_id=0, eos_token_id=1, dropout_rate=0.0)
    ),
}  # fmt: skip
ECHO = Examples(["say it:", "again: say it", "the cat sat on the mat. Answer:"], ["yes", "no no", "a good film"])
PICK = Examples([("a cat or a film?", ("cat", "a good film", "no")), ("yes?", ("yes", "no"))], [1, 0])
TASKS = (
    Generation.from_examples("echo", ECHO, ECHO),
    MultipleChoice.from_examples("pick", PICK, PICK),
    MultipleChoice.from_examples("mean", PICK, PICK, normalise="tokens"),
)


def model(family: str, side: str = "right", adapted: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    backbone = FAMILIES[family]()
    made = LanguageModel(backbone.eval(), tokenizer(side), TASKS, max_length=48)
    if adapted:
        method = MoORE(num_reflections=4, task_dim=6, router_dim=5, router="sample")
        adapter = adapt(backbone, method, tasks=[t.name for t in TASKS])
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return made


def batch_of(made: LanguageModel, scoring: bool = False):
    splits = {task.name: task.train for task in TASKS}
    corpus = (Corpus.to_score if scoring else Corpus.of)(TASKS, splits, made.reader)
    picks = [(t, i) for t, rows in enumerate(corpus.rows) for i in range(len(rows))]
    return corpus, picks, corpus.collate(picks)


def written_out(made: LanguageModel, prompt: list[int], target: list[int], task: str) -> torch.Tensor:
    """The log-probabilities of a completion, one row, without padding."""
    with torch.no_grad():
        ids = torch.tensor([made.index(task)])
        if made.backbone.config.is_encoder_decoder:
            decoder = torch.tensor([[0, *target[:-1]]])
            out = made.backbone(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, task_ids=ids).logits[0]
        else:
            mask = torch.tensor([[1] * len(prompt) + [0] * len(target)])
            out = made.backbone(input_ids=torch.tensor([prompt + target]), task_ids=ids, prompt_mask=mask).logits
            out = out[0, len(prompt) - 1 : -1]
    return out.log_softmax(-1)[range(len(target)), target]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_padded_batch_equals_rows_one_by_one(family: str):
    made = model(family)
    corpus, picks, batch = batch_of(made, scoring=True)
    answers = made(batch.inputs, batch.task_ids)
    sums = made.loss_sums(answers, batch.labels)
    for t, task in enumerate(TASKS):
        rows = [corpus.rows[t][i] for one, i in picks if one == t]
        logs = [
            written_out(made, row.ids if family == "t5" else row.ids[: -len(row.target)], row.target, task.name)
            for row in rows
        ]
        torch.testing.assert_close(sums[t], -torch.cat(logs).sum(), atol=2e-3, rtol=1e-4)
        for found, own in zip(task.read(answers[task.name].logits, rows), logs, strict=True):
            assert found.log_probability == pytest.approx(float(own.sum()), abs=1e-3)
            assert found.tokens == len(own)
    assert made.counts(batch.labels).tolist() == [sum(len(r.target) for r in rows) for rows in corpus.rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_completion_alone(family: str):
    """A target is the completion's own tokens with the end, and no label is the prompt's."""
    made = model(family, adapted=False)
    for row, (text, label) in zip(
        TASKS[0].rows(ECHO, made.reader), zip(ECHO.texts, ECHO.labels, strict=True), strict=True
    ):
        said = made.reader.tokenizer.decode(row.target)
        assert said.strip() == (label if family == "t5" else f"{label}<end>")
        whole = made.reader.tokenizer.decode(row.ids)
        assert whole == (text if family == "t5" else f"{text} {label}<end>")


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_ranked_by_likelihood(family: str):
    made = model(family)
    found = read(made, {"pick": PICK, "mean": PICK})
    for task in ("pick", "mean"):
        for answer, (prompt, options) in zip(found[task], PICK.texts, strict=True):
            scores = []
            for row in made.reader.rows([prompt] * len(options), list(options), end=False):
                head = row.ids if family == "t5" else row.ids[: -len(row.target)]
                logs = written_out(made, head, row.target, task)
                scores.append(float(logs.sum() if task == "pick" else logs.mean()))
            expected = torch.tensor(scores).softmax(0).tolist()
            assert list(answer.probabilities) == list(options)
            assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-4)
            assert answer.option == scores.index(max(scores)) and answer.answer == options[answer.option]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_of_mixed_tasks_equals_one_by_one(family: str, side: str):
    """Greedy and with beams, whatever side the tokenizer pads on."""
    made = model(family, side)
    prompts, ids = list(ECHO.texts), torch.tensor([0, 2, 1])
    for beams in (1, 3):
        how = {"max_new_tokens": 6, "num_beams": beams}
        whole = made.generate(prompts, ids, **how)
        alone = [made.generate([prompt], ids[i : i + 1], **how)[0] for i, prompt in enumerate(prompts)]
        assert whole == alone
    assert made.generate(prompts, ids.flip(0), max_new_tokens=6) != whole


def test_a_completion_that_greedy_decoding_would_write_is_an_exact_match():
    made = model("gpt2")
    (prompt,) = made.reader.rows([ECHO.texts[0]], [None], end=False)
    with adapt_context(made):
        whole = made.backbone.generate(torch.tensor([prompt.ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    said = whole[len(prompt.ids) :].tolist()
    rows = [Row(prompt.ids + end, end) for end in (said, [*said[:-1], (said[-1] + 1) % 320])]
    batch = Corpus([TASKS[0]], [rows], made.reader).collate([(0, 0), (0, 1)])
    right, wrong = TASKS[0].read(made(batch.inputs, batch.task_ids)["echo"].logits, rows)
    assert right.right == right.tokens == 4 and wrong.right == 3
    assert TASKS[0].score([right, wrong], ["", ""]) == 0.5
    assert 0 <= evaluate(made, {"echo": ECHO}, progress=False)["echo"] <= 1
    assert [one.answer for one in predict(made, [ECHO.texts[0]], "echo", max_new_tokens=4)] == [
        made.reader.tokenizer.decode(said, skip_special_tokens=True).strip()
    ]


def adapt_context(made: LanguageModel):
    context = context_of(made.backbone)
    assert context is not None
    return context.on(torch.tensor([0]))


def test_conversations_go_through_the_chat_template():
    chat = Generation.from_examples("talk", Examples([(("user", "say it"),)], ["a good film"]), Examples())
    made = LanguageModel(FAMILIES["llama"](), tokenizer(), [chat], max_length=48)
    (row,) = chat.rows(chat.train, made.reader)
    assert made.reader.tokenizer.decode(row.ids) == "<|user|>say it<end><|assistant|>a good film<end>"
    assert made.reader.tokenizer.decode(row.target) == "a good film<end>"
    assert chat.conversations and chat.prompt("say it") == (("user", "say it"),)
    made.reader.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.rows(chat.train, made.reader)


def test_plain_text_learns_every_token_but_the_first():
    plain = Generation.from_examples("plain", Examples(["", ""], TEXTS[:2]), Examples())
    reader = CausalReader(tokenizer(), 48, "left")
    for row in plain.rows(plain.train, reader):
        assert row.target == row.ids[1:] and row.ids[-1] == reader.end_id
    assert plain.metric == "token_accuracy"


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_long_prompt_is_cut_and_the_completion_is_not(truncation: str):
    reader = CausalReader(tokenizer(), 12, truncation)
    whole = CausalReader(tokenizer(), 99, truncation)
    (short,), (long,) = (r.rows([TEXTS[1] * 2], ["yes"], end=True) for r in (reader, whole))
    assert len(short.ids) == 12 and short.target == long.target
    kept, prompt = short.ids[: -len(short.target)], long.ids[: -len(long.target)]
    assert kept == (prompt[-len(kept) :] if truncation == "left" else prompt[: len(kept)])
    (only,) = reader.rows(["x"], [" ".join(TEXTS)], end=True)
    assert len(only.ids) == 12 and len(only.target) == 11


def test_an_encoder_decoder_cuts_prompt_and_target_apart():
    reader = Seq2SeqReader(tokenizer(), 5, "left", 0)
    (row,) = reader.rows([TEXTS[1]], [TEXTS[0]], end=True)
    assert len(row.ids) == len(row.target) == 5
    assert row.ids == tokenizer()(TEXTS[1])["input_ids"][-5:]


def test_rows_without_a_completion_teach_nothing():
    made = model("llama")
    half = Examples(ECHO.texts, ["yes", None, None])
    corpus = Corpus.of(TASKS, {"echo": half}, made.reader)
    batch = corpus.collate([(0, 1), (0, 2)])
    assert made.counts(batch.labels).tolist() == [0, 0, 0]
    sums = made.loss_sums(made(batch.inputs, batch.task_ids), batch.labels)
    sums.sum().backward()
    assert sums[0] == 0 and all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_a_model_without_an_adapter_is_the_base():
    made = model("llama", adapted=False)
    _, _, batch = batch_of(made)
    before = {name: answer.logits for name, answer in made(batch.inputs, batch.task_ids).items()}
    adapt(made.backbone, LoRA(rank=2), tasks=[t.name for t in TASKS])
    for name, answer in made(batch.inputs, batch.task_ids).items():
        torch.testing.assert_close(answer.logits, before[name], atol=1e-5, rtol=1e-5)


def test_a_step_of_training_lowers_the_loss():
    made = model("llama", adapted=False)
    adapter = adapt(made.backbone, LoRA(rank=4), tasks=[t.name for t in TASKS])
    optimizer = torch.optim.AdamW(adapter.param_groups(3e-2))
    _, _, batch = batch_of(made)
    losses = []
    for _ in range(20):
        loss = made.loss_sums(made(batch.inputs, batch.task_ids), batch.labels).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_cross_entropy_of_flat_logits_is_the_usual_one():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 2])
    torch.testing.assert_close(TASKS[0].loss_sum(logits, labels), F.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("prompt", ["say it", "say it ", "say it\n", "say it:", "a cat  "])
def test_training_and_generation_meet_the_same_prompt(prompt: str):
    reader = CausalReader(tokenizer(), 48, "left")
    (trained,), (asked,) = (reader.rows([prompt], [said], end=True) for said in ("yes", None))
    assert trained.ids[: -len(trained.target)] == asked.ids
    assert reader.tokenizer.decode(trained.ids).startswith(prompt.rstrip())


def test_a_tokenizer_that_adds_its_own_ends_leaves_prompts_open():
    own = tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <end>", special_tokens=[("<|user|>", 2), ("<end>", 1)]
    )
    own.bos_token = "<|user|>"
    reader = CausalReader(own, 10, "left")
    (asked,), (option,), (said,) = (
        reader.rows(["say it"], [text], end=end) for text, end in ((None, False), ("yes", False), ("yes", True))
    )
    assert asked.ids[-1] != 1 and option.target[-1] != 1 and said.target[-1] == 1 and said.target.count(1) == 1
    (long,) = reader.rows([TEXTS[1] * 3], ["yes"], end=True)
    assert len(long.ids) == 10 and long.ids[0] == 2  # what begins every text stays


def test_a_completion_that_was_cut_is_no_exact_match():
    reader = CausalReader(tokenizer(), 8, "left")
    (row,) = reader.rows(["say"], [" ".join(TEXTS)], end=True)
    assert row.cut and len(row.target) == 7
    found = TASKS[0].read(F.one_hot(torch.tensor(row.target), 320).float(), [row])
    assert found[0].right == found[0].tokens and TASKS[0].score(found, [""]) == 0.0


def test_words_of_a_byte_level_tokenizer_are_those_of_the_text():
    reader = HeadReader(tokenizer(), 48, "right")
    ((ids, marks),) = reader.encode_words([("the", "cat", "sat", "on")])
    assert ids == tokenizer()("the cat sat on")["input_ids"]
    assert [reader.tokenizer.decode([ids[i]]).strip()[0] for i in marks] == ["t", "c", "s", "o"]
