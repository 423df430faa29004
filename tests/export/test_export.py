"""One task as files that others load: equal to the mixture in a process without polyrank, or refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from polyrank import LoRA, adapt
from polyrank.export import fitted, of_change, read_lora
from small import FULL_RANK, METHODS, READS, STATIC, inputs
from test_models import CONFIGS, EXCLUDE, TASKS, answer, batch

FAMILIES = ("bert", "llama", "vit")
LORAS = sorted(name for name in STATIC - FULL_RANK if METHODS[name].ADAPTS == "linear layers")
ROUTED = sorted(name for name, reads in READS.items() if reads - {"task"})
LOADER = Path(__file__).with_name("without_polyrank.py")


def adapted(family, method, scale=0.2):
    torch.manual_seed(0)
    model = CONFIGS[family]().eval()
    adapter = adapt(model, METHODS[method], tasks=TASKS, exclude=EXCLUDE.get(family))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model, adapter


def given(folder, model, adapter, family):
    """The inputs, and what the mixture says of task "b"."""
    found = batch(family)
    with torch.no_grad(), adapter.on("b"):
        y = answer(family, model(**found))
    tensors = {f"input.{key}": value for key, value in found.items()} | {"output": y.contiguous()}
    save_file(tensors, folder / "given.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["lora", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_in_a_process_without_polyrank(family, format, tmp_path):
    names = LORAS if format == "lora" else sorted(name for name in STATIC if METHODS[name].ADAPTS == "linear layers")
    exported_without(family, format, names, tmp_path)


@pytest.mark.parametrize(("family", "format"), [("gpt2", "lora"), ("bert", "dense")])
def test_in_a_process_without_polyrank(family, format, tmp_path):
    exported_without(family, format, ["more", "pissa", "moore_topk-task"], tmp_path)


def exported_without(family, format, names, tmp_path):
    torch.manual_seed(0)
    base = CONFIGS[family]()
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        model, adapter = adapted(family, name)
        with adapter.off():
            assert_close(dict(model.state_dict()), dict(base.eval().state_dict()), atol=0, rtol=0)
        exported = adapter.export(folder / "export", "b", format, inputs=batch(family))
        assert exported.difference.most <= exported.difference.allowed
        given(folder, model, adapter, family)
        base.save_pretrained(folder / "base")
    command = [sys.executable, str(LOADER), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = json.loads(done.stdout.strip().splitlines()[-1])
    assert worst.keys() == set(names)
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64])
def test_a_rank_that_is_cut_is_the_best_of_its_rank_and_its_error_is_known(rank):
    """Eckart and Young, by the dense SVD; predicted and measured agree to three digits."""
    decay = torch.logspace(0, -3, 96).unsqueeze(1)
    a, b = decay * inputs(96, 120, seed=1), inputs(96, 100, seed=2)
    found = fitted(a, b, rank, torch.float32)
    sigma = torch.linalg.svdvals((b.T @ a).double())
    best = float(sigma[rank:].norm() / sigma.norm())
    assert found.rank == rank
    assert found.predicted == pytest.approx(best, rel=1e-5)
    assert found.measured == pytest.approx(best, rel=5e-4)
    change = b.T.double() @ a.double()
    truth = float((found.b.double().T @ found.a.double() - change).norm() / change.norm())
    assert found.measured == pytest.approx(truth, rel=1e-6)
    whole = of_change(change, rank, torch.float32)
    assert_close(whole.b.T @ whole.a, found.b.T @ found.a, atol=1e-4, rtol=1e-3)
    assert whole.predicted == pytest.approx(best, rel=1e-5) and whole.measured == pytest.approx(best, rel=5e-4)


def test_ranks_that_add_nothing_are_left_out_and_rounding_is_measured():
    a, b = inputs(6, 20, seed=1), inputs(6, 12, seed=2)
    b[2], a[4] = 0, 0
    exact, rounded = fitted(a, b, None, torch.float32), fitted(a, b, None, torch.bfloat16)
    assert exact.rank == rounded.rank == 4 and exact.predicted == rounded.predicted == 0
    assert exact.measured < 1e-6 and 1e-4 < rounded.measured < 1e-2
    assert_close(exact.b.T @ exact.a, b.T @ a)
    nothing = fitted(a, torch.zeros_like(b), 2, torch.float32)
    assert nothing.rank == 0 and nothing.measured == 0


def test_the_format_that_every_engine_reads(tmp_path):
    """One rank that engines have a slot for, alpha equal to it, no patterns, names in full, the scale in B."""
    _, adapter = adapted("llama", "moore_topk-task")
    exported = adapter.export(tmp_path / "new", "a", inputs=batch("llama"))
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == exported.rank == 16  # k + L is 9
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert not config["use_rslora"] and not config["use_dora"] and config["init_lora_weights"] is True
    assert "rank_pattern" not in config and "alpha_pattern" not in config and config["modules_to_save"] is None
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (16, 48)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 16)
    note = json.loads((tmp_path / "new" / "polyrank.json").read_text())
    assert note["task"] == "a" and note["approximate"] is None and note["method"]["name"] == "moore_topk"


def test_names_in_full_where_ends_would_match_other_layers(tmp_path):
    model = CONFIGS["llama"]()
    adapter = adapt(model, LoRA(rank=2), tasks=["a"], targets=r".*layers\.0\..*q_proj")
    adapter.export(tmp_path / "x", "a", inputs=batch("llama"))
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("format", ["lora", "dense"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_gate_that_looks_at_the_input_is_refused(name, format, tmp_path):
    _, adapter = adapted("bert", name)
    with pytest.raises(ValueError, match="depends on the input"):
        adapter.export(tmp_path / "x", "b", format, inputs=batch("bert"))
    assert not any(tmp_path.iterdir())


def test_full_rank_wants_a_rank(tmp_path):
    model, adapter = adapted("bert", "moore-task", 0.02)
    with pytest.raises(ValueError, match="full rank"):
        adapter.export(tmp_path / "x", "b", inputs=batch("bert"))
    said = []
    exported = adapter.export(tmp_path / "x", "b", inputs=batch("bert"), max_rank=8, say=said.append)
    assert exported.rank == 8 and 0 < exported.predicted < 1
    assert any("predicted / measured" in line for line in said)
    change = adapter.layers["encoder.layer.0.attention.self.query"].task_weight(1)
    change = change - model.encoder.layer[0].attention.self.query.weight
    read = read_lora(tmp_path / "x")["encoder.layer.0.attention.self.query"]
    sigma = torch.linalg.svdvals(change.double())
    apart = float((read.b.T @ read.a - change).norm() / change.norm())
    assert apart == pytest.approx(float(sigma[8:].norm() / sigma.norm()), rel=1e-3)


def test_a_mean_gate_is_the_mean_over_tokens_that_are_no_padding(tmp_path):
    """HydraLoRA by hand: the weights of each token's experts, averaged; with them held, the export is that LoRA."""
    model, adapter = adapted("bert", "hydralora")
    found = batch("bert")
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in adapter.layers.items()
    ]
    with torch.no_grad(), adapter.on("b"):
        model(**found)
    for hook in hooks:
        hook.remove()
    gates = adapter.gate_means("b", [found])
    here = found["attention_mask"].bool()
    for name, layer in adapter.layers.items():
        if "pooler" not in name:
            want = (seen[name][here] @ layer.router.weight.T).softmax(-1).mean(0)
            assert_close(gates[name].float(), want.detach(), atol=1e-6, rtol=1e-5)
    exported = adapter.export(tmp_path / "x", "b", inputs=found, gates=gates)
    assert exported.approximate == "mean-gate"
    assert json.loads((tmp_path / "x" / "polyrank.json").read_text())["approximate"] == "mean-gate"
    name, layer = next(iter(adapter.layers.items()))
    experts, x = layer.experts, inputs(5, layer.in_features)
    each = experts.lora_B.view(experts.num_experts, -1, layer.out_features)
    want = sum(g * (x @ experts.lora_A.T) @ b for g, b in zip(gates[name].float(), each, strict=True)) * layer.scale
    lora = read_lora(tmp_path / "x")[name]
    assert_close(x @ lora.a.T @ lora.b, want.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["moore-token", "ase", "mola", "moore_topk-token", "c_lorae", "smora", "teamlora"])
