"""Single layers: the grid of sizes, the pairs that have limits, and how cost grows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyrank.measure import Candidate, PeakBytes, SavedBytes
from polyrank.methods import ASE, LoRA, MoORETopK, MoRE, TaskLoRA
from polyrank.mixture import dispatch

from . import peers
from .comparing import DTYPES, Findings, inference, mixture, ours, samples, singular, training

SIZES = ((384, 384), (768, 768), (2048, 2048), (4096, 4096), (768, 3072), (3072, 768))
TOKENS = (128, 1024, 4096)
IDS = torch.arange(8)
NAMES = [f"t{i}" for i in range(8)]
MODES: dict[str, Callable[..., Candidate]] = {"training": training, "forward": inference}
SEVEN = ((8, 8, 2), (16, 4, 4), (64, 1, 8), (64, 4, 4), (32, 8, 2), (64, 8, 2), (64, 16, 2))  # E, r, k


def case(dtype: str, size: tuple[int, int], tokens: int) -> str:
    return f"{dtype}, {size[0]} x {size[1]}, {tokens} tokens"


class Mixed(nn.Module):
    """PEFT's layer with ``adapter_names``: one for each sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer._mixed_batch_forward(x, adapter_names=NAMES)


def grid(found: Findings, quick: bool) -> None:
    """The frozen layer, PEFT, a loop, an index loop, and ours; forward and training."""
    for dtype, (size, tokens) in ((d, s) for d in DTYPES for s in ((z, n) for z in SIZES for n in TOKENS)):
        if (size[0] != size[1] and tokens != 1024) or (quick and (size != (768, 768) or tokens != 1024)):
            continue
        x = samples(tokens, size[0], DTYPES[dtype])

        def base(size: tuple[int, int] = size, dtype: str = dtype) -> nn.Linear:
            return peers.frozen_linear(*size, DTYPES[dtype])

        layers = {
            "frozen layer": base(),
            "PEFT LoRA r8": peers.peft_lora(base(), 8),
            "PEFT LoRA r64": peers.peft_lora(base(), 64),
            "loop over 8 experts": peers.LoopMixture(base(), 8, 8),
            "index loop, top 2 of 8": peers.IndexMixture(base(), 8, 8, 2),
            "LoRA r8": ours(LoRA(), base(), IDS),
            "mixture 8 x r8": mixture(base(), 8, 8),
            "mixture 8 x r8, top 2": mixture(base(), 8, 8, 2),
            "MoORE": singular(base(), IDS),
        }
        for mode, how in MODES.items():
            candidates = {name: how(layer, x) for name, layer in layers.items()}
            found.add(f"layer, {mode}", case(dtype, size, tokens), candidates, rounds=9, enough=2)
            for layer in layers.values():
                layer.train()


