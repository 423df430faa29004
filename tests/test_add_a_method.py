"""The page that tells how to add a method: its method, as one file of its own, passes the whole contract."""

import importlib.util
import inspect
import itertools
import sys
from pathlib import Path

import pytest

import polyrank
import small
from polyrank import cards
from test_docs import blocks

ROOT = Path(__file__).parent.parent
PAGE = "docs/add_a_method.md"


def module_from(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's first block as scaled.py, known by name as if it stood in METHODS and in the contract's tables."""
    code = next(b.text for b in blocks(PAGE, (ROOT / PAGE).read_text(encoding="utf-8")) if b.language == "python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 60
    (tmp_path / "scaled.py").write_text(code, encoding="utf-8")
    module = module_from(tmp_path / "scaled.py")
    monkeypatch.setitem(sys.modules, "scaled", module)
    monkeypatch.setitem(polyrank.METHODS, "scaled", module.Scaled)
    monkeypatch.setitem(small.METHODS, "scaled", module.Scaled(rank=3, alpha=3))
    monkeypatch.setitem(small.READS, "scaled", frozenset({"task"}))
    small.STATIC.add("scaled")
    yield module
    small.STATIC.discard("scaled")


def rows():
    """(test, its arguments beside the method's name) of every row of the contract."""
    contract = module_from(ROOT / "tests" / "methods" / "test_contract.py")
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        if name.startswith("test_"):
            grids = [mark.args for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] != "name"]
            for values in itertools.product(*(values for _, values in grids)):
                yield test, dict(zip((key for key, _ in grids), values, strict=True))


ROWS = list(rows())
NAMES = [f"{test.__name__}-{'-'.join(map(str, given.values()))}" for test, given in ROWS]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # as in the contract
@pytest.mark.parametrize(("test", "given"), ROWS, ids=NAMES)
def test_the_page_s_method_passes_the_contract(test, given, scaled, tmp_path: Path):
    if "tmp_path" in inspect.signature(test).parameters:
        given = {**given, "tmp_path": tmp_path}
    test(name="scaled", **given)


def test_the_contract_is_all_here():
    assert len(ROWS) > 25


def test_its_size_and_card_are_right(scaled):
    _, adapter = small.adapted(small.METHODS["scaled"])
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (16 + 24) + 3 * (24 + 12) + 2 * 3 * 3
    text = cards.card("scaled")
    assert "y = W x + b + (alpha / r) B diag(1 + s_t) A x" in text
    assert "| `rank` | `8` | r |" in text
    assert "| merges | per task: exactly, into a weight for each |" in text