def test_a_mean_gate_of_one_token_is_exact(name, tmp_path):
    """Then the gate's mean is the gate: nothing is left of the approximation."""
    _, adapter = adapted("llama", name)
    one = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    gates = adapter.gate_means("b", [one])
    exported = adapter.export(tmp_path / "x", "b", "dense", inputs=one, gates=gates)
    assert exported.difference.most <= exported.difference.allowed


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    model, adapter = adapted("bert", "lora")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(
        "polyrank.export.task.read_lora",
        lambda folder: {name: type(lora)(lora.a, 2 * lora.b) for name, lora in read_lora(folder).items()},
    )
    with pytest.raises(ValueError, match="does not compute what"):
        adapter.export(tmp_path / "x", "b", inputs=batch("bert"))
    with pytest.raises(RuntimeError, match="no room"):
        adapter.export(tmp_path / "y", "b", "dense", inputs=batch("bert"), also=_fails)
    assert not any(tmp_path.iterdir())
    assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose a new folder"):
        adapter.export(tmp_path / "full", "b", "dense", inputs=batch("bert"))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def _fails(folder):
    raise RuntimeError("no room")


def test_off_and_merged_give_the_mixture_back():
    model, adapter = adapted("bert", "moore-task")
    found = batch("bert")
    with torch.no_grad():
        before = model(**found, task_ids=torch.tensor([0, 1, 2])).last_hidden_state
        with adapter.on("b"):
            task = model(**found).last_hidden_state
        with adapter.merged("b") as plain:
            assert_close(plain(**found).last_hidden_state, task, atol=2e-5, rtol=1e-5)
        with pytest.raises(KeyError), adapter.merged("a"):
            raise KeyError
        again = model(**found, task_ids=torch.tensor([0, 1, 2])).last_hidden_state
    assert torch.equal(before, again)


