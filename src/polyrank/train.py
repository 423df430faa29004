"""Training: one loop.

    L = sum_t w_t S_t / N_t        by default w_t = N_t / sum N, so that the sampler decides: L = sum S / sum N

S_t and N_t go over the whole accumulated step of all processes. The labels are known before the forwards, so the counts
are summed first and every micro-batch divides by the global count: however a step is split, its gradient is the same.
Gradients are summed over processes by hand: a head or an expert that no sample of a process used just adds zero.

Everything a step needs is a function of (seed, step) and of the state that checkpoints hold, so a resumed run equals an
uninterrupted one bit for bit.
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import ProjectConfiguration
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from polyrank.checkpoint import Interrupted, Signals, refuse_checkpoints, save_checkpoint
from polyrank.corpus import Batch, Corpus
from polyrank.evaluate import evaluate, mean
from polyrank.files import fingerprint
from polyrank.history import History, Log
from polyrank.mixing import Mixing, Sampler
from polyrank.models import MultiTaskModel
from polyrank.tasks import Examples, Task
from polyrank.train_state import Best, Running, Trainable

TRACKERS = "trackers"  # the folder of their files, in the run's
PATIENCE = 10  # rejected steps in a row before training gives up


class Training(BaseModel):
    """How to train. batch_size counts the examples of one step over all processes and micro-batches."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1, description="micro-batches that one step is split into, on each process")
    lr: float = Field(default=1e-3, gt=0, description="learning rate of the adapter")
    head_lr: float = Field(default=3e-3, gt=0, description="learning rate of the heads")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(
        default=0.06, ge=0, lt=1, description="share of the steps over which the rate rises from zero"
    )
    schedule: Literal["linear", "cosine"] = "linear"
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    eval_every: int = Field(default=100, ge=1, description="steps between two looks at the held-out examples")
    eval_batch_size: int = Field(default=64, ge=1, description="rows of a batch when held-out examples are scored")
    holdout: float = Field(
        default=0.1, ge=0, lt=1, description="share of each task's training examples held out to choose the step"
    )
    checkpoint_every: int = Field(
        default=100, ge=0, description="steps between two checkpoints in the run folder; 0: only when interrupted"
    )
    max_holdout: int = Field(default=100, ge=0, description="at most this many held-out examples per task")
    mixing: Mixing = Mixing()
    trackers: list[str] = Field(
        default=[], description="where else to log: tensorboard, wandb, mlflow, ... (what accelerate knows and finds)"
    )
    task_weights: dict[str, float] | None = Field(
        default=None, description="w_t of each task; default: its share of the labels"
    )
    seed: int = Field(default=0, ge=0)

    @field_validator("trackers")
    @classmethod
    def _known(cls, trackers: list[str]) -> list[str]:
        """Trackers that accelerate knows and whose packages are here."""
        found = (
            [str(one) for one in filter_trackers([*trackers], TRACKERS)] if trackers else []
        )  # what accelerate finds
        for name in trackers:
            if name not in found:
                raise ValueError(f"the tracker {name!r} is not installed: pip install {name}, or leave it out")
        return trackers

    def rate(self, step: int) -> float:
        """The factor on the learning rates at a step counted from 0: a pure function, so resuming needs no state."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        left = (self.steps - step) / max(1, self.steps - rise)  # 1 -> 0
        return left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


class Diverged(RuntimeError):
    """Training met losses or gradients that are not finite, too many times in a row."""


def split(tasks: Sequence[Task], training: Training) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """The training examples of each task, and those held out of them; never looks at the test examples."""
    kept: dict[str, Examples] = {}
    held: dict[str, Examples] = {}
    for task in tasks:
        order = list(range(len(task.train)))
        random.Random(f"{training.seed}/{task.name}/holdout").shuffle(order)
        count = min(round(training.holdout * len(order)), training.max_holdout)
        held[task.name] = task.train.select(sorted(order[:count]))
        kept[task.name] = task.train.select(sorted(order[count:]))
    return kept, held


def train(
    model: MultiTaskModel,
    adapter: Trainable,
    tasks: Sequence[Task],
    training: Training,
    folder: Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> History:
    """Train the adapter and the heads in place; on return they are those of the best held-out step.

    With `folder`, every step and every look at the held-out examples is a line of `folder/metrics.jsonl`, the state is
    kept in `folder/checkpoints`, and SIGINT and SIGTERM save it before they stop the run. With `resume`, training goes
    on from the newest complete checkpoint there, or from the start where there is none.

    Raises:
        ValueError: tasks that are not the model's, no training examples.
        Diverged: ten steps in a row with a loss or gradient that is not finite; the best step so far is put back.
        Interrupted: a signal; the state was saved.
        CheckpointError: a checkpoint could not be written, or belongs to another run.
    """
    if [task.bare() for task in tasks] != [task.bare() for task in model.tasks]:
        raise ValueError("these tasks are not the model's: build MultiTaskModel from the same list of tasks")
    accelerator = tracking(training, folder)
    model.to(accelerator.device).train()
    if training.checkpointing:
        adapter.enable_checkpointing()
    kept, held = split(tasks, training)
    corpus = Corpus.of(tasks, kept, model.reader)
    sampler = training.mixing.sampler(corpus.lengths, training.batch_size, training.seed)
    _check_parts(sampler, training, accelerator)
    parameters, optimizer = build_optimizer(model, adapter, training)
    run = Running(model, adapter, optimizer, training.accumulation, identity(model, training, corpus, held))
    first = 0 if folder is None else run.restore(folder) if resume else refuse_checkpoints(folder)
    share_weights(parameters, accelerator)
    main = accelerator.is_main_process
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    log = Log(folder, progress, training.steps, main, first, accelerator.log)
    with torch.random.fork_rng(devices), log, Signals(folder is not None) as signals:
        run.start(log)
        if first == 0:
            look(run.best, 0, held, training, accelerator, log)
        for step in range(first, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * training.rate(step)
            loss, losses = backward_within_memory(run, sampler, corpus, step, training, accelerator, log)
            norm = sum_gradients(parameters, accelerator)
            taken = math.isfinite(loss) and math.isfinite(norm)  # sums over all processes, so all of them agree
            if taken:
                nn.utils.clip_grads_with_norm_(parameters, training.clip, torch.tensor(norm, device=model.device))
                optimizer.step()
                adapter.after_step()
            optimizer.zero_grad(set_to_none=False)
            log.step(step + 1, loss, losses, training.lr * training.rate(step), norm, taken)
            if log.history.skipped_in_a_row == PATIENCE:
                run.best.restore()
                raise Diverged(
                    f"the last {PATIENCE} steps, up to step {step + 1}, had a loss or gradient that is not finite and "
                    "were not taken: lower lr and head_lr, or set precision to fp32, and start anew with --overwrite "
                    "or in another folder"
                )
            last = step + 1 == training.steps
            if (step + 1) % training.eval_every == 0 or last:
                look(run.best, step + 1, held, training, accelerator, log)
            due = training.checkpoint_every and ((step + 1) % training.checkpoint_every == 0 or last)
            stop = agreed(signals.received, accelerator)
            if folder is not None and main and (due or stop):
                save_checkpoint(folder, run.checkpoint(step + 1, log.history))
            if folder is not None and stop:
                raise Interrupted(stop, step + 1, folder)
    run.best.restore()
    model.eval()
    accelerator.end_training()
    return log.history


def tracking(training: Training, folder: Path | None) -> Accelerator:
    """The accelerator, with the trackers that were asked for; their files go to `folder`/trackers."""
    if not training.trackers:
        return Accelerator()
    place = ProjectConfiguration(logging_dir=str(Path(folder or ".") / TRACKERS))
    accelerator = Accelerator(log_with=[*training.trackers], project_config=place)
    accelerator.init_trackers("polyrank")
    return accelerator


def build_optimizer(
    model: MultiTaskModel, adapter: Trainable, training: Training
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """AdamW over the adapter's own groups and the heads; every group keeps its full rate as `initial_lr`."""
    heads = list(model.heads.parameters())
    groups = adapter.param_groups(training.lr, training.weight_decay)
    if heads:
        groups.append({"params": heads, "lr": training.head_lr, "weight_decay": training.weight_decay})
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    return [*adapter.parameters(), *heads], torch.optim.AdamW(groups)


