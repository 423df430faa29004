"""The quick start's recipe with every method's name in it, and nothing else changed: does it run, and what comes out?

    python benchmarks/quickstart_methods.py docs/results/methods.md --steps 24 --threads 1

With --methods, the rows of the others stay as they are in the file.

One seed and few steps at one learning rate: this shows that every method trains from the same recipe. It ranks none.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from polyrank.methods import METHODS
from polyrank.quickstart import Choices, frozen_features, quickstart_recipe
from polyrank.recipe import run

FEWER = ("max_train=200", "max_test=100", "training.max_holdout=20")  # the same for all: it has to end on one core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the Markdown table to write")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, frozen = [], None
    for name in given.methods:
        with tempfile.TemporaryDirectory() as folder:
            choices = Choices(method=name, steps=given.steps, settings=FEWER)
            recipe = quickstart_recipe(choices, 0, Path(folder) / name)
            frozen = frozen or frozen_features(recipe)
            start = time.perf_counter()
            results = run(recipe, progress=False, features=frozen).results
            seconds = time.perf_counter() - start
        tasks = [100 * row["adapted"] for row in results["tasks"].values()]
        before, after = (100 * results["mean"][key] for key in ("frozen", "adapted"))
        rows.append([name, results["adapter_parameters"], *tasks, after, after - before, seconds])
        print(name, f"{before:.1f} -> {after:.1f}", f"{seconds:.0f} s", flush=True)
        write(given.out, list(results["tasks"]), rows, before, given.steps)


def write(out: Path, tasks: list[str], rows: list[list], frozen: float, steps: int) -> None:
    head = ["method", "weights", *tasks, "mean", "frozen model + ", "seconds"]
    lines = [
        "# Every method from one recipe",
        "",
        "The quick start's recipe with only the method's name changed, seed 0, accuracy on test in %. For all of them,",
        f"{steps} steps, 200 training and 100 test texts a task, so that it ends on one busy core in an hour.",
        f"The frozen model's own heads have {frozen:.1f}. One seed, few steps and one learning rate show that every",
        "method trains from the same recipe; they rank none. `moa` and `xlora` train a LoRA of each task first. MoORE",
        "has the quick start's own targets and learning rate. The seconds were taken while other work ran.",
        "",
        "`python benchmarks/quickstart_methods.py docs/results/methods.md`, one thread",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    before = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    found = {line.split("`")[1]: line for line in before if line.startswith("| `")}
    for name, weights, *scores, seconds in rows:
        *accuracies, gain = scores
        numbers = " | ".join(f"{one:.1f}" for one in accuracies)
        found[name] = f"| `{name}` | {weights:,} | {numbers} | {gain:+.1f} | {seconds:.0f} |"
    lines += [found[name] for name in METHODS if name in found]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
