"""Describe any file of the pipeline without running it: plan, manifest, ONNX, checkpoint, export, bundle, snapshot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longtake.engines.describe_checkpoint import describe_safetensors
from longtake.engines.describe_onnx import describe_onnx
from longtake.runtime.errors import IntegrityError, LongtakeError
from longtake.runtime.files import read_json, sha256

KNOWN = ".plan, .onnx, .safetensors, or the .json of a manifest, export, bundle, checkpoint or report"
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))

# Which JSON file is it? The first kind whose keys are all there.
JSON_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("engine bundle", ("recipe", "vocabulary")),
    ("plan manifest", ("plan",)),
    ("plan manifest", ("spec", "flavour")),
    ("export description", ("networks", "parity")),
    ("export description", ("amax", "files")),
    ("run report", ("kind", "command")),
    ("session snapshot", ("seed", "chunk")),
    ("checkpoint description", ("sha256", "preset")),
)


def describe(path: Path) -> dict[str, Any]:
    """Facts about one file, JSON-ready; "kind" names what it is.

    Raises:
        LongtakeError: there is no such file.
        IntegrityError: the file is empty, truncated, altered, a pickle, or of no known kind.
    """
    if path.is_dir():
        return _describe_folder(path)
    if not path.is_file():
        raise LongtakeError(f"{path} does not exist", expected=KNOWN, fix="check the path")
    _reject_empty_and_pickle(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise IntegrityError(f"{path} is not a kind of file that longtake knows", got=path.name, expected=KNOWN)
    return {"file": str(path), "bytes": path.stat().st_size, **reader(path)}


def _describe_folder(path: Path) -> dict[str, Any]:
    for name in ("bundle.json", "export.json", "session.json"):
        if (path / name).is_file():
            return describe(path / name)
    raise LongtakeError(
        f"{path} is a folder without bundle.json, export.json or session.json", expected=KNOWN, fix="name a file in it"
    )


def _reject_empty_and_pickle(path: Path) -> None:
    with open(path, "rb") as source:
        start = source.read(4096)
    if not start:
        raise IntegrityError(f"{path} is empty", got="0 bytes", expected=KNOWN, fix="make it again, or restore it")
    if start.startswith(PICKLE_STARTS) or (start.startswith(b"PK") and b"data.pkl" in start):
        raise IntegrityError(
            f"{path} is a pickle, which can run any code when it is loaded",
            got="a Python pickle",
            expected=KNOWN,
            fix="convert it to safetensors where you trust it, and pass that",
        )


def describe_plan(path: Path) -> dict[str, Any]:
    """Facts about a plan from the manifest beside it; the plan itself, being executable code, is never loaded.

    Raises:
        IntegrityError: the plan is not the one the manifest describes.
    """
    beside = path.with_name(path.name + ".json")
    if not beside.is_file():
        note = f"none ({beside.name} is not beside it); a plan is executable code and is not opened to look inside"
        return {"kind": "TensorRT plan", "manifest": note}
    manifest = read_json(beside)
    expected = _plan_digest(manifest)
    if expected is not None and (got := sha256(path)) != expected:
        raise IntegrityError(
            f"{path} is not the plan that {beside.name} describes",
            got=f"sha256 {got}",
            expected=f"sha256 {expected}",
            fix="build it again (longtake engines); never load a plan that fails this",
        )
    return {"kind": "TensorRT plan", "digest": "matches the manifest" if expected else "not given",
            "manifest": manifest}  # fmt: skip


def _plan_digest(manifest: Any) -> str | None:
    if not isinstance(manifest, dict):
        return None
    for key in ("plan_sha256", "sha256"):
        if isinstance(manifest.get(key), str):
            return manifest[key]
    return None


def describe_json(path: Path) -> dict[str, Any]:
    """The content of one of the pipeline's JSON files, with its kind."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds no description", got=type(content).__name__, expected=KNOWN)
    kind = next((kind for kind, keys in JSON_KINDS if all(key in content for key in keys)), None)
    if kind is None:
        raise IntegrityError(f"{path} is JSON of no known kind", got=", ".join(content) or "{}", expected=KNOWN)
    return {"kind": kind, "content": content}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".plan": describe_plan,
    ".onnx": describe_onnx,
    ".safetensors": describe_safetensors,
    ".json": describe_json,
}
