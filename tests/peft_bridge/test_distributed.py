"""A POLYRANK adapter in two processes: DDP and FSDP2 train as one process does."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import polyrank.peft

METHODS = {
    "mtl_lora": {"name": "mtl_lora", "num_experts": 3, "rank": 2},
    "mola": {"name": "mola", "num_experts": [4], "k": 2, "rank": 2, "balance": 0.5},  # a loss of the whole batch
    "moore": {"name": "moore", "num_reflections": 4, "task_dim": 6, "router_dim": 5},
}
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [3, 4, 3, 4, 3], [7, 7, 7, 2, 2]])
IDS = torch.tensor([0, 2, 1, 2])
STEPS = 3


def model_of(method: str) -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    config = polyrank.peft.PolyrankConfig(
        method=METHODS[method], tasks=["a", "b", "c"], target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for p in polyrank.peft.handle(model).parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        loss = model(input_ids=TOKENS[rows], labels=TOKENS[rows], task_id=IDS[rows]).loss
        (loss + sum(polyrank.peft.handle(model).losses().values())).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, Tensor]:
    held = {name: p.detach() for name, p in model.named_parameters() if "polyrank_" in name}
    held = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in held.items()}
    return {name.removeprefix("module."): p.clone() for name, p in held.items()}


def run(rank: int, folder: str) -> None:
    """One of the two processes: every way and method, one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    for method in METHODS:
        model = model_of(method)  # each task's own weights take part in every forward, so none is unused
        train(DistributedDataParallel(model), mine)
        torch.save(whole(model), f"{folder}/ddp-{method}-{rank}.pt")
        model = model_of(method)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        train(model, mine)
        torch.save(whole(model), f"{folder}/fsdp2-{method}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("processes")
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(where)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert all(process.returncode == 0 for process in both), "\n".join(said)
    return where


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(way: str, method: str, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = model_of(method)
    start = whole(alone)
    train(alone, slice(0, 4))
    first, second = (torch.load(folder / f"{way}-{method}-{rank}.pt", weights_only=True) for rank in range(2))
    expected = whole(alone)
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
