"""Method cards, written from the code: what `polyrank methods NAME` prints and docs/methods/NAME.md holds.

python -m polyrank.cards docs        writes all of them, and the table in docs/methods.md
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from pydantic import TypeAdapter
from torch import nn

from .methods import METHODS, Method
from .methods.base import BlockMethod
from .mixture import FeedForward

READS = {
    frozenset[str](): "nobody: one function for all tasks",
    frozenset({"task"}): "the task",
    frozenset({"token"}): "the token",
    frozenset({"sample"}): "the sample",
    frozenset({"task", "token"}): "the task and the token",
    frozenset({"task", "sample"}): "the task and the sample",
}
MERGES = {
    "static": "static: exactly, into one weight for all tasks",
    "per task": "per task: exactly, into a weight for each",
    "per sample": "per sample: each has a weight of its own, so `merge()` refuses",
    "no": "no: the gate reads each token",
    "when faded": "static once the router has faded, exactly; before, `merge()` refuses",
}
TABLE = "<!-- written by `make cards` -->\n"


def header(kind: type) -> str:
    """The docstring of the file that a method or a combiner stands in."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()


def title(kind: type[Method]) -> str:
    """The paper's title, authors and year: the header's first line."""
    return header(kind).splitlines()[0]


def advice(kind: type[Method]) -> str:
    """When to choose it: the header's sentence that says so."""
    found = re.search(r"Choose it (.*?)[.:](\s|$)", header(kind), re.DOTALL)
    return "" if found is None else " ".join(found[1].split())


def is_reconstruction(kind: type[Method]) -> bool:
    """Whether not everything of the method was published, or could be read."""
    return re.search(r"^Reconstruction\b", header(kind), re.MULTILINE) is not None


def reads(kind: type[Method]) -> frozenset[str]:
    """What the gate looks at, with the default fields."""
    site = nn.Linear(64, 64)
    if kind.ADAPTS == "feed-forward blocks":
        site = FeedForward(nn.Linear(64, 64), nn.Linear(64, 64), nn.GELU())
    return kind().build({"0": site}, ["a", "b"])["0"].reads


def merges(kind: type[Method]) -> str:
    """Static, per task, per sample, or no: what one weight can stand for, with the default fields."""
    read = reads(kind)
    if "token" in read:
        return "when faded" if "fade" in explained(kind) else "no"
    if "sample" in read:
        return "per sample"
    return "per task" if read else "static"


def size(kind: type[Method]) -> str:
    """The trained weights of one layer, and of all together, as the method gives them."""
    method = kind()
    once = "" if method.SIZE_ONCE == "0" else f", and once for all layers `{method.SIZE_ONCE}`"
    where = "a layer"
    if isinstance(method, BlockMethod):
        where = "a block of H hidden units (G = 1 if it is gated, else 0)"
        once = f", `{method.SIZE_BESIDE}` in another layer{once}"
    return f"`{method.SIZE}` in {where}{once}"


def explained(kind: type) -> dict[str, tuple[str, str]]:
    """Default and meaning of each field, by name."""
    known = TypeAdapter(kind).json_schema()["properties"]
    found: dict[str, tuple[str, str]] = {}
    for field in fields(kind):
        default = "" if field.default is MISSING else as_yaml(field.default)
        found[field.name] = default, " ".join(known[field.name].get("description", "").split())
    return found


def as_yaml(value: object) -> str:
    """A default as a recipe would have it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(as_yaml(one) for one in value) + "]"
    return json.dumps(value)  # of strings and numbers, JSON is YAML


def card(name: str) -> str:
    """The Markdown card of a method."""
    kind = METHODS[name]
    example = next(((key, value) for key, (value, _) in explained(kind).items() if key in ("rank", "k")), None)
    setting = "" if example is None else f", {example[0]}: {example[1]}"
    status = "a reconstruction"
    if not is_reconstruction(kind):
        status = "faithful to the paper's equation or its released code, but for the deviations above"
    return "\n".join(
        [
            f"# {kind.__name__}",
            "",
            *markdown(header(kind)),
            "",
            "| | |",
            "|---|---|",
            f"| name in recipes | `{name}` |",
            f"| class | `polyrank.methods.{kind.__name__}` |",
            f"| status | {status} |",
            f"| adapts | {kind.ADAPTS} |",
            f"| who is asked | {READS[reads(kind)]} |",
            f"| merges | {MERGES[merges(kind)]} |",
            f"| starts as the base model | {'yes' if kind().starts_as_base else 'no'} |",
            f"| trained weights | {size(kind)} |",
            "",
            "I and O are a layer's inputs and outputs, T the tasks, K the rank of its weight, l its number of L.",
            "What is asked, and so how it merges, is said for the default fields.",
            "",
            "| field | default | meaning |",
            "|---|---|---|",
            *(f"| `{key}` | `{value}` | {meaning} |" for key, (value, meaning) in explained(kind).items()),
            "",
            "```yaml",
            "model: minilm",
            f"method: {{name: {name}{setting}}}",
            "tasks: [r8, movies]",
            "```",
            "",
        ]
    )


def markdown(text: str) -> Iterator[str]:
    """A header's paragraphs, its first line bold, its indented equations as blocks, its lists set off."""
    inside, before = False, ""
    for i, line in enumerate(text.splitlines()):
        indented = line.startswith("    ") or (inside and not line.strip())
        if indented and not inside:
            yield "```text"
        elif inside and not indented:
            yield from ("```", "")
        inside = indented
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", "  ")):
            yield ""
        before = line
        if inside:
            if line.strip():
                yield line.removeprefix("    ")
        else:
            line = re.sub(r"(https?://\S+)", r"<\1>", line).replace("``", "`")
            yield f"**{line}**" if i == 0 else line
    if inside:
        yield "```"


def overview() -> str:
    """The table of all methods, with links to their cards."""
    lines = [
        "| name | class | paper | who is asked | merges | |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in METHODS.items():
        paper = title(kind).partition(": ")[2] or title(kind)
        mark = "reconstruction" if is_reconstruction(kind) else ""
        lines.append(
            f"| [`{name}`](methods/{name}.md) | `{kind.__name__}` | {paper.rstrip('.')} | {READS[reads(kind)]} "
            f"| {merges(kind)} | {mark} |"
        )
    return "\n".join(lines) + "\n"


def pages(docs: Path) -> dict[Path, str]:
    """What stands, or should stand, in the documentation's folder: each card, and methods.md with its table."""
    own = docs / "methods.md"
    before, _, rest = own.read_text(encoding="utf-8").partition(TABLE)
    after = rest.lstrip("\n").partition("\n\n")[2]
    written = {docs / "methods" / f"{name}.md": card(name) for name in METHODS}
    return {own: f"{before}{TABLE}\n{overview()}\n{after}", **written}


if __name__ == "__main__":
    for path, text in pages(Path(sys.argv[1])).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