def pairs(found: Findings, quick: bool) -> None:
    """What the limits speak of: d 768, 1024 tokens, and the sizes that are named there."""
    for dtype, torch_dtype in DTYPES.items():

        def base(i: int = 768, o: int = 768, torch_dtype: torch.dtype = torch_dtype) -> nn.Linear:
            return peers.frozen_linear(i, o, torch_dtype)

        x = samples(1024, 768, torch_dtype)
        fair = {"rounds": 9 if quick else 21, "enough": 5.0 if quick else 14.0}
        layers: dict[str, nn.Module] = {
            "frozen layer": base(),
            "PEFT LoRA r8": peers.peft_lora(base(), 8),
            "PEFT LoRA r8, its default": peers.peft_lora(base(), 8, cast=True),
            "PEFT LoRA r32": peers.peft_lora(base(), 32),
            "PEFT LoRA r64": peers.peft_lora(base(), 64),
            "PEFT Arrow, top 2 of 8": peers.Arrow(base(), 8, 8, 2),
            "loop over 8 experts": peers.LoopMixture(base(), 8, 8),
            "index loop, top 2 of 8": peers.IndexMixture(base(), 8, 8, 2),
            "index loop, top 8 of 64, r1": peers.IndexMixture(base(), 64, 1, 8),
            "LoRA r8": ours(LoRA(), base(), IDS),
            "mixture 8 x r8": mixture(base(), 8, 8),
            "mixture 8 x r8, top 2": mixture(base(), 8, 8, 2),
            "mixture 64 x r1, top 8": mixture(base(), 64, 1, 8),
            "MoORETopK, k 48": ours(MoORETopK(k=48), base(), IDS),
        }
        found.add("pairs", f"{dtype}, mixtures", {n: training(m, x) for n, m in layers.items()}, **fair)
        bank = peers.peft_lora(base(), 8, NAMES)
        tasks: dict[str, nn.Module] = {
            "PEFT LoRA r8": peers.peft_lora(base(), 8),
            "PEFT, a pass for each task": peers.LoopTasks(bank, NAMES),
            "PEFT, adapter_names": Mixed(bank),
            "TaskLoRA r8, 8 tasks": ours(TaskLoRA(), base(), IDS),
            "PEFT LoRA r32": peers.peft_lora(base(), 32),
            "a loop over ranks": peers.LoopRanks(base(), (4, 8, 16, 32)),
            "MoRE, ranks 4 to 32": _nested(ours(MoRE(rank=32), base(), IDS // 2, 4)),
        }
        found.add("pairs", f"{dtype}, 8 tasks in a batch", {n: training(m, x) for n, m in tasks.items()}, **fair)
        x5, five = samples(1960, 768, torch_dtype, 5), torch.arange(5)
        grains = {"(16,3,1,4)": ASE(), "(32,6,2,2)": ASE().finer(2), "(64,12,4,1)": ASE().finer(4)}
        ase = {name: training(ours(method, base(), five, 5), x5) for name, method in grains.items()}
        found.add("pairs", f"{dtype}, ASE", ase, **fair)
        for d in (768, 2048):
            wide = samples(1024, d, torch_dtype)
            released = peers.ReleasedMoORE(base(d, d), 8, router_dim=16)
            both = {"released": training(released, wide, IDS), "MoORE": training(singular(base(d, d), IDS), wide)}
            found.add("pairs", f"{dtype}, MoORE, {d}", both, **fair)
        for tokens in (1, 1024):
            few = samples(tokens, 768, torch_dtype, min(8, tokens))
            own, ids = base(), IDS[: len(few)]
            both = {
                "frozen layer": inference(own, few),
                "released": inference(peers.ReleasedMoORE(own, 8), few, ids),
                "MoORE, folded": inference(singular(own, ids, 128), few),
            }
            found.add("pairs", f"{dtype}, MoORE evaluated, {tokens} tokens", both, **fair)
    if not quick:
        products(found)


def _nested(layer: nn.Module) -> nn.Module:
    """The four tasks' ranks 4, 8, 16 and 32."""
    router = layer.layer.router
    with torch.no_grad():
        for row, rank in zip(router.embedding.each(), (4, 8, 16, 32), strict=True):
            row.copy_(router.proj[rank - 1] * 100)
    assert (router.logits().argmax(-1) + 1).tolist() == [4, 8, 16, 32]
    return layer


def products(found: Findings) -> None:
    """MoORE's layer beside its own matrix products alone: V, U, both again for dx, and the thin ones."""
    d, thin, tokens = 2048, 24, 4096
    x, ids = samples(tokens, d, torch.float32), IDS
    flat = x.detach().flatten(0, -2)
    v, u, a, up = torch.randn(d, d), torch.randn(d, d), torch.randn(thin, d), torch.randn(d, 16)
    c = torch.randn(tokens, 16)

    def alone() -> None:
        h, z = flat @ v, flat @ a.t()
        h.addmm_(z[:, :8], a[:8])  # P
        for _ in range(2):
            c @ up.t()  # the gate, and again
        y = h @ u
        dh = y @ u.t()
        dh @ up, dh.t() @ c, z[:, :8].t() @ dh, dh @ a[:8].t()
        dx = dh @ v.t()
        dx.addmm_(z, a)
        z.t() @ flat

    candidates = {
        "its products alone": alone,
        "MoORE": training(singular(peers.frozen_linear(d, d, torch.float32), ids), x),
    }
    found.add("pairs", "f32, MoORE and its products, 2048, 4096 tokens", candidates, rounds=9, enough=30)


def rule(found: Findings, quick: bool) -> None:
    """The rule of ``mixture.dispatch`` on seven settings: what it chooses, and both forms."""
    kept = dispatch.DENSE_UP_TO
    for dtype, torch_dtype in DTYPES.items():
        for d in (768,) if quick else (768, 2048):
            x = samples(1024, d, torch_dtype)
            for num, rank, k in SEVEN:
                layer = mixture(peers.frozen_linear(d, d, torch_dtype), num, rank, k)
                run = training(layer, x)
                grouped = dispatch.pays(layer.experts, layer.gate, x, torch_dtype)

                def under(most: int, run: Candidate = run, torch_dtype: torch.dtype = torch_dtype) -> Candidate:
                    def one() -> None:
                        dispatch.DENSE_UP_TO = {torch_dtype: most}
                        run()

                    return one

                candidates = {"dense": under(10**9)}
                dispatch.DENSE_UP_TO = {torch_dtype: 0}
                if dispatch.pays(layer.experts, layer.gate, x, torch_dtype):  # some ranks are no 16 bytes
                    candidates["grouped"] = under(0)
                dispatch.DENSE_UP_TO = kept
                candidates["chosen"] = candidates["grouped" if grouped else "dense"]
                name = f"{dtype}, {d}, {num} experts r{rank}, top {k}"
                found.add("dispatch", name, candidates, rounds=11, enough=4)
                dispatch.DENSE_UP_TO = kept


def memory(found: Findings, quick: bool) -> None:
    """Bytes kept for the backward pass beside x, and the most that is alive, in units of tokens x d."""
    for dtype, torch_dtype in DTYPES.items():
        x, b = samples(1024, 768, torch_dtype), lambda: peers.frozen_linear(768, 768, torch_dtype)  # noqa: B023
        layers: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "frozen layer": (b(), ()),
            "PEFT LoRA r8": (peers.peft_lora(b(), 8), ()),
            "PEFT LoRA r8, its default": (peers.peft_lora(b(), 8, cast=True), ()),
            "PEFT Arrow, top 2 of 8": (peers.Arrow(b(), 8, 8, 2), ()),
            "loop over 8 experts": (peers.LoopMixture(b(), 8, 8), ()),
            "index loop, top 2 of 8": (peers.IndexMixture(b(), 8, 8, 2), ()),
            "LoRA r8": (ours(LoRA(), b(), IDS), ()),
            "mixture 8 x r8": (mixture(b(), 8, 8), ()),
            "mixture 8 x r8, top 2": (mixture(b(), 8, 8, 2), ()),
            "TaskLoRA r8, 8 tasks": (ours(TaskLoRA(), b(), IDS), ()),
            "MoORE": (singular(b(), IDS), ()),
            "MoORE, released": (peers.ReleasedMoORE(b(), 8, router_dim=16), (IDS,)),
        }
        unit = x.numel() * x.element_size()
        kept, peak = {}, {}
        for name, (layer, more) in layers.items():
            with SavedBytes([x, *layer.parameters(), *layer.buffers()]) as saved:
                layer(x, *more)
            run = training(layer, x, *more)
            run()
            with PeakBytes() as most:
                run()
            kept[name], peak[name] = saved.total / unit, most.total / unit
        found.count("kept for backward", dtype, kept, "tokens x d")
        found.count("alive at most", dtype, peak, "tokens x d")


def growth(found: Findings, quick: bool) -> None:
    """How cost grows with tokens, experts, granularity and tasks; fp32, d 768, beside the frozen layer."""

    def base() -> nn.Linear:
        return peers.frozen_linear(768, 768, torch.float32)

    def against(x: Tensor, name: str, layers: dict[str, nn.Module]) -> None:
        candidates = {n: training(layer, x) for n, layer in {"frozen layer": base(), **layers}.items()}
        found.add("growth", name, candidates, rounds=9, enough=3)

    for tokens in (64, 256, 1024, 4096):
        layers = {"mixture 8 x r8": mixture(base(), 8, 8), "loop": peers.LoopMixture(base(), 8, 8)}
        against(samples(tokens, 768, torch.float32), f"tokens {tokens}", layers | {"MoORE": singular(base(), IDS)})
    x = samples(1024, 768, torch.float32)
    for num in (2, 4, 8, 16, 32):
        top = {"mixture, r8, top 2": mixture(base(), num, 8, 2), "index loop": peers.IndexMixture(base(), num, 8, 2)}
        against(x, f"experts {num}", top)
    for grain in (1, 2, 4, 8):
        e, r, k = 8 * grain, 8 // grain, 2 * grain
        fine = {"mixture, rank 64 in all": mixture(base(), e, r, k), "index loop": peers.IndexMixture(base(), e, r, k)}
        against(x, f"granularity {grain}", fine)
    for tasks in (1, 2, 4, 8):
        names, ids = NAMES[:tasks], torch.arange(8) // (8 // tasks)
        bank = peers.peft_lora(base(), 8, names)
        each = {"TaskLoRA r8": ours(TaskLoRA(), base(), ids, tasks), "PEFT, a pass each": peers.LoopTasks(bank, names)}
        against(x, f"tasks {tasks}", each)
