"""What a training run holds and sends on many GPUs, by arithmetic; nothing here was measured.

python examples/launch/plan.py                    the tables of docs/many_processes.md
python examples/launch/plan.py --bytes 2 --rank 16 --tokens 16384 --tasks 8
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward blocks. kv: the width of keys and values."""

    name: str
    layers: int
    width: int
    hidden: int
    kv: int
    vocabulary: int

    @property
    def sites(self) -> list[tuple[int, int]]:
        """(I, O) of a block's linear layers: q, k, v, o, gate, up, down."""
        d, f, kv = self.width, self.hidden, self.kv
        return [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]

    @property
    def block(self) -> int:
        return sum(i * o for i, o in self.sites) + 2 * self.width

    @property
    def ends(self) -> int:
        """What stands outside the blocks: the embedding, the last norm, the output layer."""
        return 2 * self.vocabulary * self.width + self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.ends

    def adapter(self, rank: int) -> int:
        """P_a: A and B of all experts, R rows in all, on every linear layer of the blocks."""
        return self.layers * sum(rank * (i + o) for i, o in self.sites)


MODELS = (Model("8B", 32, 4096, 14336, 1024, 128256), Model("70B", 80, 8192, 28672, 1024, 128256))
GPUS = (8, 64)


def held(model: Model, n: int, sharded: bool, rank: int, tokens: int, size: int) -> list[float]:
    """Bytes on one GPU: the base, the adapter with its optimiser, activations with checkpointing."""
    base = model.parameters * size
    if sharded:  # a part of all, the ends put together, and two blocks: one at work and the next on its way
        base = base / n + (model.ends + 2 * model.block) * size
    adapter = 20 * model.adapter(rank)  # fp32: weight, gradient, two moments, the exchange's copy
    inside = 6 * model.width + 3 * model.hidden + 2 * model.kv
    activations = tokens * (model.layers * model.width + inside) * 2  # bf16: each block's input, and one block's inside
    return [base, adapter, activations]


def sent(model: Model, n: int, sharded: bool, rank: int, tasks: int, size: int) -> list[float]:
    """Bytes that one GPU sends in a step of one micro-batch: gradients, those of a combiner, and the base's weights."""
    ring = (n - 1) / n
    gradients = 2 * ring * 4 * model.adapter(rank)
    gathered = ring * model.parameters * size
    return [gradients, (tasks + 1) * gradients, 2 * gathered * sharded, (1 + tasks) * gathered * sharded]


def table(size: int, rank: int, tokens: int, tasks: int) -> list[str]:
    head = ["model", "GPUs", "base", "base, GiB", "adapter", "activations", "in all, GiB", "gradients, GiB"]
    head += [f"of {tasks} tasks", "base's weights, GiB", f"of {tasks} tasks"]
    rows = [head, ["---"] * len(head)]
    for model in MODELS:
        for n in GPUS:
            for sharded in (False, True):
                memory = held(model, n, sharded, rank, tokens, size)
                traffic = sent(model, n, sharded, rank, tasks, size)
                figures = [f"{value / 2**30:.1f}" for value in [*memory, sum(memory), *traffic]]
                rows.append([model.name, str(n), "sharded" if sharded else "whole", *figures])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=4, help="of a weight of the base; recipes load fp32")
    parser.add_argument("--rank", type=int, default=64, help="R, of all experts of a layer together")
    parser.add_argument("--tokens", type=int, default=8192, help="of one micro-batch on one GPU")
    parser.add_argument("--tasks", type=int, default=4, help="that a combiner of gradients weighs")
    given = parser.parse_args()
    print("\n".join(table(given.bytes, given.rank, given.tokens, given.tasks)))


if __name__ == "__main__":
    main()
