"""What training reads: frozen patch features of rendered scenes, what is true of them, and questions with answers.

Rendering and the vision model run once; their results lie in the cache folder of Polyrank.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from polyrank.assets import cache_folder, model_folder

from .render import COLOURS, OBJECTS, SIZE, Scene, Thing, scenes

FORMAT = 1
"""raise it when other scenes or features come out: it is in the name of the cached file"""
TOKENS = 8
"""image tokens of a side: 16 patches, averaged 2 x 2"""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that DINOv2 was trained with
APART, NEARER = 0.06, 0.08  # share of the width, metres: what is closer than that to a tie is not asked

ANSWERS: dict[str, tuple[str, ...]] = {
    "count": ("1", "2", "3", "4", "5"),
    "colour": tuple(COLOURS),
    "leftmost": tuple(OBJECTS),
    "nearest": tuple(OBJECTS),
}
PHRASES = {
    "count": (
        "how many objects stand on the table?",
        "what is the number of objects on the table?",
        "count the objects on the table",
    ),
    "colour": ("what colour is the {}?", "which colour does the {} have?", "name the colour of the {}"),
    "leftmost": (
        "which object is leftmost in the picture?",
        "which object stands furthest to the left?",
        "what is on the far left of the picture?",
    ),
    "nearest": (
        "which object is nearest to the camera?",
        "which object stands closest to us?",
        "what is nearest to the viewer?",
    ),
}


@dataclass(frozen=True)
class Scenes:
    """Of each scene: its features, what it holds, and where."""

    features: Tensor
    """(N, 64, 384), rows of the picture one after another"""
    things: tuple[tuple[Thing, ...], ...]
    owner: Tensor
    """(N, 64) which of `things` fills most of a token's square, or -1"""


@dataclass(frozen=True)
class Question:
    scene: int
    task: str
    text: str
    answer: int
    """index into `ANSWERS[task]`"""


def load(count: int, seed: int) -> Scenes:
    """Rendered and read by the vision model on the first call, which takes about 0.4 s a scene on one core."""
    path = cache_folder() / "scenes" / f"scenes-{seed}-{count}-{FORMAT}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".part")
        staging.write_bytes(_made(count, seed))
        staging.replace(path)
    with safe_open(path, "pt") as file:
        things = json.loads(file.metadata()["things"])
        known = tuple(tuple(Thing(**thing) for thing in scene) for scene in things)
        return Scenes(file.get_tensor("features").float(), known, file.get_tensor("owner").long())


def _made(count: int, seed: int) -> bytes:
    model = Dinov2Model.from_pretrained(model_folder("dinov2")).eval()
    features, owners, things = [], [], []
    for done, batch in _batches(scenes(count, seed), 8):
        features.append(_read(model, batch))
        owners += [_owner(scene) for scene in batch]
        things += [[asdict(thing) for thing in scene.things] for scene in batch]
        if done % 80 == 0 or done == count:
            print(f"rendered and read {done} of {count} scenes (seed {seed})", flush=True)
    tensors = {"features": torch.cat(features).half(), "owner": torch.stack(owners)}
    return save(tensors, {"things": json.dumps(things)})


def _batches(made: Iterator[Scene], size: int) -> Iterator[tuple[int, list[Scene]]]:
    batch: list[Scene] = []
    done = 0
    for done, scene in enumerate(made, start=1):
        batch.append(scene)
        if len(batch) == size:
            yield done, batch
            batch = []
    if batch:
        yield done, batch


@torch.no_grad()
def _read(model: Dinov2Model, batch: Sequence[Scene]) -> Tensor:
    pixels = torch.from_numpy(np.stack([scene.image for scene in batch])).permute(0, 3, 1, 2) / 255  # (B, 3, H, W)
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    patches = model(pixels).last_hidden_state[:, 1:]  # (B, 256, 384), without the class token
    grid = patches.transpose(1, 2).unflatten(2, (16, 16))
    return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)  # (B, 64, 384)


def _owner(scene: Scene) -> Tensor:
    side = SIZE // TOKENS
    squares = torch.from_numpy(scene.where).unfold(0, side, side).unfold(1, side, side).flatten(2)  # (8, 8, side^2)
    shares = torch.stack([(squares == index).float().mean(-1) for index in range(len(scene.things))], -1)
    best, index = shares.flatten(0, 1).max(-1)
    return torch.where(best > 0.15, index, -1).to(torch.int8)


def questions(made: Scenes, seed: int) -> list[Question]:
    """All that can be asked without a near tie, with answers of each task about equally common."""
    rng = random.Random(f"questions {seed}")
    asked: list[Question] = []
    for scene, things in enumerate(made.things):
        asked.append(_ask(rng, scene, "count", str(len(things))))
        for thing in rng.sample(things, min(2, len(things))):
            asked.append(_ask(rng, scene, "colour", thing.colour, thing.name))  # noqa: PERF401
        for task, key, margin in (("leftmost", "column", APART), ("nearest", "distance", NEARER)):
            first, *rest = sorted(things, key=lambda thing: asdict(thing)[key])
            if rest and asdict(rest[0])[key] - asdict(first)[key] > margin:
                asked.append(_ask(rng, scene, task, first.name))
    rng.shuffle(asked)
    return _balanced(asked)


def _ask(rng: random.Random, scene: int, task: str, answer: str, about: str = "") -> Question:
    return Question(scene, task, rng.choice(PHRASES[task]).format(about), ANSWERS[task].index(answer))


def _balanced(asked: Sequence[Question]) -> list[Question]:
    """No answer is more than 1.2 times as common as the rarest of its task."""
    counts = {(task, i): 0 for task, answers in ANSWERS.items() for i in range(len(answers))}
    for question in asked:
        counts[question.task, question.answer] += 1
    most = {task: int(1.2 * min(n for (of, _), n in counts.items() if of == task)) for task in ANSWERS}
    kept, taken = [], dict.fromkeys(counts, 0)
    for question in asked:
        key = question.task, question.answer
        if taken[key] < most[question.task]:
            taken[key] += 1
            kept.append(question)
    return kept


def by_chance(made: Scenes, asked: Sequence[Question]) -> float:
    """Accuracy in % of answering about an object of the scene drawn at random, whichever is asked about."""
    right = []
    for question in asked:
        things = made.things[question.scene]
        names = [thing.colour if question.task == "colour" else thing.name for thing in things]
        right.append(names.count(ANSWERS[question.task][question.answer]) / len(things))
    return 100 * sum(right) / len(right)
