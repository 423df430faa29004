"""MALoRA beside a mixture of as many LoRAs: weights, and the time of a training step on one layer.

    python benchmarks/malora.py --threads 1

The paper claims 30 to 48 % fewer trained weights and 1.2 times the training speed. Both methods run in turn in one
process; the median of the ratios of neighbouring steps is printed.
"""

import argparse
import time
from statistics import median, quantiles

import torch
from torch import nn

from polyrank import Adapter, Method, adapt
from polyrank.methods import MALoRA, MoLA


def ready(method: Method, width: int, out: int) -> tuple[nn.Module, Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, out))
    adapter = adapt(net, method, tasks=["a"])
    return net, adapter, torch.optim.AdamW(adapter.param_groups(1e-3))


def step(net: nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    start = time.process_time()
    loss = net(x).square().mean() + sum(adapter.losses().values(), torch.zeros(()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


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
        for one in pair:
            step(*one, x)
        ratios = []
        for i in range(given.steps):
            order = pair if i % 2 else pair[::-1]
            seconds = [step(*one, x) for one in order]
            mine, other = seconds if i % 2 else seconds[::-1]
            ratios.append(other / mine)
        low, _, high = quantiles(ratios, n=4)
        print(
            f"| {width} x {out} | {tokens} | {sizes[0]:,} | {sizes[1]:,} | {1 - sizes[0] / sizes[1]:.0%} "
            f"| {median(ratios):.2f} ({low:.2f} to {high:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
