"""MALoRA beside a mixture of as many LoRAs: weights, and the time of a training step on one layer.

    python benchmarks/malora.py --threads 1

The paper claims 30 to 48 % fewer trained weights and 1.2 times the training speed. Both methods run in turn in one
process; the median of the ratios of neighbouring steps is printed.
"""

import argparse
from functools import partial

import torch
from torch import nn

from polyrank import Adapter, Method, adapt
from polyrank.measure import compare
from polyrank.methods import MALoRA, MoLA


def ready(method: Method, width: int, out: int) -> tuple[nn.Module, Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, out))
    adapter = adapt(net, method, tasks=["a"])
    return net, adapter, torch.optim.AdamW(adapter.param_groups(1e-3))


def step(net: nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    loss = net(x).square().mean() + sum(adapter.losses().values(), torch.zeros(()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("| inputs x outputs | tokens | MALoRA's weights | mixture of LoRAs | fewer | speed: median (quartiles) |")
    print("|---|---|---|---|---|---|")
    for width, out, tokens in ((768, 768, 1024), (2048, 2048, 1024), (4096, 4096, 512), (768, 3072, 1024)):
        x = torch.randn(8, tokens // 8, width)
        pair = [ready(MALoRA(), width, out), ready(MoLA(num_experts=(8,)), width, out)]
        sizes = [sum(p.numel() for p in adapter.parameters()) for _, adapter, _ in pair]
        runs = {name: partial(step, *one, x) for name, one in zip(("malora", "loras"), pair, strict=True)}
        found = compare(runs, rounds=given.steps)
        print(
            f"| {width} x {out} | {tokens} | {sizes[0]:,} | {sizes[1]:,} | {1 - sizes[0] / sizes[1]:.0%} "
            f"| {found['loras'].over(found['malora'])} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
