"""The page of a run: what the limits say, all tables, how cost grows; and the same as JSON."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path

import peft
import torch
import transformers

from .comparing import Comparison, Findings
from .limits import counted, reasons, timed

PROTOCOL = """All candidates of a table ran in turn, in a new random order each round, in one process. A figure is the
median over the rounds of the ratio to the first column in the same round, with its quartiles; on one thread time is the
process's own. A process's memory allocator remembers: what ran before a comparison changes it by some percent, and on
products of few tokens by more, so that a candidate may stand below the frozen layer. Milliseconds of different
tables do not compare: the machine's rate changed between them, in bf16 by a factor of two. Where quartiles lie
far apart, read the range, not the median. "Its best dtypes": PEFT's adapters in the dtype of the base.
`make bench` makes this page again."""


def machine() -> dict[str, str]:
    model = next((line for line in _cpu() if line.startswith("model name")), "").partition(":")[2].strip()
    return {
        "processor": model or platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability() + _units(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def _units() -> str:
    flags = next((line for line in _cpu() if line.startswith("flags")), "").split()
    return "".join(f", {unit}" for unit in ("amx_bf16", "avx512_bf16") if unit in flags)


def _cpu() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def name_of(here: dict[str, str]) -> str:
    words = "".join(c if c.isalnum() else "_" for c in here["processor"].lower()).strip("_")
    while "__" in words:
        words = words.replace("__", "_")
    return f"speed_{words or 'cpu'}_{here['date']}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def compared(section: str, group: list[Comparison]) -> list[str]:
    """One table for each set of candidates."""
    lines: list[str] = []
    sets = {tuple(one.timings): None for one in group}
    for names in sets:
        rows = []
        for one in group:
            if tuple(one.timings) == names:
                first = one.timings[names[0]]
                found = [f"{one.timings[name].over(first)}" for name in names[1:]]
                rows.append([one.case, f"{first.typical * 1e3:.3g} ms", *found])
        lines += table([section, names[0], *names[1:]], rows)
    return lines


def written(found: Findings, here: dict[str, str]) -> str:
    lines = ["# Speed", "", PROTOCOL, ""]
    lines += table(["", ""], [[key, value] for key, value in here.items()])
    lines += ["## What the project holds itself to", ""]
    held = [*timed(found), *counted(found)]
    lines += table(["", "ratio", "", "found", "at most"], held)
    if missed := reasons(held):
        lines += ["Over, the causes as far as they are known, and what was tried:", "", *missed, ""]
    for section in dict.fromkeys(one.section for one in found.comparisons):
        lines += [f"## {section[0].upper()}{section[1:]}", ""]
        if section == "growth":
            lines += [f"![How cost grows]({name_of(here)}.svg)", ""]
        lines += compared(section, [one for one in found.comparisons if one.section == section])
    for section in dict.fromkeys(one.section for one in found.counts):
        group = [one for one in found.counts if one.section == section]
        names = list(dict.fromkeys(name for one in group for name in one.numbers))
        rows = [[name, *(f"{one.numbers[name]:.3g}" if name in one.numbers else "" for one in group)] for name in names]
        title = f"{section}, {group[0].unit}" if group[0].unit else section
        lines += [f"## {title[0].upper()}{title[1:]}", "", *table(["", *(one.case for one in group)], rows)]
    return "\n".join(lines).rstrip() + "\n"


def drawn(found: Findings, path: Path) -> None:
    """Cost in units of the frozen layer, one picture for tokens, experts, granularity and tasks each."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[Comparison]] = {}
    for one in found.comparisons:
        if one.section == "growth":
            groups.setdefault(one.case.rsplit(" ", 1)[0], []).append(one)
    figure, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 3.2), squeeze=False)
    for ax, (kind, group) in zip(axes[0], groups.items(), strict=True):
        at = [float(one.case.rsplit(" ", 1)[1]) for one in group]
        for name in list(group[0].timings)[1:]:
            ratios = [one.ratio(name, "frozen layer") for one in group]
            ax.plot(at, [r.median for r in ratios], marker="o", label=name)
            ax.fill_between(at, [r.low for r in ratios], [r.high for r in ratios], alpha=0.2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(at, [f"{x:g}" for x in at])
        ax.set_xlabel(kind)
        ax.set_ylim(bottom=1)
        ax.legend(fontsize=7)
    axes[0][0].set_ylabel("training step / frozen layer")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def save(found: Findings, folder: Path) -> Path:
    here = machine()
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name_of(here)}.md"
    if page.with_suffix(".json").exists():
        older = json.loads(page.with_suffix(".json").read_text())
        if older["machine"] != here:  # threads, versions: figures of two runs would stand under one head
            page = folder / f"{name_of(here)}_{datetime.now():%H%M%S}.md"
        else:
            found = found.with_older(older)
    page.write_text(written(found, here))
    data = {"machine": here, **asdict(found)}
    page.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    if any(one.section == "growth" for one in found.comparisons):
        drawn(found, page.with_suffix(".svg"))
    return page
