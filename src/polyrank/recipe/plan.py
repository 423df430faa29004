"""What a run would do: its data, its adapter, and a few real steps on the clock. Nothing is written."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from polyrank.corpus import Corpus
from polyrank.recipe.loading import build_model, load_backbone, load_tasks, speaks_language
from polyrank.recipe.reading import RecipeError
from polyrank.recipe.rehearsal import rehearsal
from polyrank.recipe.runs import attach, peak_bytes
from polyrank.recipe.schema import Recipe
from polyrank.summary import Summary
from polyrank.tasks import HeadTask, Regression, Task
from polyrank.train import split, train

STEPS = 4  # the first warms up and is not counted


@dataclass(frozen=True)
class TaskPlan:
    """Examples by part, and how often each label stands in the training data.

    full: rows that fill max_length, most of which were cut.
    """

    name: str
    kind: str
    train: int
    held_out: int
    test: int
    labels: dict[str, int]
    missing: int
    full: int
    tokens: float


@dataclass(frozen=True)
class Plan:
    tasks: list[TaskPlan]
    notices: list[str]
    summary: Summary
    steps: int
    epochs: float
    weights_bytes: int  # base, adapter and heads, with gradients and AdamW's two moments where they are trained
    peak_bytes: int  # measured: of the accelerator, or of this process
    step_seconds: float
    bank: int  # tasks that are trained alone first, for as many steps each

    @property
    def training_seconds(self) -> float:
        return self.step_seconds * self.steps


def plan(recipe: Recipe) -> Plan:
    """Load everything that the run would load and take a few of its steps, on a model that is thrown away.

    Raises:
        RecipeError: as the run itself would.
    """
    loaded = load_tasks(recipe)
    tasks = loaded.tasks
    kept, held = split(tasks, recipe.training)
    model = build_model(recipe, tasks, *load_backbone(recipe, speaks_language(tasks)))
    try:
        batch = rehearsal(model)
    except ValueError as error:
        raise RecipeError(f"model {recipe.model!r}: {error}") from error
    adapter = attach(recipe, model, batch)
    lengths = Corpus.of(tasks, kept, model.reader).lengths
    summary = adapter.summary()
    trained = [*adapter.parameters(), *model.heads.parameters()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in frozen) + 4 * sum(p.numel() * p.element_size() for p in trained)
    steps = STEPS if recipe.training.mixing.order == "together" else max(STEPS, len(tasks))
    few = {"steps": steps, "max_holdout": 0, "eval_every": steps + 1, "trackers": []}
    shortened = recipe.training.model_copy(update=few)
    clock = [entry["seconds"] for entry in train(model, adapter, tasks, shortened, progress=False).steps]
    size = sum(len(examples) for examples in kept.values())
    return Plan(
        [
            _task_plan(task, len(kept[task.name]), len(held[task.name]), of_task, recipe.max_length)
            for task, of_task in zip(tasks, lengths, strict=True)
        ],
        loaded.notices,
        summary,
        recipe.training.steps,
        recipe.training.steps / max(1, math.ceil(size / recipe.training.batch_size)),
        weights,
        peak_bytes(),
        median(after - before for before, after in itertools.pairwise(clock)),
        0 if adapter.method.bank() is None or recipe.bank else len(tasks),
    )


def _task_plan(task: Task, kept: int, held: int, lengths: Sequence[int], most: int) -> TaskPlan:
    counts: Counter[str] = Counter()
    if isinstance(task, HeadTask) and not isinstance(task, Regression):
        for label in task.train.labels:
            counts.update([label] if isinstance(label, str) else label if isinstance(label, tuple) else [])
    missing = sum(label is None for label in task.train.labels)
    full = sum(length >= most for length in lengths)
    tokens = sum(lengths) / max(1, len(lengths))
    return TaskPlan(task.name, task.kind, kept, held, len(task.test), dict(counts.most_common()), missing, full, tokens)


def lines(found: Plan, shown: int = 4) -> Sequence[str]:
    """The plan in words."""
    out = []
    for task in found.tasks:
        names = [f"{label} {count}" for label, count in list(task.labels.items())[:shown]]
        more = f", {len(task.labels) - shown} more" if len(task.labels) > shown else ""
        labels = f"; {len(task.labels)} labels ({', '.join(names)}{more})" if task.labels else ""
        gap = f"; {task.missing} without a label" if task.missing else ""
        cut = f"; {task.full} reach max_length and may be cut" if task.full else ""
        out.append(
            f"task {task.name}: {task.kind}; {task.train} train + {task.held_out} held out + {task.test} test, "
            f"{task.tokens:.0f} tokens on average{labels}{gap}{cut}"
        )
    minutes = found.training_seconds / 60
    bank = f"{found.bank} runs of as many steps, one for each task alone, about {found.bank * minutes:.1f} min"
    return [
        *out,
        *(f"note: {notice}" for notice in found.notices),
        *str(found.summary).splitlines(),
        f"steps                 {found.steps}, about {found.epochs:.1f} times through the training data",
        f"memory                weights and optimiser {_size(found.weights_bytes)}; peak after {STEPS} steps "
        f"{_size(found.peak_bytes)}",
        f"training              {found.step_seconds:.2f} s a step here, about {minutes:.1f} min; the frozen "
        "model's pass and the scoring come on top",
        *([f"before that           {bank}"] if found.bank else []),
        "nothing was written",
    ]


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
