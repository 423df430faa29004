"""A step of Nash-MTL beside a step of the summed losses: MiniLM, and 2 to 32 tasks with a share of the samples each.

    python benchmarks/combiners.py --threads 1

"apart" is how a step is made (`polyrank.forwards.TaskByTask`): a forward and a backward pass of each task's samples.
"K passes" is one forward of all samples and a backward pass through it for each task, as it is made where samples look
at each other. All three run in turn in one process; the medians of the ratios of the same round's times are printed.
The time is the process's own. Differences are the largest |g - g'| / |g'| of a task's gradient on the shared weights,
fp32; "rounding" is the same against an fp64 model, of apart and of K passes. "kept" is what the tasks' gradients take
in memory, in units of the adapter's weights.
"""

import argparse
import time
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from polyrank import METHODS, Adapter, adapt
from polyrank.assets import model_folder
from polyrank.combine import COMBINERS
from polyrank.combining import Apart, Combination, Known, Pass
from polyrank.corpus import Batch
from polyrank.forwards import Forwards, TaskByTask, Whole
from polyrank.models import HeadModel
from polyrank.tasks import Classification

METHOD = {"lora": {"rank": 8}, "mola": {}}  # without losses of its own, and with a balance loss
CPU = Accelerator(cpu=True)


def ready(method: str, num_tasks: int, dtype: torch.dtype) -> tuple[HeadModel, Adapter]:
    """The same weights for every dtype, moved off their start; no dropout, so that gradients can be compared."""
    torch.manual_seed(0)
    folder = model_folder("minilm")
    backbone = AutoModel.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tasks = [Classification(name=f"t{i}", names=("a", "b", "c")) for i in range(num_tasks)]
    model = HeadModel(backbone, AutoTokenizer.from_pretrained(folder), tasks)
    adapter = adapt(backbone, METHODS[method](**METHOD[method]), tasks=[task.name for task in tasks])
    with torch.no_grad():
        for p in [*adapter.parameters(), *model.heads.parameters()]:
            p.add_(0.02 * torch.randn_like(p))
    model.train()
    return model.to(dtype), adapter


def batch_of(num_tasks: int, size: int, vocabulary: int) -> Batch:
    """Samples of 32 to 64 random tokens, the tasks in turn."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 65, (size, 1), generator=generator)
    tokens = torch.randint(1000, vocabulary, (size, int(lengths.max())), generator=generator)
    mask = (torch.arange(tokens.shape[1]) < lengths).long()
    ids = torch.arange(size) % num_tasks
    labels = {f"t{i}": torch.randint(3, (n,), generator=generator) for i, n in enumerate(ids.bincount().tolist())}
    return Batch({"input_ids": tokens * mask, "attention_mask": mask}, ids, labels)


def step(kind: type[Forwards], how: Pass, model: HeadModel, adapter: Adapter, batch: Batch) -> float:
    """Gradients of one step; its seconds."""
    counts = model.counts(batch.labels)
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    sums = torch.zeros(len(counts))
    for found in kind(model, adapter, None, "fp32").of(batch, counts):
        how.add(found.objective, found.auxiliary, found.present, found.again)
        sums += found.sums
    how.finish(sums / counts.clamp(min=1))
    return time.process_time() - start


def apart(model: HeadModel, adapter: Adapter, batch: Batch) -> Apart:
    names, shared = [task.name for task in model.tasks], list(adapter.shared_parameters())
    others = (set(adapter.parameters()) | set(model.heads.parameters())) - set(shared)
    counts = model.counts(batch.labels)
    return Apart(Combination(COMBINERS["nash_mtl"](), names, 0), 0, counts, shared, list(others), CPU)


def gradients(how: Apart) -> Tensor:
    return torch.cat([stack.flatten(1).double() for stack in how.stacks], 1)  # (K, weights)


def difference(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


def row(method: str, num_tasks: int, size: int, rounds: int) -> list[str]:
    model, adapter = ready(method, num_tasks, torch.float32)
    batch = batch_of(num_tasks, size, model.backbone.config.vocab_size)
    known = Known(1 / model.counts(batch.labels).float() / num_tasks)
    step(Whole, known, model, adapter, batch)
    seconds: list[list[float]] = []
    new, old = apart(model, adapter, batch), apart(model, adapter, batch)
    for turn in range(rounds):
        new, old = apart(model, adapter, batch), apart(model, adapter, batch)
        ways: list[tuple[type[Forwards], Pass]] = [(Whole, known), (TaskByTask, new), (Whole, old)]
        order = range(3) if turn % 2 else range(2, -1, -1)
        times = {i: step(ways[i][0], ways[i][1], model, adapter, batch) for i in order}
        seconds.append([times[i] for i in range(3)])
    exact, exact_adapter = ready(method, num_tasks, torch.float64)
    right = apart(exact, exact_adapter, batch)
    step(TaskByTask, right, exact, exact_adapter, batch)
    first, last, true = gradients(new), gradients(old), gradients(right)
    weights = sum(p.numel() for p in adapter.parameters())
    kept = sum(stack.numel() for stack in right.stacks) / weights
    ratio, before = (median(times[i] / times[0] for times in seconds) for i in (1, 2))
    return [
        method,
        str(num_tasks),
        f"{median(times[0] for times in seconds):.2f}",
        f"{ratio:.2f}",
        f"{before:.2f}",
        f"{difference(first, last):.1e}",
        f"{difference(first, true):.1e} / {difference(last, true):.1e}",
        f"{weights:,}",
        f"{kept:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tasks", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    parser.add_argument("--methods", nargs="*", default=list(METHOD), choices=list(METHOD))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    heads = ["method", "K", "summed, s", "apart", "K passes", "difference", "rounding", "weights", "kept"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method in given.methods:
        for num_tasks in given.tasks:
            print(f"| {' | '.join(row(method, num_tasks, given.batch_size, given.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
