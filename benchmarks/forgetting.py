"""Five text tasks in sequence on MiniLM: what is left of each at the end, with SAME, its parts, and without them.

    python benchmarks/forgetting.py docs/results/forgetting.md

Each task has its share of the steps, then its examples are gone. Every setting of a seed has the same texts, steps and
heads at the start. The scores are those of held-out training texts, of which nothing is chosen in sequence. The page is
written anew after each run.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from polyrank import Adapter, LoRA, Method, adapt
from polyrank.methods import SAME
from polyrank.methods.same import RememberingRouter
from polyrank.mixture import MixtureLinear, Pairs
from polyrank.models import HeadModel
from polyrank.probe import Features, Probe, start_heads
from polyrank.recipe import Recipe, check_recipe, load_tasks
from polyrank.recipe.loading import build_model, load_backbone
from polyrank.recipe.runs import probe_all
from polyrank.sequence import Forgetting
from polyrank.tasks import HeadTask
from polyrank.train import train

TASKS = ["newsgroups", "r8", "tweets", "sarcasm", "movies"]
WHOLE = SAME(num_experts=5, rank=4, alpha=40)
PLAIN = replace(WHOLE, routing="plain", scaling="plain", activation="all")
SETTINGS: dict[str, Method] = {
    "LoRA": LoRA(rank=20, alpha=40),  # the scale of the experts under an even gate
    "MoE-LoRA": PLAIN,
    "SAME": WHOLE,
    "routing alone": replace(PLAIN, routing="spectral"),
    "scaling alone": replace(PLAIN, scaling="curvature"),
    "activation alone": replace(PLAIN, activation="adaptive"),
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # of Student's t, by the number of seeds


@dataclass
class Checks:
    """Frozen experts, step after step: how many, and how many of their numbers differ from those at their freezing."""

    steps: int = 0
    experts: int = 0
    numbers: int = 0
    different: int = 0
    shares: list[float] = field(default_factory=list)  # of frozen experts as each task but the first was over


def recipe(seed: int, given: argparse.Namespace) -> Recipe:
    content = {
        "model": "minilm",
        "method": {"name": "same"},
        "tasks": TASKS,
        "max_train": given.held + given.texts,
        "max_test": 1,
        "max_length": given.length,
        "training": {
            "steps": given.steps * len(TASKS),
            "batch_size": 16,
            "lr": given.lr,
            "head_lr": 1e-3,
            "eval_every": 10**6,
            "holdout": given.held / (given.held + given.texts),
            "max_holdout": given.held,
            "mixing": {"order": "sequence"},
            "seed": seed,
        },
    }
    return check_recipe(content, "benchmark", Path.cwd())


def watched(adapter: Adapter, checks: Checks) -> Callable[[], None]:
    """An ``after_step`` that also compares the frozen experts with what they were when they were frozen."""
    known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    honest = adapter.after_step

    def after_step() -> None:
        honest()
        checks.steps += 1
        for name, layer in adapter.layers.items():
            assert isinstance(layer, MixtureLinear) and isinstance(layer.router, RememberingRouter)
            assert isinstance(layer.experts, Pairs)
            for i, frozen in enumerate(layer.router.frozen.tolist()):
                rows = slice(i * layer.experts.rank, (i + 1) * layer.experts.rank)
                now = layer.experts.lora_A[rows].detach().clone(), layer.experts.lora_B[rows].detach().clone()
                if not frozen:
                    known.pop((name, i), None)
                elif (name, i) not in known:
                    known[name, i] = now
                else:
                    checks.experts += 1
                    checks.numbers += sum(one.numel() for one in now)
                    before = known[name, i]
                    checks.different += sum(int((a != b).sum()) for a, b in zip(now, before, strict=True))

    return after_step


def one(
    recipe: Recipe, method: Method, tasks: Sequence[HeadTask], probes: Mapping[str, Probe], checks: Checks
) -> tuple[float, Forgetting]:
    """Train one setting: the average before the first step, and the matrix."""
    model = build_model(recipe, tasks, *load_backbone(recipe, False))
    start_heads(model.heads, probes)
    torch.manual_seed(recipe.training.seed)
    # the feed-forward layers of the upper half
    adapter = adapt(model.backbone, method, tasks=TASKS, targets=r"encoder\.layer\.[3-5]\.(intermediate|output)\.dense")
    if isinstance(method, SAME) and method.activation == "adaptive":
        adapter.after_step, honest = watched(adapter, checks), adapter.after_task

        def after_task() -> None:
            routers = [layer.router for layer in adapter.layers.values() if isinstance(layer, MixtureLinear)]
            masks: list[Tensor] = [router.frozen for router in routers if isinstance(router, RememberingRouter)]
            checks.shares.append(float(torch.stack(masks).mean()))
            honest()

        adapter.after_task = after_task
    history = train(model, adapter, tasks, recipe.training, progress=False)
    seen = {entry["step"]: entry["held_out"] for entry in history.evaluations}
    stages = recipe.training.mixing.stages(recipe.training.steps, len(TASKS))
    rows = [seen[stage.stop] for stage in stages]
    matrix = Forgetting(tuple(TASKS), tuple(tuple(row[name] for name in TASKS) for row in rows))
    return fmean(seen[0][name] for name in TASKS), matrix


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95 % t-interval over the seeds, in points."""
    points = [100 * value for value in values]
    if len(points) < 2:
        return f"{points[0]:.1f}"
    return f"{fmean(points):.1f} ± {T95[len(points)] * stdev(points) / len(points) ** 0.5:.1f}"


