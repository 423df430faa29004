"""Progress on stderr: nothing for what is soon done, a bar on a terminal, lines elsewhere."""

import functools
import io
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import polyrank.methods.base as methods_base
from polyrank import LoRA, MoORE, MoORETopK, adapt
from polyrank.methods import MiLoRA, PiSSA
from polyrank.waiting import Waiting

SOON = 0.01


class Terminal(io.StringIO):
    def isatty(self):
        return True


def until(condition, seconds=10.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "nothing was shown"
        time.sleep(0.005)


def test_what_is_soon_done_is_silent():
    for stream in (io.StringIO(), Terminal()):
        with Waiting("counting", 3, stream=stream) as waiting:
            for _ in range(3):
                waiting.done_one()
        assert stream.getvalue() == ""
        assert not waiting.timer.is_alive()


def test_lines_where_there_is_no_terminal():
    """The first after a while though no part is done yet, then ever fewer, and one at the end."""
    stream = io.StringIO()
    with Waiting("counting", 40, after=SOON, stream=stream) as waiting:
        until(stream.getvalue)
        for _ in range(40):
            time.sleep(SOON)
            waiting.done_one()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("counting: 0 of 40, ")
    assert lines[-1].startswith("counting: 40 of 40, ")
    assert 3 <= len(lines) <= 12


@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "interrupted"])
def test_a_bar_on_a_terminal(stops, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    waiting = Waiting("counting", 40, after=SOON, stream=stream)
    with pytest.raises(KeyboardInterrupt) if stops else nullcontext(), waiting:
        waiting.done_one()
        until(lambda: "1/40" in stream.getvalue())
        waiting.done_one()
        until(lambda: "2/40" in stream.getvalue())
        if stops:
            raise KeyboardInterrupt
    assert "counting" in stream.getvalue()
    assert not waiting.timer.is_alive()
    assert waiting.bar is not None and not waiting.bar.live.is_started


def test_of_several_processes_the_first_speaks(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    with Waiting("counting", 1, after=0.0, stream=stream) as waiting:
        time.sleep(5 * SOON)
        waiting.done_one()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("method", [MoORE(), MoORETopK(), PiSSA(), MiLoRA(), LoRA()], ids=lambda m: type(m).__name__)
def test_adapt_shows_how_far_the_factorisation_is(method, monkeypatch):
    """The layers of all sites are one piece of work; a method without a factorisation says nothing."""
    stream, honest = io.StringIO(), methods_base.factorise
    monkeypatch.setattr(methods_base, "Waiting", functools.partial(Waiting, after=SOON, stream=stream))

    def slow(weight):
        until(stream.getvalue)
        return honest(weight)

    monkeypatch.setattr(methods_base, "factorise", slow)
    torch.manual_seed(0)
    adapter = adapt(nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))), method, tasks=["a"])
    assert [*adapter.layers] == ["0", "1", "2"]
    if isinstance(method, LoRA):
        assert stream.getvalue() == ""
    else:
        first, *_, last = stream.getvalue().splitlines()
        assert first.startswith("factorising weights: 0 of 3, ") and last.startswith("factorising weights: 3 of 3, ")


def test_nothing_is_factorised_where_one_site_is_refused(monkeypatch):
    """Its refusal must not come after minutes of work on the others."""
    seen = []
    monkeypatch.setattr(methods_base, "factorise", lambda weight: seen.append(weight))
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    net[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="1: the method decomposes the weight itself"):
        adapt(net, PiSSA(), tasks=["a"])
    assert not seen
