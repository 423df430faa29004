"""Inside the Trainer: the task reaches every sample, steps equal a loop by hand, a resumed run an uninterrupted one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler

from polyrank import ASE, Adapter, LoRA, Method, MoORE, MoRE, adapt
from polyrank.hf import PolyrankTrainerMixin, TaskCollator, load_checkpoint
from polyrank.hf.losses import TaskLosses, losses_of
from polyrank.methods import AdaLoRA, Dropout, SMoRA

TASKS = ("mood", "pet", "place")
END = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Trainer(PolyrankTrainerMixin, hf.Trainer):
    """In the order of the rows, so that a loop can follow."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Seq2SeqTrainer(PolyrankTrainerMixin, hf.Seq2SeqTrainer):
    pass


def disturbed(model: hf.PreTrainedModel, method: Method) -> Adapter:
    adapter = adapt(model, method, tasks=TASKS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def writer(method: Method) -> tuple[hf.LlamaForCausalLM, Adapter]:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **END, initializer_range=0.2))
    return model, disturbed(model, method)


def classifier(method: Method) -> tuple[hf.BertForSequenceClassification, Adapter]:
    torch.manual_seed(0)
    sizes = {**SMALL, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=3))
    adapter = disturbed(model, method)
    model.classifier.requires_grad_(True)
    return model, adapter


def written(size: int = 16) -> list[dict]:
    """Texts of 4 to 7 tokens whose first two are no labels."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 40, (4 + i % 4,), generator=generator).tolist() for i in range(size)]
    return [
        {"input_ids": text, "labels": [-100, -100, *text[2:]], "task": TASKS[i * i % 3 if i % 5 else 2]}
        for i, text in enumerate(texts)
    ]


def labelled(size: int = 16) -> list[dict]:
    return [
        {**row, "labels": row["input_ids"][0] % 3, "attention_mask": [1] * len(row["input_ids"])}
        for row in written(size)
    ]


def pad(rows: list[dict]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([[*row[key], *[fill] * (width - len(row[key]))] for row in rows])

    labels = (
        padded("labels", -100) if isinstance(rows[0]["labels"], list) else torch.tensor([r["labels"] for r in rows])
    )
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", 0), "labels": labels, "attention_mask": mask}


def settings(folder: Path, **more: object) -> dict:
    fixed = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 2,
    }
    return {"output_dir": str(folder), **fixed, **more}


def trainer(folder: Path, model: hf.PreTrainedModel, adapter: Adapter, rows: list[dict], **more: object) -> Trainer:
    args = hf.TrainingArguments(**settings(folder, **more))
    data = Dataset.from_list(rows)
    return Trainer(
        model=model,
        args=args,
        adapter=adapter,
        data_collator=pad,
        train_dataset=data,
        eval_dataset=data.select(range(min(7, len(rows)))),
    )


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The collator.


def test_names_and_ids_become_a_keyword_and_the_inner_collator_sees_no_task():
    seen: list[set[str]] = []

    def inner(rows: list[dict]) -> dict[str, Tensor]:
        seen.extend(set(row) for row in rows)
        return pad(rows)

    rows = [{**row, "kind": kind} for row, kind in zip(written(4), ["place", 0, "pet", torch.tensor(1)], strict=True)]
    batch = TaskCollator(inner, TASKS, column="kind", keyword="task_id")(rows)
    assert batch["task_id"].tolist() == [2, 0, 1, 1] and batch["task_id"].dtype == torch.long
    assert all("kind" not in keys for keys in seen) and "kind" in rows[0]


@pytest.mark.parametrize(
    ("task", "words"),
    [("pets", "row 1 .*'pets'. did you mean 'pet'.*mood, pet, place"), (3, "from 0 to 2"), (-1, "no task"),
     (True, "no task"), (0.5, "no task"), (None, "no task"), (["pet"], "1 tasks and 0 seq_lengths")],
)  # fmt: skip
def test_a_task_that_is_not_known_is_refused_with_its_row(task: object, words: str):
    rows = written(3)
    rows[1]["task"] = task
    with pytest.raises(ValueError, match=f"(?s)(?i){words}"):
        TaskCollator(pad, TASKS)(rows)


def test_a_missing_column_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"row 0.*'task'.*input_ids, labels.*unused_columns=False.*packing=False"):
        TaskCollator(pad, TASKS)([{key: row[key] for key in ("input_ids", "labels")} for row in written(2)])


def flat(rows: list[dict]) -> dict[str, Tensor]:
    """As TRL's without padding: all rows in one, filled up to a multiple of 8."""
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    return {"input_ids": F.pad(ids, (0, -len(ids) % 8)).unsqueeze(0), "cu_seq_lens_q": torch.zeros(2)}


