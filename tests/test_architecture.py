"""The import arrows and the house rules, read from the source with ast: nothing is imported.

A *room* is the first name below ``polyrank``: ``polyrank.mixture.gates`` is in the room ``mixture``. Modules that do
not exist yet are no failure; a rule starts to hold when its module appears.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "polyrank"

# a room may import these rooms of ours, and itself
MAY_IMPORT = {
    "mixture": set(),
    "svd": set(),
    "clusters": set(),
    "waiting": set(),
    "methods": {"mixture", "svd", "clusters", "waiting"},
    "targets": {"mixture"},
    "blocks": {"mixture"},
    "places": {"mixture", "blocks"},
    "summary": {"mixture", "methods"},
    "saving": {"mixture", "methods"},
    "files": set(),
    "joining": {"mixture", "methods", "files", "saving", "export"},
    "export": {"mixture", "methods", "files"},
    "adapt": {"mixture", "methods", "targets", "blocks", "places", "summary", "files", "saving", "joining", "export"},
    "checkpoint": {"files"},
    "manifest": set(),
    "gguf_model": set(),
    "onnx_model": set(),
    "assets": {"manifest", "gguf_model", "onnx_model"},
    "data": {"assets", "tasks"},
    "tasks": {"files", "reader"},  # the reader for its types only
    "reader": {"tasks"},
    "mixing": set(),
    "sequence": set(),
    "corpus": {"mixing", "reader", "tasks"},
    "models": {"files", "mixture", "reader", "tasks"},
    "evaluate": {"corpus", "models", "tasks"},
    "probe": {"models", "tasks"},
    "retaining": {"models", "tasks"},
    "peft": {"mixture", "methods", "targets", "blocks", "places", "files", "saving", "joining"},
    "hf": {"adapt", "files", "methods", "mixture", "saving", "tasks"},
    "lm_eval": {"models", "recipe"},
}
# a room may not import these
MAY_NOT_IMPORT = {
    "combine": {"adapt", "train", "recipe", "cli"},
}
# only these rooms may import this top-level package, or this room of ours
ONLY = {
    "yaml": {"recipe", "cli", "quickstart"},
    "typer": {"recipe", "cli", "quickstart"},
    "peft": {"peft"},  # opt-in: `import polyrank` works without it
    "polyrank.recipe": {"cli", "quickstart", "lm_eval"},
    "polyrank.cli": {"__main__"},
    "polyrank.hf": set(),
    "trl": set(),
    "lm_eval": {"lm_eval"},
}

FILES = sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.stem if len(relative.parts) == 1 else relative.parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the file, relative ones resolved; functions count too."""
    package = ["polyrank", *path.relative_to(SRC).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from polyrank import adapt` imports polyrank.adapt
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "polyrank" and len(parts) > 1 and is_room(parts[1]):
            yield line, parts[1]


def is_room(name: str) -> bool:
    return (SRC / name).is_dir() or (SRC / f"{name}.py").is_file()


def report(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only(room: str):
    allowed = MAY_IMPORT[room] | {room}
    report(
        [
            f"{path}:{line}: {room} imports polyrank.{other}; it may import {sorted(allowed)}"
            for path in FILES
            if room_of(path) == room
            for line, other in rooms_imported(path)
            if other not in allowed
        ]
    )


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_room_does_not_import(room: str):
    report(
        [
            f"{path}:{line}: {room} stands alone and may not import polyrank.{other}"
            for path in FILES
            if room_of(path) == room
            for line, other in rooms_imported(path)
            if other in MAY_NOT_IMPORT[room]
        ]
    )


@pytest.mark.parametrize("name", ONLY)
def test_only_these_import(name: str):
    report(
        [
            f"{path}:{line}: only {sorted(ONLY[name])} may import {name}"
            for path in FILES
            if room_of(path) not in ONLY[name] | {name.removeprefix("polyrank.")}
            for line, imported in imports(path)
            if f"{imported}.".startswith(f"{name}.")
        ]
    )


def called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def handled(node: ast.ExceptHandler) -> set[str]:
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return {each.id for each in caught if isinstance(each, ast.Name)}


def reraises(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and statement.exc is None


def house_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what is against the house rules and what to do instead)."""
    for node in ast.walk(tree):
        match node:
            case ast.Call() if called(node) == "hasattr":
                yield node.lineno, "hasattr: declare the attribute in the type, or dispatch on the class"
            case ast.Call(args=[_, _, _]) if called(node) == "getattr":
                yield node.lineno, "getattr with a default: declare the attribute in the type"
            case ast.Attribute(value=ast.Name(id="threading"), attr="local"):
                yield node.lineno, "threading.local: hold state in an object that its users reference"
            case ast.ImportFrom(module="threading") if any(alias.name == "local" for alias in node.names):
                yield node.lineno, "threading.local: hold state in an object that its users reference"
            case ast.Global():
                yield node.lineno, "global: hold state in an object that its users reference"
            case ast.ExceptHandler(type=None):
                yield node.lineno, "bare except: name the error"
            case ast.ExceptHandler() if "Exception" in handled(node):
                yield node.lineno, "except Exception: name the error"
            case ast.ExceptHandler(body=[*_, last]) if "BaseException" in handled(node) and not reraises(last):
                yield node.lineno, "except BaseException: only to undo something and end with a bare raise"


def test_house_rules():
    report(
        [
            f"{path}:{line}: {fault}"
            for path in FILES
            for line, fault in house_faults(ast.parse(path.read_text(encoding="utf-8")))
        ]
    )


@pytest.mark.parametrize(
    "source",
    [
        "hasattr(a, 'b')",
        "getattr(a, 'b', None)",
        "import threading\nx = threading.local()",
        "from threading import local",
        "def f():\n    global x\n    x = 1",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, Exception) as e:\n    raise",
        "try:\n    f()\nexcept BaseException:\n    pass",
    ],
)
def test_the_rules_see_a_fault(source: str):
    assert len(list(house_faults(ast.parse(source)))) == 1


def test_the_rules_pass_good_code():
    source = "x = getattr(a, name)\ntry:\n    f()\nexcept (ValueError, OSError):\n    pass\n"
    source += "try:\n    f()\nexcept BaseException:\n    undo()\n    raise"
    assert not list(house_faults(ast.parse(source)))


def lines_of_code(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor a string that stands alone."""
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in strings
        for number, line in enumerate(text.splitlines(), start=1)
    )


def test_a_paper_is_a_short_file():
    """Of what the formula holds: layers beside linear ones, and nothing to do around a step or a model. The median of
    those method files, headers aside, is 60 lines or less; what needs a place of its own brings it along."""
    texts = [path.read_text(encoding="utf-8") for path in (SRC / "methods").glob("*.py") if path.stem != "base"]
    held = [
        text for text in texts if "(Method):" in text and "def before_step" not in text and "def attach" not in text
    ]
    sizes = sorted(map(lines_of_code, held))
    assert len(sizes) > 20
    assert sizes[len(sizes) // 2] <= 60, sizes
    assert lines_of_code('"""Two\nlines."""\n\n# one\nx = 1  # two\n') == 1
