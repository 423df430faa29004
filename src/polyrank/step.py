"""One step: its micro-batches, their gradients, and the sums over processes.

The labels are known before the forwards, so the counts are summed first and every micro-batch divides by the global
count: however a step is split, its gradient is the same, but for auxiliary losses, whose statistics are those of a
micro-batch of all processes. Gradients are summed over processes by hand: a head or an expert that no sample of a
process used just adds zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from polyrank.combining import AfterForward, Apart, Combination, Known, Pass
from polyrank.corpus import Batch, Corpus
from polyrank.forwards import Forwards, InStep, TaskByTask, Whole, autocast
from polyrank.history import Log
from polyrank.mixing import Sampler
from polyrank.models import MultiTaskModel
from polyrank.retaining import Retaining
from polyrank.sharding import is_sharded
from polyrank.train_state import Running, Trainable
from polyrank.training import Training


class MemoryShort(RuntimeError):
    """A process ran out of memory in a step; all of them know."""


def check_parts(sampler: Sampler, accumulation: int, accelerator: Accelerator) -> None:
    """Every part of every step must have an example: the processes' collectives would not match.

    Raises:
        ValueError: with the sizes.
    """
    parts, smallest = accelerator.num_processes * accumulation, sampler.smallest
    if accelerator.num_processes > 1 and smallest < parts:
        raise ValueError(
            f"steps of {smallest} examples cannot be split into {parts} parts ({accelerator.num_processes} processes x "
            f"accumulation {accumulation}): raise batch_size, lower accumulation, or take fewer processes"
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
    known = total(torch.cat([counts.sum(0), torch.tensor([len(batches)])]).to(device), accelerator)
    total_counts, parts = known[:-1], known[-1]  # (T,), ()
    how = _pass(model, adapter, batches, total_counts, training, accelerator, combination, number)
    forwards = _forwards(model, adapter, retaining, training, accelerator, isinstance(how, Apart))
    sums, extra = like.new_zeros(len(model.tasks)), like.new_zeros(())
    if retaining is not None:
        retaining.begin(device)
    with sharing_shortage(model, accelerator):
        for batch, here in zip(batches, counts[1:], strict=True):
            for found in forwards.of(batch, here):
                auxiliary = found.auxiliary / parts
                how.add(found.objective, auxiliary, found.present, found.again)
                sums += found.sums
                extra += auxiliary.detach()
    both = total(torch.cat([sums, extra.view(1)]), accelerator)
    sums, extra = both[:-1], both[-1]
    means = sums / total_counts.clamp(min=1)
    factors = how.finish(means)
    live = zip(model.tasks, means.tolist(), total_counts.tolist(), strict=True)
    return float((sums * factors).sum() + extra), {task.name: mean for task, mean, n in live if n}


@contextmanager
def sharing_shortage(model: MultiTaskModel, accelerator: Accelerator) -> Iterator[None]:
    """The forwards and backwards of a step: where one process runs out of memory, all leave at their next meeting.

    Raises:
        MemoryShort: one of several did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # over a sharded base the others wait inside a block, not at a meeting: this one ends, and they notice
        if not out_of_memory(error) or isinstance(error, MemoryShort) or is_sharded(model.backbone):
            raise
        meet(accelerator, short=True)
        raise
    meet(accelerator)


def meet(accelerator: Accelerator, short: bool = False) -> None:
    """
    Raises:
        MemoryShort: a process is short of memory.
    """
    if accelerator.num_processes > 1 and agreed(int(short), accelerator):
        raise MemoryShort(
            "a process ran out of memory, and a step cannot be cut into smaller parts for all of them: lower "
            "batch_size or max_length, set checkpointing, or sharding to fsdp2"
        )


def _forwards(
    model: MultiTaskModel,
    adapter: Trainable,
    retaining: Retaining | None,
    training: Training,
    accelerator: Accelerator,
    apart: bool,
) -> Forwards:
    """apart: whether each task's gradient is wanted."""
    wait = partial(meet, accelerator)
    if not apart:
        return Whole(model, adapter, retaining, training, wait)
    if is_sharded(model.backbone):
        return InStep(model, adapter, retaining, training, wait, partial(total, accelerator=accelerator))
    return TaskByTask(model, adapter, retaining, training, wait)


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
            several = accelerator.num_processes > 1
            if several:  # every process needs an example in every part
                last = 2 * run.accumulation * accelerator.num_processes > sampler.smallest
            else:
                last = all(len(batch.task_ids) == 1 for batch in batches)
            if not out_of_memory(error) or last or is_sharded(run.model.backbone):
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
    return isinstance(error, MemoryShort | MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
        error
    )


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


def share_weights(tensors: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Every process starts from the weights of the first, and from the frozen tensors that it computed."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            dense = tensor.data.contiguous()
            torch.distributed.broadcast(dense, src=0)
            tensor.data.copy_(dense)