@pytest.mark.parametrize("wrong", ["rslora", "pattern"])
def test_reads_what_peft_scales(wrong, tmp_path):
    """alpha / r, alpha / sqrt(r), and patterns by layer."""
    a, b = inputs(4, 6, seed=1), inputs(5, 4, seed=2)
    save_file(
        {"base_model.model.x.q.lora_A.weight": a, "base_model.model.x.q.lora_B.weight": b},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": wrong == "rslora"}
    config |= {"rank_pattern": {"q": 2}, "alpha_pattern": {"x.q": 6}} if wrong == "pattern" else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(tmp_path)["x.q"]
    assert_close(lora.b.T @ lora.a, (4.0 if wrong == "rslora" else 3.0) * b @ a)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "peft_type"), ({"bias": "all"}, "bias")],
)
def test_refuses_what_is_no_plain_lora(change, said, tmp_path):
    _, adapter = adapted("bert", "lora")
    adapter.export(tmp_path / "x", "b", inputs=batch("bert"))
    file = tmp_path / "x" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        read_lora(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        read_lora(tmp_path)


def test_a_16_bit_base_says_what_rounding_costs(tmp_path):
    model = CONFIGS["bert"]().eval().bfloat16()
    adapter = adapt(model, METHODS["more"], tasks=TASKS)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    said = []
    exported = adapter.export(tmp_path / "x", "b", "dense", inputs=batch("bert"), say=said.append)
    assert 0 < exported.lost < 1 and "rounding" in said[0]
