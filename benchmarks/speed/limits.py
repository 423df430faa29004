"""What the project holds itself to, and what was found: `at most` is a target of the design, not of this run."""

from dataclasses import dataclass

from .comparing import Findings

MIX, EIGHT, STEPS = "mixtures", "8 tasks in a batch", "Llama, 6 x 384"
READ, DECODE = "Llama, 6 x 768, a prompt of 256", "Llama, 6 x 768, a token after it"


@dataclass(frozen=True)
class Limit:
    """One line: what is compared with what, and the most that it may be, in fp32 and bf16."""

    name: str
    text: str
    section: str
    case: str
    mine: str
    other: str
    most: tuple[float | None, float | None]


def pair(name: str, text: str, case: str, mine: str, other: str, f32: float | None, bf16: float | None) -> Limit:
    return Limit(name, text, "pairs", case, mine, other, (f32, bf16))


def steps(name: str, text: str, mine: str, other: str, f32: float | None, bf16: float | None) -> Limit:
    return Limit(name, text, "whole steps", STEPS, mine, other, (f32, bf16))


LIMITS = [
    pair("S1", "LoRA r8 / PEFT's, its best dtypes", MIX, "LoRA r8", "PEFT LoRA r8", 0.94, 0.88),
    pair("S2", "LoRA r8 / PEFT's default (fp32 adapters)", MIX, "LoRA r8", "PEFT LoRA r8, its default", None, 0.58),
    pair("S3", "mixture 8 x r8 / PEFT LoRA r64", MIX, "mixture 8 x r8", "PEFT LoRA r64", 1.0, 1.1),
    pair("S3", "the same, top 2", MIX, "mixture 8 x r8, top 2", "PEFT LoRA r64", 1.0, 1.1),
    pair("S4", "mixture 8 x r8 / loop over experts", MIX, "mixture 8 x r8", "loop over 8 experts", 0.42, 0.24),
    pair("S4", "top 2 / index loop", MIX, "mixture 8 x r8, top 2", "index loop, top 2 of 8", 0.66, 0.34),
    pair(
        "S4", "top 8 of 64, r1 / index loop", MIX, "mixture 64 x r1, top 8", "index loop, top 8 of 64, r1", 0.27, 0.10
    ),
    pair("S5", "ASE (64,12,4,1) / (16,3,1,4)", "ASE", "(64,12,4,1)", "(16,3,1,4)", 1.15, 1.25),
    pair("S8", "8 tasks in a batch / PEFT, one task", EIGHT, "TaskLoRA r8, 8 tasks", "PEFT LoRA r8", 0.97, 0.97),
    pair("S8", "/ a pass for each task", EIGHT, "TaskLoRA r8, 8 tasks", "PEFT, a pass for each task", 0.66, 0.36),
    pair("S8", "/ PEFT's adapter_names", EIGHT, "TaskLoRA r8, 8 tasks", "PEFT, adapter_names", 0.58, 0.27),
    pair("S9", "MoRE, ranks 4 to 32 / PEFT LoRA r32", EIGHT, "MoRE, ranks 4 to 32", "PEFT LoRA r32", 0.96, 0.88),
    pair("S9", "/ a loop over ranks", EIGHT, "MoRE, ranks 4 to 32", "a loop over ranks", 0.78, 0.45),
    pair("S10", "MoORE / released, 768", "MoORE, 768", "MoORE", "released", 0.72, 0.45),
    pair("S10", "MoORE / released, 2048", "MoORE, 2048", "MoORE", "released", 0.82, 0.56),
    pair(
        "S11", "MoORE / its products alone", "MoORE and its products, 2048, 4096 tokens", "MoORE",
        "its products alone", 1.12, None,
    ),
    pair("S13", "MoORE evaluated, folded / released, 1 token", "MoORE evaluated, 1 tokens", "MoORE, folded", "released",
         0.45, 0.50),
    pair("S13", "the same, 1024 tokens", "MoORE evaluated, 1024 tokens", "MoORE, folded", "released", 0.76, 0.40),
    pair("S14", "MoORETopK (k 48) / frozen layer", MIX, "MoORETopK, k 48", "frozen layer", 1.35, None),
    steps("S15", "whole step: mixture 8 x r8 / PEFT LoRA r8", "mixture 8 x r8", "PEFT LoRA r8", 1.22, 1.25),
    steps("S15", "the same, top 2", "mixture 8 x r8, top 2", "PEFT LoRA r8", 1.22, 1.25),
    steps("S15", "mixture / loop over experts", "mixture 8 x r8", "loop over 8 experts", 0.42, 0.40),
    steps("S15", "MixLoRA / released", "MixLoRA", "MixLoRA, released", 0.85, 0.36),
    steps("S15", "MoORE / released", "MoORE", "MoORE, released", 0.70, 0.56),
    steps("S16", "4 tasks mixed / PEFT, one task", "TaskLoRA r8, 4 tasks", "PEFT LoRA r8", 0.97, 1.0),
    steps("S16", "/ PEFT, a pass for each task", "TaskLoRA r8, 4 tasks", "PEFT LoRA r8, a pass for each task", 0.93,
          0.80),
    Limit("S17", "merged / frozen model, a prompt", "answers", READ, "MoRE r32, merged", "frozen model", (1.05, 1.05)),
    Limit("S17", "merged / frozen model, a token", "answers", DECODE, "MoRE r32, merged", "frozen model", (1.05, 1.05)),
    Limit("S20", "MoRE, one task / PEFT LoRA r32, a prompt", "answers", READ, "MoRE r32, one task", "PEFT LoRA r32",
          (1.05, 1.05)),
    Limit("S20", "MoRE, one task / PEFT LoRA r32, a token", "answers", DECODE, "MoRE r32, one task", "PEFT LoRA r32",
          (1.05, 1.05)),
]  # fmt: skip