def test_rows_in_one_give_every_token_its_task():
    rows = written(3)
    naive = [TASKS.index(row["task"]) for row in rows for _ in row["input_ids"]]
    found = TaskCollator(flat, TASKS)(rows)["task_ids"]
    assert found.shape == (1, 16) and found[0].tolist() == naive + naive[-1:] * (16 - len(naive))
    packed = {"input_ids": [*range(8)], "seq_lengths": [3, 5], "task": ["pet", "mood"]}
    assert TaskCollator(flat, TASKS)([packed])["task_ids"].tolist() == [[1] * 3 + [0] * 5]
    one = TaskCollator(flat, TASKS)(rows[:1])["task_ids"]  # a batch of one row is in one too
    assert one.shape == (1, 8)


def test_a_batch_whose_samples_are_not_its_rows_is_refused():
    with pytest.raises(ValueError, match="3 rows became a batch"):
        TaskCollator(lambda rows: {"input_ids": torch.zeros(2, 9)}, TASKS)(written(3))


# Losses of each task.


def means(rows: list, accelerator: object = None) -> dict[str, float]:
    found = TaskLosses(TASKS)
    found.add(rows, torch.tensor(0.5))

    class Two:
        """Two processes with the same numbers."""

        device = torch.device("cpu")

        def reduce(self, tensor: Tensor, how: str) -> Tensor:
            assert how == "sum"
            return 2 * tensor

    return found.take(accelerator or Two())  # type: ignore[arg-type]


@pytest.mark.parametrize("shifts", [False, True])
def test_losses_of_tokens_by_task(shifts: bool):
    torch.manual_seed(0)
    logits, labels, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 5)), torch.tensor([2, 0, 2])
    labels[0, 3:] = labels[1] = -100
    sums = {task: [] for task in TASKS}
    for b in range(3):
        for place in range(4 if shifts else 5):
            wanted = int(labels[b, place + shifts])
            if wanted != -100:
                sums[TASKS[ids[b]]].append(float(-logits[b, place].log_softmax(-1)[wanted]))
    naive = {f"loss_{task}": sum(found) / len(found) for task, found in sums.items() if found}
    output = hf.modeling_outputs.CausalLMOutput(logits=logits)
    for given in (ids, ids.view(3, 1).expand(3, 5)):  # an id for each sample, and one for each token
        assert means(losses_of(output, labels, given, shifts=shifts, problem=None)) == pytest.approx(
            naive | {"auxiliary": 0.5}
        )


def test_losses_of_samples_by_task():
    torch.manual_seed(0)
    ids = torch.tensor([0, 1, 0])
    cases = [
        (torch.randn(3, 4), torch.tensor([1, 3, 0]), None, lambda x, y: F.cross_entropy(x, y)),
        (torch.randn(3, 1), torch.randn(3), "regression", lambda x, y: F.mse_loss(x, y.view(1))),
        (torch.randn(3, 4), (torch.rand(3, 4) > 0.5).float(), "multi_label_classification",
         lambda x, y: F.binary_cross_entropy_with_logits(x, y)),
    ]  # fmt: skip
    for logits, labels, problem, loss in cases:
        each = [float(loss(x, y)) for x, y in zip(logits, labels, strict=True)]
        found = means(losses_of({"logits": logits}, labels, ids, shifts=False, problem=problem))
        assert found["loss_mood"] == pytest.approx((each[0] + each[2]) / 2)
        assert found["loss_pet"] == pytest.approx(each[1]) and "loss_place" not in found
    assert losses_of({"logits": torch.randn(3, 4)}, torch.zeros(3, 4).long(), ids, shifts=False, problem=None) == []
    assert losses_of((torch.zeros(3),), torch.zeros(3), ids, shifts=False, problem=None) == []


