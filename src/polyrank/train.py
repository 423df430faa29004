"""Training: one loop.

    L = sum_t w_t S_t / N_t        by default w_t = N_t / sum N, so that the sampler decides: L = sum S / sum N

S_t and N_t go over the whole accumulated step of all processes (step.py). Everything a step needs is a function of
(seed, step) and of the state that checkpoints hold, so a resumed run equals an uninterrupted one bit for bit.
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn

from polyrank.checkpoint import Interrupted, Signals, refuse_checkpoints, save_checkpoint
from polyrank.combining import Combination
from polyrank.corpus import Corpus
from polyrank.evaluate import evaluate, mean
from polyrank.files import fingerprint
from polyrank.forwards import autocast
from polyrank.history import History, Log
from polyrank.mixing import stage_of
from polyrank.models import HeadModel, MultiTaskModel
from polyrank.processes import Together, accelerator as this_process, telling_loss
from polyrank.retaining import Retaining
from polyrank.sharding import is_sharded, shard
from polyrank.step import (
    agreed,
    backward_within_memory,
    check_parts,
    gradient_norm,
    share_weights,
    sum_gradients,
    tell_combiner,
    tell_retaining,
    total,
)
from polyrank.tasks import Examples, Task
from polyrank.train_state import Running, Trainable
from polyrank.training import HARMLESS, TRACKERS, Training

PATIENCE = 10  # rejected steps in a row before training gives up


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

    Tasks in sequence (`training.mixing.order`) have a stage each, with a rate and moments of its own and a look at all
    tasks at its end; nothing is chosen then, the last weights stay.

    With `folder`, every step and every look at the held-out examples is a line of `folder/metrics.jsonl`, the state is
    kept in `folder/checkpoints`, and SIGINT and SIGTERM save it before they stop the run. With `resume`, training goes
    on from the newest complete checkpoint there, or from the start where there is none.

    Raises:
        ValueError: tasks that are not the model's, no training examples.
        Diverged: ten steps in a row with a loss or gradient that is not finite; the best step so far is put back.
        Interrupted: a signal; the state was saved.
        CheckpointError: a checkpoint could not be written, or belongs to another run.
        ProcessFailed: another process met such an error.
        ProcessLost: another process is gone, or does not answer.
    """
    if [task.bare() for task in tasks] != [task.bare() for task in model.tasks]:
        raise ValueError("these tasks are not the model's: build MultiTaskModel from the same list of tasks")
    accelerator = tracking(training, folder)
    together = Together()
    model.to(accelerator.device).train()
    if training.checkpointing:
        adapter.enable_checkpointing()
    kept, held = split(tasks, training)
    corpus = Corpus.of(tasks, kept, model.reader)
    sampler = training.mixing.sampler(corpus.lengths, training.batch_size, training.seed, training.steps)
    stages = training.mixing.stages(training.steps, len(tasks))
    parameters, optimizer = build_optimizer(model, adapter, training)
    combination = combine(training, model, adapter)
    known = identity(model, training, corpus, held)
    retaining = retain(training, tasks)
    run = Running(model, adapter, optimizer, training.accumulation, known, combination, retaining)
    with together.sharing_errors():
        first = 0 if folder is None else run.restore(folder) if resume else refuse_checkpoints(folder)
        check_parts(sampler, run.accumulation, accelerator)
    share(run, first, together, accelerator)
    if training.sharding == "fsdp2" and together.count > 1 and not is_sharded(model.backbone):
        shard(model.backbone, (p for _, p in adapter.named_parameters()))
    main = accelerator.is_main_process
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    log = Log(folder, progress, training.steps, main, first, accelerator.log)
    with telling_loss(), torch.random.fork_rng(devices), log, Signals(folder is not None) as signals:
        run.start(log)
        for line in cut_texts(corpus):
            log.say(line)
        if first == 0:
            look(run, 0, held, training, accelerator, log)
        for step in range(first, training.steps):
            stage = stages[stage_of(step, stages)]
            rate = training.rate(step, stage)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            loss, losses = backward_within_memory(run, sampler, corpus, step, training, accelerator, log)
            sum_gradients(parameters, accelerator)
            adapter.before_step((step + 1) / training.steps)
            norm = gradient_norm(parameters)
            taken = not agreed(int(not (math.isfinite(loss) and math.isfinite(norm))), accelerator)
            if taken:
                nn.utils.clip_grads_with_norm_(parameters, training.clip, torch.tensor(norm, device=model.device))
                optimizer.step()
                adapter.after_step()
                tell_combiner(run, sampler, corpus, step, losses, training, accelerator)
                tell_retaining(run, accelerator)
            optimizer.zero_grad(set_to_none=False)
            numbers = {} if combination is None else combination.numbers()
            numbers |= {} if retaining is None else retaining.numbers()
            log.step(step + 1, loss, losses, training.lr * rate, norm, taken, numbers)
            if log.history.skipped_in_a_row == PATIENCE:
                run.best.restore()
                raise Diverged(
                    f"the last {PATIENCE} steps, up to step {step + 1}, had a loss or gradient that is not finite and "
                    "were not taken: lower lr and head_lr, or set precision to fp32, and start anew with --overwrite "
                    "or in another folder"
                )
            last = step + 1 == training.steps
            over = step + 1 == stage.stop
            if over and training.mixing.order == "sequence":
                adapter.after_task()
                optimizer.state.clear()  # the next task's steps are not pushed by this one's moments
            if (step + 1) % training.eval_every == 0 or over:
                look(run, step + 1, held, training, accelerator, log)
            due = training.checkpoint_every and ((step + 1) % training.checkpoint_every == 0 or last)
            stop = agreed(signals.received, accelerator)
            if folder is not None and (due or stop):
                with together.sharing_errors():
                    if main:
                        save_checkpoint(folder, run.checkpoint(step + 1, log.history))
            if folder is not None and stop:
                raise Interrupted(stop, step + 1, folder)
    run.best.restore()
    model.eval()
    for tracker in accelerator.trackers:  # not end_training(): the process group is the caller's
        tracker.finish()
    return log.history


