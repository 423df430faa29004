"""Folders of tensors that are whole or not there: safetensors files, and a JSON manifest with all checksums.

A folder is written aside, flushed to disk and renamed, so a cut never leaves half of one and never loses the last one.
Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

SCHEMA = 1
MANIFEST = "manifest.json"
SEAL = b',\n "sha256": "'
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def checked_name(name: str, what: str) -> str:
    """``name`` if it can safely be part of a file name, a parameter name and an address.

    Raises:
        ValueError: empty, over 100 characters, others than letters, digits, ``_`` and ``-``, or reserved.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name) or name.lower() in _RESERVED:
        raise ValueError(
            f"{what} name {name[:120]!r} cannot be used: take 1 to 100 letters, digits, '_' or '-', beginning with a "
            "letter or digit"
        )
    return name


def write_folder(path: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]) -> None:
    """Write ``<file>.safetensors`` for each entry of ``tensors``, and the manifest, as one folder.

    A folder that an earlier call wrote is replaced; anything else in the way is left alone.

    Raises:
        FileExistsError: something that is not such a folder stands at ``path``.
        ValueError: a tensor has NaN or infinite values, named.
        OSError: the disk is full or read-only; what was at ``path`` stands.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / MANIFEST).is_file() or not any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and was not written by polyrank: choose another folder or move it away")
    for file, group in tensors.items():
        checked_name(file, "file")
        _refuse_non_finite(file, group, "nothing was written; look for a diverged training run")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        sums = {
            f"{file}.safetensors": _write_tensors(aside / f"{file}.safetensors", group)
            for file, group in tensors.items()
        }
        text = json.dumps({"schema": SCHEMA, **manifest, "files": sums}, indent=1, allow_nan=False)
        _write_bytes(aside / MANIFEST, sealed(text))
        aside.chmod(0o755)
        _flush_folder(aside)
        _swap(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_folder(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file and name, and the manifest, of a folder written by ``write_folder``. Every byte is verified.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is damaged, altered, or of a newer version; the message names the file.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{path} has no {MANIFEST}: give the folder that was saved (for a run: RUN/adapter)")
    manifest = _read_manifest(path / MANIFEST)
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, digest in manifest["files"].items():
        name = checked_name(file.removesuffix(".safetensors"), "file")
        if not (path / file).is_file() or (path / file).is_symlink():
            raise ValueError(
                f"{path / file} is missing or a link: the folder is incomplete; copy it again from where it was saved"
            )
        data = (path / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"{path / file} is not the file that was saved (SHA-256 differs): copy it again from where it was saved"
            )
        try:
            tensors[name] = safetensors.torch.load(data)
        except SafetensorError as error:
            raise ValueError(f"{path / file} is no safetensors file: {error}") from error
        _refuse_non_finite(str(path / file), tensors[name], "the file was not made by this version of polyrank")
    return tensors, manifest


def sealed(text: str) -> bytes:
    """A JSON object of several lines, with the SHA-256 of all bytes before it as its last value."""
    head = text.removesuffix("\n}").encode() + SEAL
    return head + hashlib.sha256(head).hexdigest().encode() + b'"\n}'


def _read_manifest(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON number")

    try:
        if path.stat().st_size > 1 << 28:
            raise ValueError("larger than 256 MiB")
        data = path.read_bytes()
        head = data.rpartition(SEAL)[0]
        manifest = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
        if data != sealed(head.decode() + "\n}"):
            raise ValueError("it is not what was written (SHA-256 differs)")
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            raise ValueError("no list of files")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy the folder again from where it was saved") from error
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}: upgrade polyrank")
    return manifest


def _refuse_non_finite(file: str, group: Mapping[str, Tensor], cure: str) -> None:
    for name, tensor in group.items():
        if tensor.is_floating_point() and not math.isfinite(
            float(tensor.detach().double().abs().max() if tensor.numel() else 0.0)
        ):
            raise ValueError(f"{file}: {name} has NaN or infinite values; {cure}")


def _write_tensors(path: Path, group: Mapping[str, Tensor]) -> str:
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()})
    _write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to be filled, beside ``path``; at the end of the block it is flushed and stands there, or, after an
    error, nothing does.

    Raises:
        FileExistsError: something stands at ``path`` that is no empty folder.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists: choose a new folder; engines keep what they read from an old one")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        aside.chmod(0o755)
        _flush_folder(aside)
        _swap(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file as a whole: written aside, flushed and renamed."""
    aside = path.with_name(f".{path.name}.part")
    _write_bytes(aside, text.encode())
    aside.replace(path)
    _flush_folder(path.parent)


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # no directory handles there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(aside: Path, path: Path) -> None:
    """Put ``aside`` at ``path``. The old folder is kept until the new one stands."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) if path.exists() else None
    if old is not None:
        path.rename(old / "folder")
    try:
        aside.rename(path)
    except BaseException:
        if old is not None:
            (old / "folder").rename(path)
            old.rmdir()
        raise
    _flush_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


Fingerprint = dict[str, list[Any]]  # parameter -> [dtype, shape, sampled values]


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which all processes do at once; any other as it is."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # here, because few need it

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(parameters: Mapping[str, Tensor], samples: int = 4) -> Fingerprint:
    """What tells one base model from another, in a few bytes a parameter: dtype, shape and some of its values."""
    out: Fingerprint = {}
    for name, p in parameters.items():
        flat = whole(p.detach()).reshape(-1)
        places = [i * (flat.numel() - 1) // max(1, samples - 1) for i in range(samples)] if flat.numel() else []
        values = [] if flat.device.type == "meta" else flat[places].double().tolist()
        out[name] = [str(p.dtype), list(p.shape), values]
    return out


def difference(saved: Fingerprint, here: Fingerprint) -> str | None:
    """The first difference between two fingerprints, in words; None where they are of the same model.

    In the same dtype the samples must be equal; in another one they may differ by its rounding.
    """
    if saved.keys() != here.keys():
        odd = sorted(saved.keys() ^ here.keys())
        return f"{len(odd)} parameters stand in one model only, {odd[0]} first"
    for name, (dtype, shape, values) in saved.items():
        here_dtype, here_shape, here_values = here[name]
        if shape != here_shape:
            return f"{name} has shape {here_shape}, the adapter was trained on {shape}"
        slack, least = (0.0, 0.0) if dtype == here_dtype else (0.01, 1e-7)  # 16-bit floats end about there
        if len(values) != len(here_values) or any(
            abs(a - b) > slack * abs(b) + least for a, b in zip(values, here_values, strict=False)
        ):
            return f"{name} has other values than the weights that the adapter was trained on"
    return None
