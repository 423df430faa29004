"""The page of results: every method beside itself without the image, and what neither training nor the image gives."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from textwrap import fill

TEXT = (
    """Accuracy in % on test, {seeds}. PyBullet rendered {train} scenes for training and {test} for test, from
    other seeds (rendered, not photographed). They are asked about in words: how many objects stand on the
    table, what colour one of them has, which one is leftmost, which one is nearest. The answers come from
    the renderer's own segmentation and depth; near ties are not asked. Questions for training and for test:
    {asked}. With so few, a standard error is 2 to 5 points: compare a method with its own text alone, not
    methods with each other. The layers and the learning rate were chosen for `lora` on test scenes of
    another seed, and nobody looked at these before. Beyond "a random object of the scene", which knows what
    stands there but not which object is meant, a method has found the object.""",
    """A frozen DINOv2-small that was fine-tuned for saliency (not the original checkpoint) makes 64 tokens of a
    picture. The {tokens} that look most like objects go through a trained projection and stand before the
    question in the lower {layers} of MiniLM's 6 layers. The projection starts from two ridge regressions on
    the training scenes: a patch reads like the words of its object, its colour and its place. The heads
    start as logistic regressions on the model before training: "before". "Text alone" is the same method,
    trained the same way, without the image tokens. `mmolre` adapts no layer: it fuses the states of the
    frozen MiniLM with the projected image tokens.""",
    """The seconds are CPU time of one thread on a machine that did other work. Rendering and reading the scenes
    took another 0.43 s each, once; they stay in the cache.""",
)


@dataclass(frozen=True)
class Run:
    method: str
    sees: bool
    seed: int
    weights: int
    """trained ones of the method, without projection and heads"""
    before: Mapping[str, float]
    """accuracy in % of the frozen model by task, with heads fitted to it"""
    after: Mapping[str, float]
    seconds: float
    """of CPU time"""


def write(
    out: Path,
    runs: Sequence[Run],
    majority: Mapping[str, float],
    chance: Mapping[str, float],
    sizes: Mapping[str, tuple[int, int]],
    given: argparse.Namespace,
) -> None:
    tasks = list(majority)
    asked = ", ".join(f"{task} {train} and {test}" for task, (train, test) in sizes.items())
    command = f"python -m benchmarks.scenes {out}"
    for option in ("methods", "seeds", "scenes", "image_tokens", "layers", "steps", "batch", "lr"):
        value = vars(given)[option]
        command += f" --{option.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    facts = dict(
        seeds="one seed" if len(given.seeds) == 1 else f"mean of {len(given.seeds)} seeds",
        train=given.scenes[0],
        test=given.scenes[1],
        asked=asked,
        tokens=given.image_tokens,
        layers=given.layers,
    )
    lines = [
        "# Questions about table-top scenes",
        "",
        "\n\n".join(fill(" ".join(part.format(**facts).split()), 116) for part in TEXT),
        "",
        f"    {command}",
        "",
        f"| method | input | weights | {' | '.join(tasks)} | mean | mean before | CPU seconds |",
        f"|{'---|' * (len(tasks) + 6)}",
        f"| most common answer | | | {_cells(majority, tasks)} | | |",
        f"| a random object of the scene | | | {' | '.join(_or_nothing(chance, task) for task in tasks)} | | | |",
    ]
    for method in dict.fromkeys(run.method for run in runs):
        for sees in (True, False):
            mine = [run for run in runs if (run.method, run.sees) == (method, sees)]
            if mine:
                lines.append(_row(mine, tasks))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    after = {task: mean(run.after[task] for run in runs) for task in tasks}
    before = mean(mean(run.before.values()) for run in runs)
    what = "image and text" if runs[0].sees else "text alone"
    seconds = mean(run.seconds for run in runs)
    return (
        f"| `{runs[0].method}` | {what} | {runs[0].weights:,} | {_cells(after, tasks)} | {before:.1f} | {seconds:.0f} |"
    )


def _cells(scores: Mapping[str, float], tasks: Sequence[str]) -> str:
    return " | ".join(f"{score:.1f}" for score in [*(scores[task] for task in tasks), mean(scores.values())])


def _or_nothing(scores: Mapping[str, float], task: str) -> str:
    return f"{scores[task]:.1f}" if task in scores else ""
