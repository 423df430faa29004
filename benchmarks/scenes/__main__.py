"""Questions about rendered table-top scenes: the methods for several modalities, each against itself without the image.

    pip install 'polyrank[hf,scenes]'
    python -m benchmarks.scenes docs/results/scenes.md

Run it from the root of the repository. The first run renders, which is kept in Polyrank's cache. The table is written
anew after each run of a method.
"""

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

import polyrank
from polyrank.assets import model_folder
from polyrank.methods import METHODS

from .alignment import Start, standardised, start
from .data import ANSWERS, Question, Scenes, by_chance, load, questions
from .model import Batch, Fusion, Heads, Projection, Reader
from .report import Run, write

COMPARED = [*(name for name in ("lora", "c_lorae", "conditional_mixlora", "smola") if name in METHODS), "mmolre"]
TASKS = list(ANSWERS)
SPLITS = (0, 2)  # seeds of the scenes; on those of seed 1 the settings were chosen
SETTINGS: dict[str, dict[str, int]] = {"smola": {"modalities": 2}}  # text and image; all else is by default


@dataclass(frozen=True)
class Split:
    """Questions about scenes, and the tokens of these."""

    features: Tensor
    """(N, K, 384)"""
    places: Tensor
    """(N, K)"""
    asked: dict[str, list[Question]]
    """by task"""

    def batch(self, asked: Sequence[Question], tokenizer: Any) -> Batch:
        texts = tokenizer([question.text for question in asked], padding=True, return_tensors="pt")
        scenes = torch.tensor([question.scene for question in asked])
        ids = torch.tensor([TASKS.index(question.task) for question in asked])
        answers = torch.tensor([question.answer for question in asked])
        image = self.features[scenes], self.places[scenes]
        return Batch(*image, texts.input_ids, texts.attention_mask, ids, answers)


def split(made: Scenes, features: Tensor, first: Start, tokens: int, seed: int) -> Split:
    places = first.keep(features, tokens)
    kept = features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))
    asked = defaultdict(list)
    for question in questions(made, seed):
        asked[question.task].append(question)
    return Split(kept, places, dict(asked))


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    train: Split
    test: Split
    start: Start
    tokenizer: Any
    given: argparse.Namespace


def bert_model(layers: int) -> BertModel:
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel.from_pretrained(model_folder("minilm"), add_pooling_layer=False, **still)
    del model.encoder.layer[layers:]
    return model.eval()


def run(bench: Bench, name: str, sees: bool, seed: int) -> Run:
    """Train one method with or without the image tokens, and score it before and after."""
    torch.manual_seed(seed)
    given, began = bench.given, time.process_time()
    bert = bert_model(given.layers)
    projection, adapter = Projection(bench.start), None
    if name == "mmolre":
        model = Fusion(bert, projection, sees)
        groups: list[dict[str, Any]] = [{"params": [*model.mmolre.parameters()], "lr": given.lr}]
    else:
        adapter = polyrank.adapt(bert, METHODS[name](**SETTINGS.get(name, {})), tasks=TASKS)
        model = Reader(bert, projection, sees)
        groups = list(adapter.param_groups(given.lr))
    weights = sum(p.numel() for group in groups for p in group["params"])
    heads = Heads(bert.config.hidden_size)
    fit(bench, model, heads, seed)
    before = score(bench, model, heads)
    # they start fitted: steps as large as the method's would undo that before it has learnt anything
    groups += [{"params": [*one.parameters()], "lr": given.lr / 5} for one in (heads, projection)]
    train(bench, model, heads, adapter, groups, seed)
    return Run(name, sees, seed, weights, before, score(bench, model, heads), time.process_time() - began)


@torch.no_grad()
def fit(bench: Bench, model: nn.Module, heads: Heads, seed: int) -> None:
    rng, vectors, batches = random.Random(seed), [], []
    sample = [one for asked in bench.train.asked.values() for one in rng.sample(asked, min(400, len(asked)))]
    for at in range(0, len(sample), 64):
        batches.append(bench.train.batch(sample[at : at + 64], bench.tokenizer))
        vectors.append(model(batches[-1]))
    with torch.enable_grad():
        ids, answers = (torch.cat(one) for one in zip(*[(b.task_ids, b.answers) for b in batches], strict=True))
        heads.fit(torch.cat(vectors), ids, answers)


def train(
    bench: Bench,
    model: nn.Module,
    heads: Heads,
    adapter: polyrank.Adapter | None,
    groups: list[dict[str, Any]],
    seed: int,
) -> None:
    """AdamW, a tenth of the steps to warm up, then linearly to 0; as many questions of each task in every step."""
    rng, steps = random.Random(seed), bench.given.steps
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / (0.9 * steps))
    )
    model.train()
    for _ in range(steps):
        asked = [rng.choice(bench.train.asked[task]) for task in TASKS for _ in range(bench.given.batch // len(TASKS))]
        batch = bench.train.batch(asked, bench.tokenizer)
        loss = F.cross_entropy(heads(model(batch), batch.task_ids), batch.answers)
        if adapter is not None:
            loss = loss + sum(adapter.losses().values(), torch.zeros(()))
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def score(bench: Bench, model: nn.Module, heads: Heads) -> dict[str, float]:
    """Accuracy in % on the test questions of each task."""
    scores = {}
    for task, asked in bench.test.asked.items():
        right = []
        for at in range(0, len(asked), 64):
            batch = bench.test.batch(asked[at : at + 64], bench.tokenizer)
            right += (heads(model(batch), batch.task_ids).argmax(-1) == batch.answers).tolist()
        scores[task] = 100 * mean(right)
    return {task: scores[task] for task in TASKS}


def majority(asked: Sequence[Question]) -> float:
    """Accuracy in % of always giving the most common answer."""
    return 100 * Counter(question.answer for question in asked).most_common(1)[0][1] / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the Markdown table to write")
    parser.add_argument("--methods", nargs="*", default=COMPARED, choices=COMPARED)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--scenes", type=int, nargs=2, default=[800, 200], metavar=("TRAIN", "TEST"))
    parser.add_argument("--image-tokens", type=int, default=16, help="of 64, those that look most like objects")
    parser.add_argument("--layers", type=int, default=2, help="of MiniLM's 6, from below")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = [load(count, seed) for seed, count in zip(SPLITS, given.scenes, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    features = [standardised(one.features, made[0].features) for one in made]
    first = start(made[0], features[0], bert_model(given.layers), tokenizer)
    learnt, shown = (
        split(one, x, first, given.image_tokens, seed) for seed, (one, x) in enumerate(zip(made, features, strict=True))
    )
    bench = Bench(learnt, shown, first, tokenizer, given)
    sizes = {task: (len(learnt.asked[task]), len(shown.asked[task])) for task in TASKS}
    common = {task: majority(shown.asked[task]) for task in TASKS}
    chance = {task: by_chance(made[1], shown.asked[task]) for task in TASKS if task != "count"}
    runs: list[Run] = []
    for seed in given.seeds:
        for name in given.methods:
            for sees in (True, False):
                runs.append(run(bench, name, sees, seed))
                print(runs[-1], flush=True)
                write(given.out, runs, common, chance, sizes, given)


if __name__ == "__main__":
    main()