def tracking(training: Training, folder: Path | None) -> Accelerator:
    """The accelerator, with the trackers that were asked for; their files go to `folder`/trackers."""
    training.check_trackers()
    if not training.trackers:
        return this_process()
    place = ProjectConfiguration(logging_dir=str(Path(folder or ".") / TRACKERS))
    accelerator = this_process(log_with=[*training.trackers], project_config=place)
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


def share(run: Running, first: int, together: Together, accelerator: Accelerator) -> None:
    """All processes are in the same run, at the same step, and begin with the weights of the first.

    Raises:
        ValueError: they are not.
    """
    named = dict(run.adapter.named_parameters()) | run.adapter.frozen_tensors()
    sizes = hashlib.sha256(repr([(name, tuple(one.shape)) for name, one in named.items()]).encode()).hexdigest()
    together.check_same("a base model, tasks, examples, settings or a checkpoint", f"{run.identity} {first} {sizes}")
    share_weights([*named.values(), *run.model.heads.parameters()], accelerator)


def combine(training: Training, model: MultiTaskModel, adapter: Trainable) -> Combination | None:
    """
    Raises:
        ValueError: settings that do not fit the tasks; a combiner of gradients for an adapter without a shared weight.
    """
    combiner = training.combiner()
    if combiner is None:
        return None
    combiner.check([task.name for task in model.tasks])
    if combiner.needs == "gradients" and not any(True for _ in adapter.shared_parameters()):
        raise ValueError(
            f"{combiner} weighs the gradients of weights that tasks share, and every weight of this adapter belongs to "
            "one task: leave `combine` out, or take another method"
        )
    return Combination(combiner, [task.name for task in model.tasks], training.seed)


def retain(training: Training, tasks: Sequence[Task]) -> Retaining | None:
    """
    Raises:
        ValueError: answers are to be kept, and no task has classes.
    """
    return None if training.quality_retaining is None else Retaining(training.quality_retaining, tasks)


def cut_texts(corpus: Corpus) -> list[str]:
    """What to tell a person of texts that are longer than the model is given."""
    most = corpus.reader.max_length
    full = {
        task.name: (sum(len(row.ids) >= most for row in rows), len(rows))
        for task, rows in zip(corpus.tasks, corpus.rows, strict=True)
    }
    return [
        f"task {name!r}: {some} of {all_} training texts fill max_length {most}; longer ones are cut"
        for name, (some, all_) in full.items()
        if some
    ]


def look(
    run: Running, step: int, held: Mapping[str, Examples], training: Training, accelerator: Accelerator, log: Log
) -> None:
    """Score the held-out examples, and keep the state if it is the best so far; of tasks in sequence, always."""
    with autocast(accelerator.device, training.precision):
        scores = evaluate(run.model, held, batch_size=training.eval_batch_size, progress=False)
    here = torch.tensor(mean(scores), device=accelerator.device)
    found = float(total(here, accelerator)) / accelerator.num_processes
    log.evaluation(step, scores, found)
    if run.combination is not None:
        run.combination.scored(scores)
    settled = step >= run.adapter.settles * training.steps
    score = found if settled else -math.inf
    if training.mixing.order == "sequence" or run.best.beats(score):
        run.best.keep(step, score)
        log.history.best_step, log.history.best_score = step, found


def identity(model: MultiTaskModel, training: Training, corpus: Corpus, held: Mapping[str, Examples]) -> str:
    """What a checkpoint must agree with: settings, tasks, every example, and the frozen model."""
    frozen = {name: p for name, p in model.backbone.named_parameters() if not p.requires_grad}
    known = [
        training.model_dump(mode="json", exclude=set(HARMLESS)),
        [task.bare() for task in model.tasks],
        [[(row.ids, row.target, row.types, row.marks) for row in rows] for rows in corpus.rows],
        model.pooling if isinstance(model, HeadModel) else "",
        [(name, examples.texts, examples.labels) for name, examples in held.items()],
        fingerprint(frozen),
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
