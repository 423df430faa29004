"""The documentation is true: its code runs, its recipes and command lines are valid, its pages build offline."""

import csv
import inspect
import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
import typer

import polyrank
import tiny
from polyrank.cards import pages
from polyrank.cli import app
from polyrank.combine import COMBINERS
from polyrank.recipe.reading import check_recipe, parse_yaml

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
LANGUAGES = {"python", "yaml", "console", "bash", "jsonl", "json", "csv", "text", ""}
WHOLE = {"model": "minilm", "method": {"name": "lora"}, "tasks": ["r8"]}  # what a part of a recipe is completed with
COMMAND = re.compile(r"(^|[|;&] ?)(\$ )?(\.venv/bin/)?(polyrank|make) ")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line of its first line, and what is in it."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page, also those that are indented in a list or a tab."""
    found: list[Block] = []
    fence, start, info = None, 0, ""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        match = re.match(r"( *)(`{3,}|~{3,})(.*)", line)
        if match and fence is None:
            fence, start, info = match, number, match[3].strip()
        elif match and fence is not None and match[2].startswith(fence[2]) and not match[3].strip():
            body = [content.removeprefix(fence[1]) for content in lines[start : number - 1]]
            found.append(Block(page, start + 1, info, "\n".join(body) + "\n"))
            fence = None
    assert fence is None, f"{page}:{start}: the block never ends"
    return found


BLOCKS = [block for page, path in PAGES.items() for block in blocks(page, path.read_text(encoding="utf-8"))]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def command_lines(page: str, text: str) -> list[tuple[str, str]]:
    """(page:line, shell line) of every `polyrank` and `make` call: in a block, in an indented line, or as `code`."""
    inside = {
        block.line + i: block.language for block in blocks(page, text) for i in range(len(block.text.splitlines()))
    }
    found: list[tuple[str, str]] = []
    joined = re.sub(r"\\\n(.*)\n", r" \1\n\n", text)  # a backslash joins two lines; the count of lines stays
    for number, line in enumerate(joined.splitlines(), start=1):
        match inside.get(number):
            case "python" | "yaml" | "text":
                shell = []
            case "console":
                shell = [line.strip()] if line.strip().startswith("$ ") else []  # the rest is output
            case None if not line.startswith("    "):
                shell = re.findall(r"`([^`]+)`", line)
            case _:
                shell = [line.strip()]
        found += [(f"{page}:{number}", call) for call in shell if COMMAND.search(call)]
    return found