# The Trainer.


def test_steps_equal_a_hand_written_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two micro-batches a step, auxiliary losses, clipping, the order of what the method is told, and the log."""
    told: list[tuple] = []
    monkeypatch.setattr(ASE, "before_step", lambda self, layers, done: told.append(("before", done, gradient(layers))))
    monkeypatch.setattr(ASE, "after_step", lambda self, layers: told.append(("after",)))
    method = ASE(num_experts=4, k=2, num_shared=1, rank=2, alpha=2, mutual_information=0.5)
    rows = written(32)
    model, adapter = writer(method)
    run = trainer(tmp_path, model, adapter, rows, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.5)
    run.train()
    seen, told = told, []

    own, adapter = writer(method)
    optimizer, collate = torch.optim.SGD(adapter.param_groups(0.05)), TaskCollator(pad, TASKS)
    own.train()
    logs, window = [], []
    for step in range(4):
        parts = [collate(rows[start : start + 4]) for start in (8 * step, 8 * step + 4)]
        count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        for part in parts:
            logits = own(**{key: part[key] for key in ("input_ids", "attention_mask", "task_ids")}).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), part["labels"][:, 1:], reduction="none")
            extra = sum(adapter.losses().values())
            (each.sum() / count + extra / 2).backward()
            kept = (part["labels"][:, 1:] != -100) * torch.ones_like(each)
            window += [*zip(each.sum(1).tolist(), kept.sum(1).tolist(), part["task_ids"].tolist(), strict=True)]
        adapter.before_step((step + 1) / 4)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        if step % 2:
            logs.append(
                [sum(s for s, _, t in window if t == i) / sum(n for _, n, t in window if t == i) for i in range(3)]
            )
            window = []
    expected = weights(own)
    assert all(torch.allclose(p, expected[name], atol=1e-6) for name, p in weights(model).items())
    assert [entry[:2] for entry in seen] == [entry[:2] for entry in told]
    assert [e[2] for e in seen[::2]] == pytest.approx([e[2] for e in told[::2]])  # told before clipping
    found = [[entry[f"loss_{task}"] for task in TASKS] for entry in run.state.log_history if "loss" in entry]
    assert found == [pytest.approx(one, rel=1e-5) for one in logs]
    assert all("auxiliary" in entry for entry in run.state.log_history if "loss" in entry)


def gradient(layers: dict) -> float:
    squares = [
        float(p.grad.square().sum()) for layer in layers.values() for p in layer.parameters() if p.grad is not None
    ]
    return sum(squares) ** 0.5


def test_rows_that_are_no_data_set_keep_their_task_too(tmp_path: Path):
    model, adapter = writer(MoRE(rank=2))
    args = hf.TrainingArguments(**settings(tmp_path, max_steps=1))
    Trainer(model=model, args=args, adapter=adapter, data_collator=pad, train_dataset=written()).train()


METHODS = {
    "dropout": Dropout(of={"name": "more", "rank": 4}, p=0.3, at="input"),  # noise
    "adalora": AdaLoRA(init_rank=4, target_rank=2, begin=0.1, end=0.9),  # what before_step keeps
    "smora": SMoRA(rank=8, k=3, alpha=6, rate=0.01),  # what after_step keeps
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str):
    """Bit for bit, the head beside the adapter included; epochs of 4 steps, cut inside the second."""
    more = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "lr_scheduler_type": "linear"}

    def run(folder: str, resume: object = None, **change: object) -> tuple[Trainer, dict[str, Tensor]]:
        model, adapter = classifier(METHODS[name])
        started = weights(model)
        found = trainer(tmp_path / folder, model, adapter, labelled(), **more, **change)
        found.train(resume_from_checkpoint=resume)
        ended = weights(model)
        moved = {key for key in ended if not torch.equal(ended[key], started[key])}
        assert {"classifier.weight"} < moved <= {*found.adapter.state_dict(), "classifier.weight", "classifier.bias"}
        return found, ended

    _, whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    _, resumed = run("resumed", str(checkpoint))
    assert equal(whole, resumed)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter/manifest.json",
                     "adapter/adapter.safetensors", "adapter/frozen.safetensors", "trained/trained.safetensors",
                     "trained/manifest.json"}  # fmt: skip


def test_the_best_weights_come_back_and_load_on_a_fresh_model(tmp_path: Path):
    model, adapter = classifier(MoRE(rank=4))
    more = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss_pet", "greater_is_better": True}
    run = trainer(tmp_path, model, adapter, labelled(), **more, **best)
    run.train()
    scores = {entry["step"]: entry["eval_loss_pet"] for entry in run.state.log_history if "eval_loss_pet" in entry}
    step = max(scores, key=lambda one: scores[one])
    assert run.state.best_global_step == step != 5
    fresh = classifier(MoRE(rank=4))[1].remove()
    loaded = load_checkpoint(tmp_path / f"checkpoint-{step}", fresh)
    batch = TaskCollator(pad, TASKS)(labelled(5))
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, fresh.eval()(**batch).logits)
    assert loaded.tasks == TASKS
    assert run.evaluate()["eval_loss_pet"] == pytest.approx(scores[step])


def test_before_a_method_has_settled_no_weights_are_the_best(tmp_path: Path):
    model, adapter = classifier(AdaLoRA(init_rank=4, target_rank=2, begin=0.1, end=0.7))
    more = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 4}
    run = trainer(tmp_path, model, adapter, labelled(), **more, load_best_model_at_end=True, learning_rate=1.0)
    run.train()
    assert 0 < adapter.settles < 1 and run.state.best_global_step >= adapter.settles * 4


def test_another_run_s_checkpoint_is_refused(tmp_path: Path):
    model, adapter = writer(LoRA(rank=2))
    trainer(tmp_path, model, adapter, written(), save_strategy="steps", save_steps=2, max_steps=2).train()
    other = trainer(tmp_path / "other", *writer(MoRE(rank=2)), written())
    with pytest.raises(ValueError, match=r"trained with the method .*lora.*resume with what"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(FileNotFoundError, match="no folder 'adapter'"):
        other.train(resume_from_checkpoint=str(tmp_path))


def test_recomputed_layers_see_their_own_route(tmp_path: Path):
    found = []
    for flag in (False, True):
        model, adapter = writer(MoRE(rank=4))
        trainer(tmp_path, model, adapter, written(), activation_checkpointing=flag, optim="sgd").train()
        assert model.is_activation_checkpointing == flag
        found.append(weights(model))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_a_gate_over_samples_sees_the_prompt_alone_in_training(tmp_path: Path):
    model, adapter = writer(MoORE(num_reflections=2, task_dim=3, router_dim=3, router="sample"))
    run = trainer(tmp_path, model, adapter, written(), max_steps=1)
    batch = TaskCollator(pad, TASKS)(written(4))
    loss = run.compute_loss(model.train(), dict(batch))
    prompts = torch.zeros_like(batch["input_ids"])
    prompts[:, :2] = 1  # written() has two tokens without a label
    assert torch.equal(loss, model(**batch, prompt_mask=prompts).loss)
    assert not torch.equal(loss, model(**batch).loss)


def test_generation_in_an_evaluation_runs_on_each_row_s_task(tmp_path: Path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=5.0)
    )
    adapter = disturbed(model, MoRE(rank=4))
    args = hf.Seq2SeqTrainingArguments(
        **settings(tmp_path), predict_with_generate=True, generation_max_length=6, per_device_eval_batch_size=8
    )
    rows = Dataset.from_list(written(6))
    run = Seq2SeqTrainer(model=model, args=args, adapter=adapter, data_collator=pad, train_dataset=rows)
    found = run.predict(rows, metric_key_prefix="test")
    naive, sums = [], []
    for row in written(6):
        with adapter.on(row["task"]), torch.no_grad():
            ids = torch.tensor([row["input_ids"]])
            naive.append(model.generate(ids, max_length=6)[0].tolist())
            sums.append(float(model(ids, labels=torch.tensor([row["labels"]])).loss))
    said = [[*map(int, line)] for line in found.predictions]
    assert [line[: len(one)] for line, one in zip(said, naive, strict=True)] == naive and len({*map(str, naive)}) > 1
    mine = [x for x, row in zip(sums, written(6), strict=True) if row["task"] == "pet"]
    lengths = [len(row["input_ids"]) - 2 for row in written(6) if row["task"] == "pet"]
    expected = sum(x * n for x, n in zip(mine, lengths, strict=True)) / sum(lengths)
    assert found.metrics["test_loss_pet"] == pytest.approx(expected, rel=1e-5)


def test_what_would_lose_the_task_or_the_adapter_is_refused(tmp_path: Path):
    model, adapter = writer(AdaLoRA(init_rank=4, target_rank=2, begin=0.1, end=0.9))
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in written(4)]
    with pytest.raises(ValueError, match=r"training data set has no column 'task', only input_ids, labels"):
        trainer(tmp_path, model, adapter, bare)
    with pytest.raises(ValueError, match="not in this model"):
        trainer(tmp_path, model, writer(LoRA())[1], written())
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs"):
        more = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
        trainer(tmp_path, model, adapter, written(), **more)
    run = trainer(tmp_path, model, adapter, written())
    for name, value, words in [("fp16", True, "bf16=True"), ("_n_gpu", 2, "torchrun")]:
        before = vars(run.args)[name]
        vars(run.args)[name] = value
        with pytest.raises(ValueError, match=words):
            run._refuse_unfit()
        vars(run.args)[name] = before
    run.optimizer_cls_and_kwargs = torch.optim.SGD, {"params": [*adapter.parameters()], "lr": 0.1}
    with pytest.raises(ValueError, match="groups the weights itself"):
        run.create_optimizer()
    with pytest.raises(ValueError, match="came without 'task_ids'"):
        run.compute_loss(model, pad(written(2)))


TWO = """
import sys
from test_hf import *