def look(
    best: Best, step: int, held: Mapping[str, Examples], training: Training, accelerator: Accelerator, log: Log
) -> None:
    """Score the held-out examples, and keep the state if it is the best so far."""
    with autocast(accelerator.device, training.precision):
        scores = evaluate(best.model, held, batch_size=training.eval_batch_size, progress=False)
    here = torch.tensor(mean(scores), device=accelerator.device)
    found = float(total(here, accelerator)) / accelerator.num_processes
    log.evaluation(step, scores, found)
    if best.offer(step, found):
        log.history.best_step, log.history.best_score = step, found


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def identity(model: MultiTaskModel, training: Training, corpus: Corpus, held: Mapping[str, Examples]) -> str:
    """What a checkpoint must agree with: settings, tasks, every example, and the frozen model."""
    frozen = {name: p for name, p in model.backbone.named_parameters() if not p.requires_grad}
    known = [
        training.model_dump(mode="json", exclude={"checkpoint_every", "eval_batch_size", "trackers"}),
        [task.bare() for task in model.tasks],
        [[(row.ids, row.target) for row in rows] for rows in corpus.rows],
        [(name, examples.texts, examples.labels) for name, examples in held.items()],
        fingerprint(frozen),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _check_parts(sampler: Sampler, training: Training, accelerator: Accelerator) -> None:
    """Every part of every step must have an example: the processes' collectives would not match.

    Raises:
        ValueError: with the sizes.
    """
    parts, smallest = accelerator.num_processes * training.accumulation, sampler.smallest
    if accelerator.num_processes > 1 and smallest < parts:
        raise ValueError(
            f"steps of {smallest} examples cannot be split into {parts} parts ({accelerator.num_processes} processes x "
            f"accumulation {training.accumulation}): raise batch_size or lower accumulation"
        )


def micro_batches(
    sampler: Sampler, corpus: Corpus, step: int, accumulation: int, accelerator: Accelerator
) -> list[Batch]:
    """This process's share of a step; empty parts, in a step with fewer examples than parts, are left out."""
    parts = accelerator.num_processes * accumulation
    own = range(accelerator.process_index, parts, accelerator.num_processes)  # long and short texts for every process
    picks = [sampler.batch(step, part, parts) for part in own]
    return [corpus.collate(part).to(accelerator.device) for part in picks if part]


def backward(
    model: MultiTaskModel, adapter: Trainable, batches: list[Batch], training: Training, accelerator: Accelerator
) -> tuple[float, dict[str, float]]:
    """Add the gradients of one whole step of this process; returns the loss of all processes, and that of each task."""
    device = model.device
    counts = torch.zeros(len(model.tasks), dtype=torch.long)  # (T,)
    for batch in batches:
        counts += model.counts(batch.labels)
    counts = counts.to(device)
    live = total(torch.tensor(len(batches), device=device), accelerator)
    counts = total(counts, accelerator)
    weights = task_factors(
        counts.to(next(adapter.parameters()).dtype), [task.name for task in model.tasks], training.task_weights
    )
    sums, extra = torch.zeros_like(weights), torch.zeros_like(weights[0])
    for batch in batches:
        with autocast(device, training.precision):
            answers = model(batch.inputs, batch.task_ids)
        own = model.loss_sums(answers, batch.labels)  # (T,)
        auxiliary = sum(adapter.losses().values(), torch.zeros_like(extra)) / live
        ((own * weights).sum() + auxiliary).backward()
        sums += own.detach()
        extra += auxiliary.detach()
    sums, extra = total(sums, accelerator), total(extra, accelerator)
    means = (sums / counts.clamp(min=1)).tolist()
    losses = {task.name: m for task, m, n in zip(model.tasks, means, counts.tolist(), strict=True) if n}
    return float((sums * weights).sum() + extra), losses


def backward_within_memory(
    run: Running,
    sampler: Sampler,
    corpus: Corpus,
    step: int,
    training: Training,
    accelerator: Accelerator,
    log: Log,
) -> tuple[float, dict[str, float]]:
    """`backward` of one whole step; out of memory, with twice as many micro-batches from then on: the same gradient."""
    while True:
        torch.manual_seed(hash((training.seed, step, accelerator.process_index)))  # noise depends on nothing else
        batches = micro_batches(sampler, corpus, step, run.accumulation, accelerator)
        try:
            return backward(run.model, run.adapter, batches, training, accelerator)
        except (RuntimeError, MemoryError) as error:
            single = all(len(batch.task_ids) == 1 for batch in batches)
            if not out_of_memory(error) or single or accelerator.num_processes > 1:
                raise
        run.optimizer.zero_grad(set_to_none=False)
        run.accumulation *= 2
        log.say(f"out of memory at step {step + 1}: each step is cut into {run.accumulation} micro-batches from now on")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or in main memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def task_factors(counts: Tensor, names: Sequence[str], task_weights: Mapping[str, float] | None) -> Tensor:
    """w_t / N_t (T,): what a sum of losses is multiplied by; finite where a task has no valid label in this step."""
    if task_weights is None:
        return torch.ones_like(counts) / counts.sum().clamp(min=1)
    if set(task_weights) != set(names):
        raise ValueError(f"task_weights names {sorted(task_weights)}, the tasks are {sorted(names)}: give one for each")
    return counts.new_tensor([task_weights[name] for name in names]) / counts.clamp(min=1)


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> float:
    """Sum the gradients over the processes, zero where a process has none; returns their norm."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = total(torch.cat([g.reshape(-1) for g in gradients]), accelerator)
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(summed.view_as(g))
    return float(nn.utils.get_total_norm(gradients))


def total(x: Tensor, accelerator: Accelerator) -> Tensor:
    """Summed over the processes, in place."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(x)
    return x


def agreed(signum: int, accelerator: Accelerator) -> int:
    """The signal that any process received, or 0: all stop after the same step."""
    if accelerator.num_processes == 1:
        return signum
    found = torch.tensor(signum, device=accelerator.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def share_weights(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Every process starts from the weights of the first."""
    if accelerator.num_processes > 1:
        for p in parameters:
            torch.distributed.broadcast(p.data, src=0)
