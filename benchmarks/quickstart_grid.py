"""The quick start for several methods and seeds, as one Markdown table: docs/results/quickstart.md.

    python benchmarks/quickstart_grid.py runs/grid --methods more,ase,lora --seeds 0,1,2
    python benchmarks/quickstart_grid.py runs/grid --methods moore --set training.steps=300

A finished run in the folder is not run again, so the grid can be stopped and resumed, or shared by two processes that
name different methods. Only accuracies are read off it; times are those of a shared machine.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

from polyrank.probe import Features
from polyrank.quickstart import Choices, frozen_features, quickstart_recipe
from polyrank.recipe import run


def fill(folder: Path, methods: list[str], seeds: list[int], settings: list[str]) -> None:
    """Run what is missing; the frozen model's features are kept for all methods."""
    features: Features | None = None
    for seed in seeds:
        for method in methods:
            own = folder / method / f"seed-{seed}"
            if not (own / "results.json").exists():
                recipe = quickstart_recipe(Choices(method=method, settings=settings), seed, own)
                features = features or frozen_features(recipe)
                found = run(recipe, resume=True, features=features).results["mean"]
                print(f"{method} seed {seed}: {100 * (found['adapted'] - found['frozen']):+.1f}", flush=True)


def table(folder: Path, methods: list[str], seeds: list[int]) -> str:
    lines = [
        f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± sd |",
        f"|---|{'---|' * (len(seeds) + 1)}",
    ]
    for method in methods:
        found = [json.loads((folder / method / f"seed-{seed}" / "results.json").read_text())["mean"] for seed in seeds]
        pairs = [(100 * one["frozen"], 100 * one["adapted"]) for one in found]
        cells = [f"{frozen:.1f} → {adapted:.1f} ({adapted - frozen:+.1f})" for frozen, adapted in pairs]
        gains = [adapted - frozen for frozen, adapted in pairs]
        spread = f" ± {stdev(gains):.1f}" if len(gains) > 1 else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {mean(gains):+.1f}{spread} |")
    return "\n".join(
        [*lines, "", ", ".join(f"{name} {version(name)}" for name in ("polyrank", "torch", "transformers"))]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", default="moore,more,ase,lora")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as `polyrank quickstart --set`"
    )
    arguments = parser.parse_args()
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    fill(arguments.folder, methods, seeds, arguments.set)
    print(table(arguments.folder, methods, seeds))
