"""TRL's SFTTrainer: the task reaches each sample after TRL's own preparation. Needs polyrank[trl]."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed: pip install 'polyrank[trl]' to run these tests", allow_module_level=True)

import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from polyrank import ASE, Adapter, LoRA, Method, MoRE, adapt
from polyrank.hf import PolyrankTrainerMixin, TaskCollator
from test_hf import END, SMALL, TASKS, disturbed
from test_language import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL 1 sets what transformers 5 calls deprecated


class Trainer(PolyrankTrainerMixin, SFTTrainer):
    pass


PROMPTS = ["is a cat good?", "say it again", "a film", "the mat", "is it a dog", "no film or a good one"]
ROWS = [
    {
        "prompt": prompt,
        "completion": [" yes", " no, a bad one", " cat"][i % 3],
        "task": TASKS[i * i % 3 if i % 5 else 2],
    }
    for i, prompt in enumerate(PROMPTS)
]


def model(method: Method) -> tuple[hf.LlamaForCausalLM, Adapter]:
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "vocab_size": 320}, **END, initializer_range=0.2))
    return made, disturbed(made, method)


def trainer(folder: Path, method: Method, rows: list[dict] = ROWS, kind: type = Trainer, **more: object) -> SFTTrainer:
    made, adapter = model(method)
    fixed = {"per_device_train_batch_size": 3, "max_steps": 2, "learning_rate": 0.05, "logging_steps": 1,
             "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no",
             "max_length": 32}  # fmt: skip
    own = {"adapter": adapter} if kind is Trainer else {}
    return kind(
        model=made,
        args=SFTConfig(str(folder), **{**fixed, **more}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **own,
    )


def seen(run: SFTTrainer) -> list[tuple[Tensor, Tensor]]:
    """What reaches the model in training: token ids and task ids."""
    found: list[tuple[Tensor, Tensor]] = []
    run.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            found.append((kwargs["input_ids"], kwargs["task_ids"])) if module.training else None
        ),
        with_kwargs=True,
        prepend=True,
    )
    return found


def task_of() -> dict[str, int]:
    return {row["prompt"] + row["completion"]: TASKS.index(row["task"]) for row in ROWS}


def test_each_sample_keeps_its_task_through_trl(tmp_path: Path):
    run = trainer(tmp_path, MoRE(rank=4))
    found = seen(run)
    run.train()
    texts, pairs = tokenizer(), 0
    for ids, tasks in found:
        for row, task in zip(ids, tasks.tolist(), strict=True):
            assert task_of()[texts.decode(row, skip_special_tokens=True)] == task
            pairs += 1
    assert pairs == 6
    scores = run.evaluate()
    for task in {row["task"] for row in ROWS}:
        assert scores[f"eval_loss_{task}"] == pytest.approx(naive_loss(run, task), rel=1e-4)


@torch.no_grad()
def naive_loss(run: SFTTrainer, task: str) -> float:
    """The mean over the completions' tokens, one text after the other."""
    total, count, texts = 0.0, 0, tokenizer()
    for row in ROWS:
        if row["task"] == task:
            start = len(texts(row["prompt"])["input_ids"])
            ids = torch.tensor([texts(row["prompt"] + row["completion"] + texts.eos_token)["input_ids"]])
            with run.adapter.on(task):
                logits = run.model.eval()(ids).logits
            total += float(F.cross_entropy(logits[0, start - 1 : -1], ids[0, start:], reduction="sum"))
            count += ids.shape[1] - start
    return total / count


def test_without_the_mixin_the_task_is_lost_and_said_to_be(tmp_path: Path):
    """What the mixin is for: TRL's own trainer drops the column, and a task-routed method refuses."""
    with pytest.raises(ValueError, match="routes by task and none was given"):
        trainer(tmp_path, MoRE(rank=4), kind=SFTTrainer).train()


def test_auxiliary_losses_are_those_of_the_forward_with_gradients(tmp_path: Path):
    method = ASE(num_experts=4, k=2, num_shared=1, rank=2, alpha=2, mutual_information=0.5)
    run = trainer(tmp_path, method, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    run.model.train()
    run.current_gradient_accumulation_steps = 2
    loss = run.compute_loss(run.model, dict(batch), num_items_in_batch=torch.tensor(10))
    plain = run.model(**batch)
    extra = sum(run.adapter.losses().values())
    valid = (batch["labels"][:, 1:] != -100).sum()
    assert float(extra.abs()) > 0
    assert loss.detach() == pytest.approx(float(plain.loss * valid / 10 + extra / 2), rel=1e-5)


@pytest.mark.parametrize("method", [LoRA(rank=4), MoRE(rank=4, contrastive=0)], ids=repr)
def test_rows_without_padding_train_as_rows_with_it(tmp_path: Path, method: Method):
    """All rows in one, an id for each token: the same weights after two steps."""
    found = []
    for flag in (False, True):
        rows = [prepared(row) for row in ROWS]
        run = trainer(tmp_path, method, rows, padding_free=flag, max_length=None, optim="sgd")
        shapes = seen(run)
        run.train()
        assert all((tasks.shape == ids.shape) == flag for ids, tasks in shapes) and len(shapes) == 2
        found.append({name: p.detach().clone() for name, p in run.adapter.state_dict().items()})
    start = model(method)[1].state_dict()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in start)
    assert any(not torch.allclose(found[0][name], start[name], atol=1e-4) for name in start)


def prepared(row: dict) -> dict:
    texts = tokenizer()
    prompt, ids = texts(row["prompt"])["input_ids"], texts(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :], "task": row["task"]}


def test_rows_that_were_packed_before_have_a_task_for_each_text(tmp_path: Path):
    rows = [prepared(row) for row in ROWS]
    packed = [
        {
            "input_ids": one["input_ids"] + other["input_ids"],
            "labels": one["labels"] + other["labels"],
            "seq_lengths": [len(one["input_ids"]), len(other["input_ids"])],
            "task": [one["task"], other["task"]],
        }
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    more = {"padding_free": True, "max_length": None, "shuffle_dataset": False}
    run = trainer(tmp_path, MoRE(rank=4), packed, **more, per_device_eval_batch_size=2)
    apart = trainer(tmp_path, MoRE(rank=4), rows, max_length=None)
    whole, each = run.evaluate(), apart.evaluate()
    names = [f"eval_loss_{task}" for task in {row["task"] for row in ROWS}]
    assert [whole[name] for name in names] == pytest.approx([each[name] for name in names], rel=1e-4)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_trl_s_own_packing_is_refused(tmp_path: Path, strategy: str):
    with pytest.raises(ValueError, match=r"has no column 'task'.*packing=False"):
        trainer(tmp_path, MoRE(rank=4), packing=True, packing_strategy=strategy, max_length=64)


def test_an_adapted_output_layer_is_refused(tmp_path: Path):
    made = model(LoRA())[1].remove()
    adapter = adapt(made, LoRA(), tasks=TASKS, targets=["lm_head", "q_proj"])
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match="exclude="):
        Trainer(
            model=made, args=args, adapter=adapter, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer()
        )


def test_the_collator_alone_serves_where_nothing_is_dropped(tmp_path: Path):
    """A model whose keyword has another name, in TRL's own trainer."""
    run = trainer(tmp_path, LoRA(rank=2), kind=SFTTrainer, remove_unused_columns=False)
    run.data_collator = TaskCollator(run.data_collator, TASKS, keyword="task_id")
    batch = next(iter(run.get_train_dataloader()))
    assert batch["task_id"].shape == (3,)