COMMANDS = [call for page, path in PAGES.items() for call in command_lines(page, path.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object):
        raise AssertionError("the documentation's code must not reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_there_is_something_to_check():
    assert {block.page for block in of("python")} >= {"README.md", *(f"docs/{p}.md" for p in ("index", "concepts"))}
    assert of("yaml") and of("jsonl") and of("console") and len(COMMANDS) > 10


def test_every_block_has_a_known_language():
    """An unknown one would escape the tests below: teach them, then add it to the list."""
    assert [f"{block}: {block.language}" for block in BLOCKS if block.language not in LANGUAGES] == []


# What a page's code takes for granted.
SETUP: dict[str, Callable[[], dict[str, object]]] = {
    "README.md": lambda: {
        "batch": {"input_ids": torch.randint(4, 14, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)},
        "inputs": {"input_ids": torch.randint(4, 14, (2, 6))},
        "my_loss": lambda output: output.last_hidden_state.square().mean(),
        "fresh_model": tiny.backbone(),
    },
    "docs/peft.md": lambda: {
        "batch": {name: torch.randint(4, 14, (4, 6)) for name in ("input_ids", "labels")},
        "base": tiny.decoder(),
        "fresh_base": tiny.decoder(),
        "another_base": tiny.decoder(),
    },
}


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_the_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """All blocks of a page in one namespace. What stands behind `print(...)  # ` is printed; "..." cuts it short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: tiny.backbone())
    names = {"__name__": "__main__"} | (SETUP[page]() if page in SETUP else {})
    own = [block for block in of("python") if block.page == page]
    with torch.random.fork_rng():
        for block in own:
            source = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
            exec(compile(source, str(PAGES[page]), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    for promise in re.findall(r"^ *print\(.*\)  # (.+)$", "\n".join(block.text for block in own), re.MULTILINE):
        if promise.endswith("..."):
            assert any(line.startswith(promise[:-3]) for line in printed), f"{page}: not printed: {promise}"
        else:
            assert promise in printed, f"{page}: not printed: {promise}"


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_the_recipes_are_valid(block: Block, tmp_path: Path):
    """A part of a recipe is completed: a mapping by what it lacks, a list stands for the tasks."""
    content = parse_yaml(block.text, str(block))
    if isinstance(content, list):
        content = {"tasks": content}
    assert check_recipe(WHOLE | content, str(block), tmp_path).build_method()


@pytest.mark.parametrize("block", of("jsonl") + of("json"), ids=str)
def test_the_json_is_valid(block: Block):
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("block", of("csv"), ids=str)
def test_the_tables_are_rectangular(block: Block):
    assert len({len(cells) for cells in csv.reader(block.text.splitlines(), strict=True)}) == 1


def parse(words: list[str]) -> None:
    """Read the words of a `polyrank` call as the command would, without running it: raises what it would say."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    name, *rest = words
    if name.startswith("-"):
        assert any(name in option.opts for option in group.params) or name in ("-h", "--help"), f"no such option {name}"
        return
    assert name in group.commands, f"no such command {name}"
    try:
        group.commands[name].make_context(name, rest)
    except typer.Exit:  # --help
        return


def calls(line: str) -> list[list[str]]:
    """The words of each `polyrank` or `make` call of a shell line; redirections and comments are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("|;&"):
            found.append([])
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        else:
            found[-1].append(word.removeprefix(".venv/bin/"))
    found = [words[1:] if words[:1] == ["$"] else words for words in found]
    return [words for words in found if words and words[0] in ("polyrank", "make")]


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where} {line}" for where, line in COMMANDS])
def test_the_command_lines_are_valid(where: str, line: str):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, *words in calls(line):
        if program == "polyrank":
            parse(words)
        else:
            targets = [word for word in words if "=" not in word]
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), line


@pytest.mark.parametrize(
    "line",
    [
        "$ polyrank trian recipe.yaml",
        "polyrank train recipe.yaml --sett a=b",
        "cat texts.txt | polyrank predict",
        "polyrank quickstart --steps many",
    ],
)
def test_a_wrong_command_line_is_seen(line: str):
    ((_, *words),) = calls(line)
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid"):
        parse(words)


MESSY = """\
- a

    ```console
    $ polyrank eval RUN \\
      --json  # it's why
    polyrank 0.1.0 says so
    ```

    make test  # b

`polyrank schema > "a b"`, and `x | polyrank predict RUN`; polyrank itself is no command, nor is `make`
"""


def test_blocks_and_command_lines_are_found():
    (block,) = blocks("p", MESSY)
    assert (block.line, block.language) == (4, "console") and block.text.startswith("$ polyrank eval")
    found = command_lines("p", MESSY)
    assert [where for where, _ in found] == ["p:4", "p:9", "p:11", "p:11"]
    assert [words for _, line in found for words in calls(line)] == [
        ["polyrank", "eval", "RUN", "--json"],
        ["make", "test"],
        ["polyrank", "schema"],
        ["polyrank", "predict", "RUN"],
    ]


def test_every_method_has_a_card_that_says_what_the_code_is():
    """The cards are written by `make cards`; their tables are read back here."""
    for path, text in pages(ROOT / "docs").items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is not what the code says: run make cards"
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} == set(polyrank.METHODS)
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name, kind in polyrank.METHODS.items():
        text = PAGES[f"docs/methods/{name}.md"].read_text(encoding="utf-8")
        rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.*) \|$", text, re.MULTILINE)
        fields = {key: field.default for key, field in inspect.signature(kind).parameters.items()}
        assert {key: parse_yaml(value, name) for key, value, _ in rows} == plain(fields), name
        assert all(meaning for *_, meaning in rows), f"{name}: a field without a meaning"
        assert "```text\n" in text and "https://arxiv.org/abs/" in text and "Choose it" in text, name
        assert f"methods/{name}.md" in nav, name


def plain(fields: dict[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def test_every_combiner_is_explained():
    text = PAGES["docs/combining.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", text, re.MULTILINE)) == set(COMBINERS)
    needs = {kind: set() for kind in ("nothing", "losses", "gradients")}
    for name, kind in COMBINERS.items():
        needs[kind.needs].add(name)
    rows = dict(re.findall(r"^\| (nothing|its losses)[^|]* \| ([^|]*) \|", text, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows["nothing"])) == needs["nothing"]
    assert set(re.findall(r"`(\w+)`", rows["its losses"])) == needs["losses"]


def test_the_interface_is_on_its_page():
    text = PAGES["docs/api.md"].read_text(encoding="utf-8")
    shown = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert shown >= {name for name, value in vars(polyrank).items() if name[0] != "_" and not inspect.ismodule(value)}
    members = re.findall(r"^ {8}- \"?(\w+)", text, re.MULTILINE)
    assert set(members) == {name for name in vars(polyrank.Adapter) if not name.startswith("_")}


class Loads(HTMLParser):
    """What a page loads from elsewhere; links that a reader may click are no loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = [value for name, value in attrs if value and name in ("src", "href", "srcset", "data")]
        if tag != "a":
            self.found += [address for address in addresses if re.match(r"(https?:)?//", address)]


OFFLINE = """
import socket, sys
def refuse(*_): raise SystemExit("the build reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
sys.exit(cli())
"""


def test_the_pages_build_offline_and_load_nothing_from_elsewhere(tmp_path: Path):
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 1  # the README is no page, the search for a missing one is
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found == [], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet
