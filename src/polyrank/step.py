"""One step: its micro-batches, their gradients, and the sums over processes.

The labels are known before the forwards, so the counts are summed first and every micro-batch divides by the global
count: however a step is split, its gradient is the same, but for auxiliary losses, whose statistics are those of a
micro-batch. Gradients are summed over processes by hand: a head or an expert that no sample of a process used just
adds zero.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from polyrank.combining import AfterForward, Apart, Combination, Known, Pass
from polyrank.corpus import Batch, Corpus
from polyrank.forwards import TaskByTask, Whole, autocast
from polyrank.history import Log
from polyrank.mixing import Sampler
from polyrank.models import MultiTaskModel
from polyrank.retaining import Retaining
from polyrank.train_state import Running, Trainable
from polyrank.training import Training


def check_parts(sampler: Sampler, training: Training, accelerator: Accelerator) -> None:
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
    model: MultiTaskModel,
    adapter: Trainable,
    batches: list[Batch],
    training: Training,
    accelerator: Accelerator,
    combination: Combination | None = None,
    number: int = 0,
    retaining: Retaining | None = None,
) -> tuple[float, dict[str, float]]:
    """Add the gradients of one whole step of this process; returns the loss of all processes, and that of each task."""
    device, like = model.device, next(adapter.parameters())
    counts = torch.stack([torch.zeros(len(model.tasks), dtype=torch.long), *(model.counts(b.labels) for b in batches)])
    parts = total(torch.tensor(len(batches), device=device), accelerator)
    total_counts = total(counts.sum(0).to(device), accelerator)  # (T,)
    how = _pass(model, adapter, batches, total_counts, training, accelerator, combination, number)
    forwards = (TaskByTask if isinstance(how, Apart) else Whole)(model, adapter, retaining, training.precision)
    sums, extra = like.new_zeros(len(model.tasks)), like.new_zeros(())
    if retaining is not None:
        retaining.begin(device)
    for batch, here in zip(batches, counts[1:], strict=True):
        for found in forwards.of(batch, here):
            auxiliary = found.auxiliary / parts
            how.add(found.objective, auxiliary, found.present, found.again)
            sums += found.sums
            extra += auxiliary.detach()
    sums, extra = total(sums, accelerator), total(extra, accelerator)
    means = sums / total_counts.clamp(min=1)
    factors = how.finish(means)
    live = zip(model.tasks, means.tolist(), total_counts.tolist(), strict=True)
    return float((sums * factors).sum() + extra), {task.name: mean for task, mean, n in live if n}


def _pass(
    model: MultiTaskModel,
    adapter: Trainable,
    batches: Sequence[Batch],
    counts: Tensor,
    training: Training,
    accelerator: Accelerator,
    combination: Combination | None,
    number: int,
) -> Pass:
    """The way that this step's losses become gradients. counts: (T,) of the whole step."""
    like, names = next(adapter.parameters()), [task.name for task in model.tasks]
    if combination is None:
        return Known(task_factors(counts.to(like.dtype), names, training.task_weights))
    needs = combination.combiner.needs
    if needs == "gradients":
        shared = list(adapter.shared_parameters())
        others = (set(adapter.parameters()) | set(model.heads.parameters())) - set(shared)
        return Apart(combination, number, counts, shared, list(others), accelerator)
    losses = None
    if needs == "losses":
        if len(batches) == 1 and accelerator.num_processes == 1:
            return AfterForward(combination, number, counts)
        losses = total(
            sums_without_gradients(model, batches, number, training, accelerator), accelerator
        ) / counts.clamp(min=1)
    return Known(combination.ask(number, counts > 0, losses).to(like) / counts.clamp(min=1))


@torch.no_grad()
def sums_without_gradients(
    model: MultiTaskModel, batches: Sequence[Batch], step: int, training: Training, accelerator: Accelerator
) -> Tensor:
    """S_t (T,) of this process's share of a step, with the step's own noise, of which none is used up."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), autocast(model.device, training.precision):
        seed_noise(step, training, accelerator)
        parts = [model.loss_sums(model(batch.inputs, batch.task_ids), batch.labels) for batch in batches]
    return torch.stack(parts).sum(0) if parts else torch.zeros(len(model.tasks), device=model.device)


def tell_combiner(
    run: Running,
    sampler: Sampler,
    corpus: Corpus,
    step: int,
    losses: Mapping[str, float],
    training: Training,
    accelerator: Accelerator,
) -> None:
    """After a step that was taken: its losses, or those of the same examples after the update."""
    if run.combination is None:
        return
    found = torch.tensor([losses.get(task.name, 0.0) for task in run.model.tasks])
    if run.combination.combiner.looks_again:
        batches = micro_batches(sampler, corpus, step, run.accumulation, accelerator)
        counts = sum((run.model.counts(batch.labels) for batch in batches), torch.zeros_like(found).long())
        sums = total(sums_without_gradients(run.model, batches, step, training, accelerator), accelerator)
        found = sums / total(counts.to(sums.device), accelerator).clamp(min=1)
    run.combination.after(found)


def tell_retaining(run: Running, accelerator: Accelerator) -> None:
    """After a step that was taken: its answers go into the banks."""
    if run.retaining is not None:
        for fresh in run.retaining.fresh.values():
            total(fresh, accelerator)
        run.retaining.after()


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
        seed_noise(step, training, accelerator)
        batches = micro_batches(sampler, corpus, step, run.accumulation, accelerator)
        try:
            return backward(
                run.model, run.adapter, batches, training, accelerator, run.combination, step, run.retaining
            )
        except (RuntimeError, MemoryError) as error:
            single = all(len(batch.task_ids) == 1 for batch in batches)
            if not out_of_memory(error) or single or accelerator.num_processes > 1:
                raise
        run.optimizer.zero_grad(set_to_none=False)
        run.accumulation *= 2
        log.say(f"out of memory at step {step + 1}: each step is cut into {run.accumulation} micro-batches from now on")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def seed_noise(step: int, training: Training, accelerator: Accelerator) -> None:
    """The noise of a step depends on nothing else."""
    torch.manual_seed(hash((training.seed, step, accelerator.process_index)))


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


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Sum the gradients over the processes, zero where a process has none."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = total(torch.cat([g.reshape(-1) for g in gradients]), accelerator)
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(summed.view_as(g))


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


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
