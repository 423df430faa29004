"""Pinned downloads with small made wheels and a local index: verifying, locking, extracting."""

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from polyrank import assets
from polyrank.assets import ASSETS, Asset, AssetError, extract, fetch, model_folder

METADATA = "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n"


def make_wheel(folder: Path, members: dict[str, str]) -> Asset:
    """A wheel that pip accepts, and its entry for a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made-1.0-py3-none-any.whl"
    info = {
        "made-1.0.dist-info/METADATA": METADATA,
        "made-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "made-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **info}.items():
            archive.writestr(name, content)
    return Asset("made", "1.0", "wheel", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT", 0.01, "made")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLYRANK_CACHE", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder and no index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_manifest():
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert len(asset.sha256) == 64
        assert asset.version in asset.filename
        assert asset.filename.endswith(".whl" if asset.kind == "wheel" else ".tar.gz")


def test_fetch_downloads_once_then_works_offline(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {"made/a.txt": "a"})
    path = fetch(asset)
    assert path == cache / asset.filename
    assert visible(cache) == [asset.filename]
    (shelf / asset.filename).unlink()
    assert fetch(asset) == path


def test_corrupted_file_is_refused_and_removed(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {"made/a.txt": "a"})
    path = fetch(asset)
    path.write_bytes(b"cut")
    found = hashlib.sha256(b"cut").hexdigest()
    with pytest.raises(AssetError, match=rf"(?s)was deleted.*{asset.sha256}.*{found}.*again"):
        fetch(asset)
    assert visible(cache) == []
    assert fetch(asset) == path


def test_another_file_from_the_index_is_refused(cache: Path, shelf: Path):
    pinned = make_wheel(shelf, {"made/a.txt": "a"})
    other = make_wheel(shelf, {"made/a.txt": "evil"})
    with pytest.raises(AssetError, match=rf"(?s){pinned.sha256}.*{other.sha256}.*pip download --no-deps"):
        fetch(pinned)
    assert visible(cache) == []


def test_no_network_names_the_command_and_the_place(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {})
    (shelf / asset.filename).unlink()
    message = rf"(?s)could not download made 1\.0.*--only-binary :all: made==1\.0.*put {asset.filename} into {cache}"
    with pytest.raises(AssetError, match=message):
        fetch(asset)
    assert visible(cache) == []


def test_no_pip_carries_the_cure(cache: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"(?s)no pip.*-m ensurepip.*pip download"):
        fetch(make_wheel(shelf, {}))


def test_unwritable_cache_carries_the_cure(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set POLYRANK_CACHE"):
        fetch(make_wheel(shelf, {}))


def test_remains_of_a_killed_download_go(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {})
    (cache / f".{asset.filename}.part" / "out").mkdir(parents=True)
    (cache / f".{asset.filename}.part" / "out" / asset.filename).write_bytes(b"half")
    fetch(asset)
    assert visible(cache) == [asset.filename]


EXTRACT = """
import json, sys
from polyrank import assets

download = assets._download

def counted(asset, path):
    with open(sys.argv[2], "a") as file:
        file.write("x")
    download(asset, path)

assets._download = counted
print((assets.extract(assets.Asset(**json.loads(sys.argv[1])), "made/model") / "a.txt").read_text())
"""


def test_two_processes_at_once_download_once(cache: Path, shelf: Path, tmp_path: Path):
    asset = make_wheel(shelf, {"made/model/a.txt": "a"})
    command = [sys.executable, "-c", EXTRACT, json.dumps(asdict(asset)), str(tmp_path / "marks")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["a\n", "a\n"]
    assert (tmp_path / "marks").read_text() == "x"
    assert visible(cache) == ["made-1.0", asset.filename]


def test_extract_takes_one_folder(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a", "made/model/sub/b.txt": "b", "made/models.txt": "no"})
    folder = extract(asset, "made/model/")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.txt")) == ["a.txt", "sub/b.txt"]
    assert visible(cache) == ["made-1.0", asset.filename]
    assert visible(folder.parent) == ["model"]


@pytest.mark.parametrize("member", ["made/model/../../../evil.txt", "made/model/..\\evil.txt"])
def test_traversal_is_refused(cache: Path, member: str):
    asset = make_wheel(cache, {"made/model/a.txt": "a", member: "evil"})
    with pytest.raises(AssetError, match="would land outside"):
        extract(asset, "made/model")
    assert visible(cache) == [asset.filename]


def test_damaged_member_leaves_nothing(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a" * 100})
    path = cache / asset.filename
    content = path.read_bytes().replace(b"a" * 100, b"b" * 100)
    path.write_bytes(content)
    asset = Asset("made", "1.0", "wheel", path.name, hashlib.sha256(content).hexdigest(), "MIT", 0.01, "made")
    with pytest.raises(AssetError, match=r"(?s)Bad CRC.*Delete the file"):
        extract(asset, "made/model")
    assert visible(cache) == [asset.filename]


def test_pinned_member_is_checked_before_the_folder_appears(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a"})
    with pytest.raises(AssetError, match=r"a\.txt is not the pinned file"):
        extract(asset, "made/model", {"a.txt": "0" * 64})
    assert visible(cache) == [asset.filename]


def test_missing_folder_is_named(cache: Path):
    with pytest.raises(AssetError, match="has no folder 'made/gone'"):
        extract(make_wheel(cache, {}), "made/gone")


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'bert': the known ones are minilm"):
        model_folder("bert")


def test_minilm_is_complete():
    folder = model_folder("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(visible(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASSETS))
def test_every_asset_downloads_into_an_empty_cache(cache: Path, name: str):
    path = fetch(ASSETS[name])
    assert visible(cache) == [path.name]
    assert path.stat().st_size / 1e6 == pytest.approx(ASSETS[name].megabytes, abs=0.1)