def page(
    found: Mapping[str, Mapping[int, Forgetting]],
    frozen: Mapping[int, float],
    seconds: Mapping[str, float],
    checks: Checks,
    given: argparse.Namespace,
) -> str:
    plain = found.get("MoE-LoRA", {})
    lines = [
        "# Tasks in sequence: what is forgotten",
        "",
        f"{len(TASKS)} text tasks on MiniLM, one after the other ({', '.join(TASKS)}): {given.steps} steps of 16",
        f"texts each, of {given.texts} training texts a task, at most {given.length} tokens, learning rate "
        f"{given.lr:g}, the feed-forward",
        "layers of the upper three blocks. Each task has a head of its own, which starts from the frozen model's "
        "probe.",
        f"Accuracy on {given.held} held-out texts a task, of which nothing is chosen. MoE-LoRA is SAME with all three",
        "mechanisms off; LoRA has as many ranks, and the scale that they have under an even gate. Mean over seeds with",
        "its 95 % t-interval; differences are paired by seed. Of SAME, components, delta, mu and tau are its defaults.",
        "",
        "Scale and learning rate are rough, and were taken because a plain LoRA forgets with them (on another seed):",
        "unprotected weights end below the frozen model. At a fifth of the scale a plain LoRA hardly forgets",
        "([log](../log.md)). So this tells how much of a hard run a mechanism survives, not how tasks are best "
        "trained.",
        "",
        f"`{command(given)}`",
        "",
        "| | average accuracy | forgetting | backward transfer | accuracy minus MoE-LoRA | forgetting minus MoE-LoRA "
        "| seconds a run |",
        "|---|---|---|---|---|---|---|",
        f"| frozen model, the heads at the start | {interval(list(frozen.values()))} | | | | | |",
    ]
    for name, runs in found.items():
        matrices = list(runs.values())
        cells = [
            interval([m.average for m in matrices]),
            interval([m.mean_forgetting for m in matrices]),
            interval([m.backward_transfer for m in matrices]),
        ]
        both = [seed for seed in runs if seed in plain]
        if name == "MoE-LoRA" or not both:
            cells += ["", ""]
        else:
            cells.append(interval([runs[s].average - plain[s].average for s in both]))
            cells.append(interval([runs[s].mean_forgetting - plain[s].mean_forgetting for s in both]))
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds[name] / len(runs):.0f} |")
    minutes = f"{sum(seconds.values()) / 60:.0f} minutes of one core in all, the probes beside it"
    lines += ["", f"Seeds: {', '.join(str(seed) for seed in next(iter(found.values())))}. {minutes}."]
    for name in ("LoRA", "SAME"):
        if name in found:
            seed, matrix = next(iter(found[name].items()))
            lines += ["", f"## {name}, seed {seed}: accuracy in % after each task", "", *str(matrix).splitlines()]
    if checks.numbers:
        shares = f"{100 * fmean([share for i, share in enumerate(checks.shares) if i % len(TASKS)]):.0f} %"
        lines += [
            "",
            "## Frozen experts",
            "",
            f"After each of {checks.steps:,} steps of AdamW with weight decay, every frozen expert was compared with",
            f"what it was when it was frozen: {checks.experts:,} comparisons of {checks.numbers:,} numbers, "
            f"{checks.different:,} of",
            f"them different in a bit. Of all experts, {shares} were frozen as a task (but the first) was over.",
        ]
    return "\n".join(lines) + "\n"


def command(given: argparse.Namespace) -> str:
    seeds = " ".join(str(seed) for seed in given.seeds)
    return (
        f"python benchmarks/forgetting.py docs/results/forgetting.md --steps {given.steps} --texts {given.texts} "
        f"--held {given.held} --length {given.length} --lr {given.lr:g} --seeds {seeds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the Markdown page to write")
    parser.add_argument("--steps", type=int, default=20, help="of each task")
    parser.add_argument("--texts", type=int, default=160, help="training texts of each task")
    parser.add_argument("--held", type=int, default=100, help="held-out texts of each task")
    parser.add_argument("--length", type=int, default=16, help="tokens of a text, at most")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, dict[int, Forgetting]] = {}
    seconds: dict[str, float] = {}
    frozen: dict[int, float] = {}
    checks = Checks()
    for seed in given.seeds:
        described = recipe(seed, given)
        tasks = [task for task in load_tasks(described).tasks if isinstance(task, HeadTask)]
        model = build_model(described, tasks, *load_backbone(described, False))
        assert isinstance(model, HeadModel)
        probes = probe_all(tasks, described, Features(model), False)
        for name in given.settings:
            start = time.process_time()
            frozen[seed], matrix = one(described, SETTINGS[name], tasks, probes, checks)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
            found.setdefault(name, {})[seed] = matrix
            print(seed, name, f"{100 * matrix.average:.1f}", f"{100 * matrix.mean_forgetting:.1f}", flush=True)
            given.out.write_text(page(found, frozen, seconds, checks, given), encoding="utf-8")


if __name__ == "__main__":
    main()
