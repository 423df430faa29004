"""What dropout and activation checkpointing cost: the time of a training step on one layer, 768 x 768, 1024 tokens.

    python benchmarks/extras.py --threads 1

Dropout as the ratio to the same method without it. Checkpointing as the ratio to the same method without it, of
mixtures beside a LoRA of as many ranks: a router should not make the recomputation dearer. All candidates of a table
run in turn in one process, each round in another order; medians (quartiles) of the ratios within a round are printed.
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from polyrank import LoRA, Method, adapt
from polyrank.methods import METHODS, Dropout, LoRAMoE, MoLA

WIDTH, TOKENS, P = 768, 1024, 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.checkpointed, self.context_fn = nn.Linear(WIDTH, WIDTH), checkpointed, noop_context_fn

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=False, context_fn=self.context_fn)


def step_of(method: Method, dtype: torch.dtype, checkpointed: bool = False) -> Step:
    """A training step on a frozen layer of ``dtype``, whose input needs a gradient as it does inside a model."""
    torch.manual_seed(0)
    net = Block(checkpointed).to(dtype)
    adapter = adapt(net, method, tasks=["a"], targets=["layer"])
    net.context_fn = adapter.context.replay
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-3))
    x = torch.randn(8, TOKENS // 8, WIDTH, dtype=dtype).requires_grad_()

    def step() -> None:
        loss = net(x).square().mean() + sum(adapter.losses().values(), torch.zeros(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def seconds(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Processor time of each step in each round."""
    order, found = [*steps], {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            found[name].append(time.process_time() - start)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"


def dropout(rounds: int) -> None:
    print(f"| method | dtype | ms without | p={P} at ranks | p={P} at input |\n|---|---|---|---|---|")
    for of in ({"name": "lora", "rank": 8}, {"name": "mola", "num_experts": (8,), "rank": 8}):
        for name, dtype in DTYPES.items():
            plain = METHODS[of["name"]](**{key: value for key, value in of.items() if key != "name"})
            steps = {
                "without": step_of(plain, dtype),
                "ranks": step_of(Dropout(of=of, p=P), dtype),
                "input": step_of(Dropout(of=of, p=P, at="input"), dtype),
            }
            found = seconds(steps, rounds)
            ratios = [ratio(found[at], found["without"]) for at in ("ranks", "input")]
            ms = 1000 * median(found["without"])
            print(f"| `{of['name']}` | {name} | {ms:.1f} | {ratios[0]} | {ratios[1]} |", flush=True)


def checkpointing(rounds: int) -> None:
    methods = {
        "`lora` r64": LoRA(rank=64),
        "`loramoe` E8 r8": LoRAMoE(num_experts=8, rank=8),
        "`mola` E8 r8 k2": MoLA(num_experts=(8,), rank=8),
    }
    print("\n| method | dtype | ms plain | checkpointed / plain | beside `lora`'s |\n|---|---|---|---|---|")
    for kind, dtype in DTYPES.items():
        steps = {f"{name}{on}": step_of(method, dtype, on) for name, method in methods.items() for on in (False, True)}
        found = seconds(steps, rounds)
        own = {
            name: [on / off for on, off in zip(found[f"{name}True"], found[f"{name}False"], strict=True)]
            for name in methods
        }
        for name in methods:
            ms = 1000 * median(found[f"{name}False"])
            itself = ratio(found[f"{name}True"], found[f"{name}False"])
            print(f"| {name} | {kind} | {ms:.1f} | {itself} | {ratio(own[name], own['`lora` r64'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dropout(given.rounds)
    checkpointing(given.rounds)


if __name__ == "__main__":
    main()