def main(rank, world, folder):
    import os
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": sys.argv[2]}
    model, adapter = writer(ASE(num_experts=4, k=2, num_shared=1, rank=2, alpha=2, mutual_information=0))
    run = trainer(folder, model, adapter, written(32), per_device_train_batch_size=4 // world, optim="sgd",
                  gradient_accumulation_steps=2)
    run.train()
    if rank == 0:
        logs = [{key: entry[key] for key in entry if key.startswith("loss_")} for entry in run.state.log_history]
        torch.save((adapter.state_dict(), [one for one in logs if one]), Path(folder) / f"of_{world}.pt")

if __name__ == "__main__":
    folder, world = Path(sys.argv[1]), int(sys.argv[3])
    main(0, 1, folder) if world == 1 else torch.multiprocessing.spawn(main, (2, folder), 2)
"""


@pytest.mark.slow
def test_two_processes_train_and_log_as_one(tmp_path: Path):
    """Each step's samples are the same, its loss is over all of them, and so are the losses in the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "two.py").write_text(TWO)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    for world in ("1", "2"):
        program = [sys.executable, "-W", "ignore", str(tmp_path / "two.py"), str(tmp_path), port, world]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    (one, log), (two, logs) = (torch.load(tmp_path / f"of_{world}.pt") for world in (1, 2))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert len(log) == len(logs) == 2
    assert all(theirs == pytest.approx(mine, rel=1e-4) for mine, theirs in zip(log, logs, strict=True))