MASTERS = (
    "In bf16 our masters are fp32, cast down in each step and their gradients up; PEFT's best has bf16 adapters. "
    "Tried: casting inside the primitives, a padded softmax, gates spread by a product (all kept); thin products "
    "padded to 16 or 32 columns (no gain that repeats)."
)
PASSES = (
    "A loop pays in passes over memory. Here they are cheap beside bf16 products: it takes 6 to 10 times a frozen "
    "layer, and took 11 where the target was set."
)
REASONS = {
    "S1": MASTERS,
    "S2": "PEFT's default pays in passes over memory, which are cheap here beside bf16 products. " + MASTERS,
    "S3": "Softmax, gates and the router's columns come on top of thin products of the same size as PEFT's. " + MASTERS,
    "S4": PASSES,
    "S7": "0.27 of the bf16 peak are the fp32 gradients of A and B, which do not grow with the tokens.",
    "S8": "Products of each sample with its own A and B, not one of all; stacking and gathering take 3 to 6 per "
    "cent of the step. " + PASSES,
    "S9": "The gate is one more pass over (tokens, R), and MoRE has a selector to train. " + MASTERS + " " + PASSES,
    "S10": "Known in part: the reflections' factors are small nodes in fp64. Tried: their gradients written out (1.04 "
    "to 0.38 ms a layer of 384, kept), one product for the logits of a batch's tasks (kept).",
    "S13": "About half of the time on one token are the two products themselves. Tried: V'P' and the router's rows in "
    "one matrix, and the offsets of all tasks computed once (both kept).",
    "S14": "Thin products are the rest: 72 rows down and 56 up, at half the rate of wide ones, and PEFT's LoRA of rank "
    "64 takes as long. Tried: the reflections' factors once in a step instead of three times, and no gradients of the "
    "frozen U and V (both kept, 0.1 less).",
    "S15": "As S3 and S10; beside a loop as S4.",
    "S16": "Four tasks' adapters have four times PEFT's weights, for AdamW too; and as S8.",
}


def reasons(lines: list[tuple[str, str, str, str, str]]) -> list[str]:
    """Why what is over its limit is, and what was tried."""
    over = dict.fromkeys(name for name, _, _, found, _ in lines if found.endswith("**over**"))
    return [f"- **{name}**: {REASONS.get(name, 'not known yet')}" for name in over]


def timed(found: Findings) -> list[tuple[str, str, str, str, str]]:
    """(name, text, dtype, what was found, at most) of each limit on a ratio of times that this run has."""
    lines = []
    for limit in LIMITS:
        for dtype, most in zip(("f32", "bf16"), limit.most, strict=True):
            ratio = found.ratio(limit.section, f"{dtype}, {limit.case}", limit.mine, limit.other)
            if most is not None and ratio is not None:
                mark = "" if ratio.median <= most else " **over**"
                lines.append((limit.name, limit.text, dtype, f"{ratio}{mark}", f"{most:g}"))
    return lines + _rule(found)


def _rule(found: Findings) -> list[tuple[str, str, str, str, str]]:
    lines = []
    for one in found.comparisons:
        if one.section == "dispatch":
            best = min((name for name in one.timings if name != "chosen"), key=lambda name: one.timings[name].typical)
            ratio = one.ratio("chosen", best)
            mark = "" if ratio.median <= 1.10 else " **over**"
            dtype, setting = one.case.split(", ", 1)
            lines.append(("S6", f"the rule's choice / the better ({best}): {setting}", dtype, f"{ratio}{mark}", "1.1"))
    return lines


# (name, section, case, a number of it, divided by another of it, at most)
COUNTED = [
    ("S2", "alive at most", "bf16", "LoRA r8", "PEFT LoRA r8, its default", 0.30),
    ("S7", "kept for backward", "f32", "mixture 8 x r8", None, 0.25),
    ("S7", "kept for backward", "bf16", "mixture 8 x r8", None, 0.25),
    ("S7", "alive at most", "f32", "mixture 8 x r8", None, 2.4),
    ("S7", "alive at most", "bf16", "mixture 8 x r8", None, 2.4),
    ("S12", "kept for backward", "f32", "MoORE", None, 1.25),
    ("S12", "kept for backward", "bf16", "MoORE", None, 1.25),
    ("S12", "kept for backward", "f32", "MoORE", "MoORE, released", 1 / 7),
    ("S12", "kept for backward", "bf16", "MoORE", "MoORE, released", 1 / 14),
    ("S17", "merging", "f32", "error of a merged layer, against fp64", None, 1e-6),
    ("S18", "factors", "1024 x 4096", "ours / torch's svd", None, 0.40),
    ("S18", "factors", "2048 x 2048", "from the cache / computed", None, 0.02),
    ("S18", "factors", "2048 x 2048", "error of W", None, 2e-7),
]


def counted(found: Findings) -> list[tuple[str, str, str, str, str]]:
    """The same of what is counted."""
    lines = []
    for name, section, case, mine, other, most in COUNTED:
        value = found.number(section, case, mine)
        if value is None:
            continue
        if other is not None:
            below = found.number(section, case, other)
            if not below:
                continue
            value /= below
        text = f"{section}: {mine}" + ("" if other is None else f" / {other}")
        mark = "" if value <= most else " **over**"
        lines.append((name, text, case, f"{value:.3g}{mark}", f"{most:.3g}"))
    return lines
