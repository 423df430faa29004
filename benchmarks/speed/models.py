"""Whole models: training steps, inference merged, folded and unmerged, decoding, and loading."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from polyrank import Adapter, Method, adapt
from polyrank.assets import model_folder
from polyrank.measure import Candidate
from polyrank.methods import LoRA, LoRAMoE, MixLoRA, MoLA, MoORE, MoRE, TaskLoRA
from polyrank.targets import find

from . import peers
from .comparing import DTYPES, Findings

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = [f"t{i}" for i in range(4)]


def llama(dtype: torch.dtype, width: int = 384, layers: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=int(width * 2.75), num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def step(model: nn.Module, given: dict[str, Tensor], adapter: Adapter | None = None) -> Candidate:
    """Forward, backward, and AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        out = model(**given)
        loss = out.loss if "labels" in given else out.last_hidden_state.float().square().mean()
        if adapter is not None:
            loss = loss + sum(adapter.losses().values(), torch.zeros(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def peft(model: nn.Module, rank: int = 8, targets: Sequence[str] = LINEARS, *, best: bool = True) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0)
    return get_peft_model(model, config, autocast_adapter_dtype=not best)


def our(model: nn.Module, method: Method, given: dict[str, Tensor], targets: Sequence[str] = LINEARS) -> Candidate:
    adapter = adapt(model, method, tasks=TASKS, targets=list(targets))
    ids = torch.arange(len(next(iter(given.values())))) % len(TASKS)
    return step(model, given | {"task_ids": ids}, adapter)


def replaced(model: nn.Module, build: Callable[[nn.Linear], nn.Module], targets: Sequence[str] = LINEARS) -> nn.Module:
    """The model with another module in the place of every such linear layer."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets and "pooler" not in name:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, build(module))
    return model


def naive_mixlora(model: nn.Module) -> nn.Module:
    """MixLoRA as it is released: a LoRA on attention, and blocks whose down projection runs once an expert."""
    model = replaced(model, lambda base: peers.peft_lora(base, 8), LINEARS[:4])
    for layer in model.model.layers:
        layer.mlp = peers.NaiveMixLoRA(layer.mlp, 8, 8, 2)
    return model


class ByIds(nn.Module):
    """A released MoORE layer with its ids."""

    def __init__(self, base: nn.Linear, ids: Tensor) -> None:
        super().__init__()
        self.layer, self.ids = peers.ReleasedMoORE(base, len(TASKS)), ids

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.ids)


def six_layers(found: Findings, quick: bool) -> None:
    """A Llama of 6 layers, all linear layers, 8 x 128 tokens: what the limits of whole steps speak of."""
    for dtype, torch_dtype in DTYPES.items():
        tokens = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
        given, ids = {"input_ids": tokens, "labels": tokens}, torch.arange(8) % len(TASKS)
        plain = llama(torch_dtype)

        def fresh(plain: nn.Module = plain) -> nn.Module:
            return copy.deepcopy(plain)

        candidates: dict[str, Candidate] = {
            "PEFT LoRA r8": step(peft(fresh()), given),
            "LoRA r8": our(fresh(), LoRA(), given),
            "mixture 8 x r8, top 2": our(fresh(), MoLA(num_experts=(8,), balance=0), given),
            "mixture 8 x r8": our(fresh(), LoRAMoE(num_experts=8, rank=8, balance=0), given),
            "loop over 8 experts": step(replaced(fresh(), lambda base: peers.LoopMixture(base, 8, 8)), given),
            "MixLoRA": our(fresh(), MixLoRA(balance=0), given),
            "MixLoRA, released": step(naive_mixlora(fresh()), given),
            "MoORE": our(fresh(), MoORE(), given),
            "MoORE, released": step(replaced(fresh(), lambda base, ids=ids: ByIds(base, ids)), given),
            "TaskLoRA r8, 4 tasks": our(fresh(), TaskLoRA(), given),
            "PEFT LoRA r8, a pass for each task": by_turns(fresh(), given),
        }
        found.add("whole steps", f"{dtype}, Llama, 6 x 384", candidates, rounds=7 if quick else 13, enough=45)


def by_turns(model: nn.Module, given: dict[str, Tensor]) -> Candidate:
    """PEFT with one adapter for each task: its samples alone, one pass after the other, one step of all."""
    wrapped = peft(model)
    for task in TASKS[1:]:
        wrapped.add_adapter(task, wrapped.peft_config["default"])
    names = ["default", *TASKS[1:]]
    wrapped.to(next(model.parameters()).dtype)
    wrapped.base_model.set_adapter(names)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    parts = [{key: value[i :: len(names)] for key, value in given.items()} for i in range(len(names))]
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]

    def run() -> None:
        for name, part in zip(names, parts, strict=True):
            for layer in layers:  # what set_adapter does, without its walk over all parameters
                layer._active_adapter = [name]
            (wrapped(**part).loss / len(names)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def real(found: Findings, quick: bool) -> None:
    """Training steps of MiniLM, SmolLM2-135M and DINOv2-small, all linear layers of their blocks."""
    generator = torch.Generator().manual_seed(0)
    tokens, images = (
        torch.randint(1000, (16, 64), generator=generator),
        torch.randn(8, 3, 112, 112, generator=generator),
    )
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    short = {"input_ids": tokens[:4], "labels": tokens[:4]}
    models: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "MiniLM, 16 x 64 tokens": (lambda: AutoModel.from_pretrained(model_folder("minilm")), text),
        "SmolLM2-135M, 4 x 64 tokens": (
            lambda: AutoModelForCausalLM.from_pretrained(model_folder("smollm2"), dtype=torch.float32), short
        ),
        "DINOv2-small, 8 images of 112": (
            lambda: AutoModel.from_pretrained(model_folder("dinov2")), {"pixel_values": images}
        ),
    }  # fmt: skip
    for name, (load, given) in models.items():
        plain = load().requires_grad_(False)
        names = sorted({key.rsplit(".", 1)[-1] for key in find(plain, "all-linear") if "pooler" not in key})
        kinds = [key for key in names if key not in ("lm_head", "projection")]

        def fresh(plain: nn.Module = plain) -> nn.Module:
            return copy.deepcopy(plain).train()

        suffixes = [key for key in find(plain, "all-linear") if "pooler" not in key]
        candidates = {
            "PEFT LoRA r8": step(peft(fresh(), targets=suffixes), given),
            "LoRA r8": our(fresh(), LoRA(), given, suffixes),
            "mixture 8 x r8, top 2": our(fresh(), MoLA(num_experts=(8,), balance=0), given, suffixes),
            "TaskLoRA r8, 4 tasks": our(fresh(), TaskLoRA(), given, suffixes),
            "MoORE, router 16": our(fresh(), MoORE(router_dim=16), given, suffixes),
            "loop over 8 experts": step(replaced(fresh(), lambda base: peers.LoopMixture(base, 8, 8), kinds), given),
        }
        if name.startswith("SmolLM2"):
            candidates.pop("loop over 8 experts")
        found.add("whole steps", f"f32, {name}", candidates, rounds=5 if quick else 9, enough=40)


def answers(found: Findings, quick: bool) -> None:
    """Reading a prompt and decoding after it: merged, folded and unmerged, beside the base and PEFT."""
    for dtype, torch_dtype in DTYPES.items():
        plain = llama(torch_dtype, 768).eval()
        plain.config.use_cache = True
        merged = _adapted(plain, MoRE(rank=32)).merge("t1")
        known = _adapted(plain, MoRE(rank=32))
        lora = peft(copy.deepcopy(plain), 32)
        models: dict[str, tuple[Callable[..., object], dict[str, Tensor]]] = {
            "frozen model": (plain, {}),
            "PEFT LoRA r32": (peers.randomised(lora).eval(), {}),
            "PEFT LoRA r32, merged": (peft(copy.deepcopy(plain), 32).eval().merge_and_unload(), {}),
            "MoRE r32, merged": (merged, {}),
            "MoRE r32, one task": (known.model, {"task_ids": torch.tensor([1])}),
            "LoRA r32": (_adapted(plain, LoRA(rank=32)).model, {}),
            "mixture 8 x r8, top 2": (_adapted(plain, MoLA(num_experts=(8,))).model, {}),
            "MoORE, folded": (_adapted(plain, MoORE(router_dim=16)).model, {"task_ids": torch.tensor([1])}),
        }
        prompt = torch.randint(1000, (1, 256), generator=torch.Generator().manual_seed(0))
        reading = {name: _reading(model, prompt, more) for name, (model, more) in models.items()}
        decoding = {name: _decoding(model, prompt, more) for name, (model, more) in models.items()}
        found.add("answers", f"{dtype}, Llama, 6 x 768, a prompt of 256", reading, rounds=15, enough=15)
        found.add("answers", f"{dtype}, Llama, 6 x 768, a token after it", decoding, rounds=15, enough=15)


def _adapted(plain: nn.Module, method: Method) -> Adapter:
    model = copy.deepcopy(plain)
    adapter = adapt(model, method, tasks=TASKS, targets=LINEARS)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.eval()
    return adapter


def _reading(model: Callable[..., object], prompt: Tensor, more: dict[str, Tensor]) -> Candidate:
    @torch.no_grad()
    def run() -> None:
        model(input_ids=prompt, use_cache=False, **more)

    return run


def _decoding(model: Callable[..., object], prompt: Tensor, more: dict[str, Tensor]) -> Candidate:
    """One more token over a cache that is cut back after it."""
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True, **more).past_key_values  # type: ignore[attr-defined]

    @torch.no_grad()
    def run() -> None:
        model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True, **more)
        cache.crop(-1)

    return run


def merging(found: Findings, quick: bool) -> None:
    """Errors of a merged fp32 model, whether the base comes back bit for bit, and what a bf16 merge loses."""
    plain = llama(torch.float32).eval()
    tokens = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in plain.named_parameters()}
    adapter = _adapted(plain, MoRE(rank=32))
    with torch.no_grad():
        routed = adapter.model(tokens, task_ids=torch.tensor([1, 1])).logits
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    merged = adapter.merge("t1")
    with torch.no_grad():
        error = (merged(tokens).logits - routed).norm() / routed.norm()
    twin = _adapted(plain, MoRE(rank=32)).remove()
    same = all(torch.equal(p, before[name]) for name, p in twin.named_parameters())
    kept = all(p.shape == shapes[name] for name, p in merged.named_parameters())
    numbers = {"error of the merged logits": float(error), "shapes are the base's": float(kept)}
    weight, a, b = torch.randn(768, 768), torch.randn(32, 768), 0.05 * torch.randn(32, 768)
    x, exact = torch.randn(256, 768), weight.double() + b.double().t() @ a.double()
    y = x.double() @ exact.t()
    layer = float(((x @ (weight + b.t() @ a).t()).double() - y).norm() / y.norm())
    numbers |= {"base bit for bit after remove()": float(same), "error of a merged layer, against fp64": layer}
    found.count("merging", "f32", numbers)
    for size in (0.1, 0.01, 0.001):
        weight, delta = torch.randn(768, 768, dtype=torch.float64), torch.randn(768, 768, dtype=torch.float64)
        delta *= size * weight.norm() / delta.norm()
        base = weight.bfloat16().double()
        rounded = (base + delta).bfloat16().double() - base
        lost = float((rounded - delta).norm() / delta.norm())
        found.count("merging", f"bf16, a delta of {size:g} of the weight", {"lost of the delta": lost})


def loading(found: Findings, quick: bool) -> None:
    """Singular factors: computed, and from the cache."""
    from benchmarks.svd import gaussian, measure

    for shape in ((768, 768), (1024, 4096)) if quick else ((768, 768), (1024, 4096), (2048, 2048)):
        with tempfile.TemporaryDirectory() as folder:
            f = measure(gaussian(*shape), Path(folder), 3 if quick else 7)
        numbers = {
            "ours / torch's svd": f.ours_over_lapack,
            "from the cache / computed": f.cached_over_ours,
            "error of W": f.reconstruction,
            "error of torch's": f.lapack_reconstruction,
        }
        found.count("factors", f"{shape[0]} x {shape[1]}", numbers)


def compiled(found: Findings, quick: bool) -> None:
    """torch.compile's inductor over whole training steps of two layers, beside eager."""
    tokens = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    plain = llama(torch.float32, layers=2)

    def one(model: nn.Module, more: dict[str, Tensor], *, whole: bool) -> Candidate:
        trained = [p for p in model.parameters() if p.requires_grad]
        call = torch.compile(model, fullgraph=True) if whole else model

        def run() -> None:
            call(input_ids=tokens, labels=tokens, **more).loss.backward()
            for p in trained:
                p.grad = None

        return run

    candidates: dict[str, Candidate] = {}
    for whole, name in ((False, "eager"), (True, "compiled")):
        candidates[f"PEFT LoRA r8, {name}"] = one(peft(copy.deepcopy(plain)), {}, whole=whole)
        for label, method in (("LoRA r8", LoRA()), ("mixture 8 x r8", LoRAMoE(num_experts=8, rank=8, balance=0))):
            model = copy.deepcopy(plain)
            adapt(model, method, tasks=TASKS, targets=LINEARS)
            candidates[f"{label}, {name}"] = one(model, {}, whole=whole)
    found.add("compiled", "f32, Llama, 2 x 384, forward and backward", candidates, rounds=9, enough=20)
