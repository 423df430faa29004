"""Adapter files: whole or not there, every byte verified, nothing lost, nothing unpickled."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from polyrank import Adapter, LoRA, MoORE, adapt
from polyrank.files import read_folder, sealed, write_folder
from small import IDS, METHODS, TASKS, Net, adapted, inputs


@pytest.fixture
def saved(tmp_path):
    _, adapter = adapted(METHODS["more"])
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def fresh() -> Net:
    torch.manual_seed(1)
    return Net()


def test_loads_in_a_fresh_process(tmp_path):
    """Every method: the outputs of another process are equal to ours, to the bit."""
    wanted = {}
    for name, method in METHODS.items():
        net, adapter = adapted(method)
        adapter.save(tmp_path / name)
        wanted[name] = net.eval()(inputs(4, 5, 16), task_ids=IDS).detach()
    program = (
        "import sys, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "from small import *; root = Path(sys.argv[1]); out = {}\n"
        "for name in METHODS:\n"
        "    net = base(METHODS[name]).eval(); torch.manual_seed(77); Adapter.load(root / name, net)\n"
        "    out[name] = net(inputs(4, 5, 16), task_ids=IDS).detach()\n"
        "save_file(out, root / 'out.safetensors')"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=here)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("file", ["adapter.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["flip", "cut", "append"])
def test_any_damage_is_refused(saved, file, kind):
    """Of the flips, 250 in each file: every bit counts, white space and the checksums themselves too."""
    path, net, rng = saved / file, fresh(), random.Random(file)
    whole = path.read_bytes()
    for _ in range({"flip": 250, "cut": 20, "append": 1}[kind]):
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        damaged = {
            "flip": whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :],
            "cut": whole[:at],
            "append": whole + b"x",
        }[kind]
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{re.escape(file)}.*copy (it|the folder) again"):
            Adapter.load(saved, net)
        assert type(net.q) is torch.nn.Linear
    path.write_bytes(whole)
    Adapter.load(saved, net)


def rewrite(folder, change) -> None:
    """Alter the tensors and the manifest consistently, as a program with the right to would."""
    tensors, manifest = read_folder(folder)
    change(tensors["adapter"], manifest)
    manifest.pop("files")
    manifest.pop("schema")
    manifest.pop("sha256")
    write_folder(folder, tensors, manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("q.experts.lora_A"), r"lack q\.experts\.lora_A"),
        (lambda t, m: t.update(odd=torch.zeros(1)), "have odd"),
        (lambda t, m: t.update({"q.experts.lora_A": torch.zeros(2, 2)}), r"q\.experts\.lora_A has shape \(2, 2\)"),
        (lambda t, m: m["method"].update(name="nobody:Knows"), "does not come with polyrank"),
        (lambda t, m: m["method"].update(rank=-1), "rank"),
        (lambda t, m: m.update(polyrank="heads"), "holds no adapter"),
        (lambda t, m: m.update(tasks=["../../up", "b", "c"]), "name"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(saved, change, message):
    rewrite(saved, change)
    net = fresh()
    before = [p.requires_grad for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        Adapter.load(saved, net)
    assert type(net.q) is torch.nn.Linear
    assert [p.requires_grad for p in net.parameters()] == before
    net(inputs(4, 5, 16))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files": {}, "files": {}}',
        '{"schema": 1, "files": {}, "x": NaN}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_folder(saved)


def test_a_newer_schema_is_refused(saved):
    (saved / "manifest.json").write_bytes(sealed(json.dumps({"schema": 99, "files": {}}, indent=1)))
    with pytest.raises(ValueError, match="upgrade polyrank"):
        read_folder(saved)


def test_files_outside_the_folder_are_never_read(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"] = {"../other.safetensors": "0" * 64}
    manifest.pop("sha256")
    (saved / "manifest.json").write_bytes(sealed(json.dumps(manifest, indent=1)))
    save_file({"x": torch.zeros(1)}, saved.parent / "other.safetensors")
    with pytest.raises(ValueError, match="name"):
        read_folder(saved)


def test_another_base_is_refused(saved):
    torch.manual_seed(2)
    with pytest.raises(ValueError, match=r"another base model: q\.weight has other values"):
        Adapter.load(saved, Net())
    half = fresh().bfloat16()
    Adapter.load(saved, half)  # the same base in another precision is the same base


def test_nan_is_not_written_and_what_was_there_stays(saved):
    net = fresh()
    adapter = Adapter.load(saved, net)
    y = net(inputs(4, 5, 16), task_ids=IDS)
    with torch.no_grad():
        adapter.layers["q"].experts.lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q\.experts\.lora_B has NaN"):
        adapter.save(saved)
    again = fresh()
    Adapter.load(saved, again)
    assert torch.equal(again(inputs(4, 5, 16), task_ids=IDS), y)
    assert sorted(os.listdir(saved.parent)) == ["adapter"]


def test_saving_again_replaces_and_a_failed_rename_loses_nothing(saved, monkeypatch):
    _, adapter = adapted(METHODS["more"], seed=1)
    adapter.save(saved)
    before = (saved / "adapter.safetensors").read_bytes()
    from pathlib import Path

    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2:  # the old folder is aside, the new one does not come
            raise OSError("disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        adapter.save(saved)
    monkeypatch.undo()
    assert (saved / "adapter.safetensors").read_bytes() == before
    assert sorted(os.listdir(saved.parent)) == ["adapter"]


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    _, adapter = adapted(METHODS["lora"])
    with pytest.raises(FileExistsError, match="another folder"):
        adapter.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "years of work"


def test_swapped_singular_directions_are_refused(tmp_path):
    """As on a machine where near-equal singular values swap; the shipped factors help."""
    net, adapter = adapted(MoORE(num_reflections=4, router_dim=4))
    y = net(inputs(4, 5, 16), task_ids=IDS)
    for with_factors in (False, True):
        layer = adapter.layers["q"]
        order = torch.arange(16)
        order[[3, 4]] = order[[4, 3]]
        if not with_factors:
            kept = layer.u.clone(), layer.vt.clone()
            layer.u.copy_(layer.u[:, order])
            layer.vt.copy_(layer.vt[order])
            adapter.save(tmp_path / "swapped")
            with pytest.raises(ValueError, match="with_factors=True"):
                Adapter.load(tmp_path / "swapped", fresh())
        adapter.save(tmp_path / "shipped", with_factors=True)
        other = fresh()
        Adapter.load(tmp_path / "shipped", other)
        assert torch.equal(other(inputs(4, 5, 16), task_ids=IDS), net(inputs(4, 5, 16), task_ids=IDS))
        layer.u.copy_(kept[0])
        layer.vt.copy_(kept[1])
    assert torch.equal(net(inputs(4, 5, 16), task_ids=IDS), y)


def test_a_method_of_ones_own(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Mine(LoRA):
        pass

    adapter = adapt(fresh(), Mine(rank=2), tasks=TASKS, targets=["q"])
    adapter.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="method="):
        Adapter.load(tmp_path / "mine", fresh())
    assert Adapter.load(tmp_path / "mine", fresh(), method=Mine(rank=2)).method == Mine(rank=2)
