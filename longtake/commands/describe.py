"""Describe any file of the pipeline without running it: plan, manifest, ONNX, checkpoint, export, bundle, snapshot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, sha256
from longtake.formats.describe_checkpoint import describe_safetensors
from longtake.formats.describe_onnx import describe_onnx
from longtake.formats.exported import Export
from longtake.formats.plan import PlanManifest, manifest_path
from longtake.runtime.snapshot import FORMAT as SESSION_FORMAT
from longtake.runtime.snapshot import snapshot_from_file
from longtake.tensor_file import tensors_in
from longtake.training.models.checkpoint import refuse_pickle

KNOWN = ".plan, .onnx, .safetensors, or the .json of a manifest, export, bundle, checkpoint, profile or report"

# Which JSON file is it? The first kind whose keys are all there.
JSON_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("engine bundle", ("recipe", "onnx", "files")),
    ("plan manifest", ("plan", "sha256", "flavour")),
    ("cut network (segments)", ("network", "segments", "steps")),
    ("export description", ("onnx_name", "networks")),
    ("run report", ("kind", "command", "commit")),
    ("checkpoint description", ("kind", "preset", "sha256")),
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
    if not path.stat().st_size:
        raise IntegrityError(f"{path} is empty", got="0 bytes", expected=KNOWN, fix="make it again, or restore it")
    refuse_pickle(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise IntegrityError(f"{path} is not a kind of file that longtake knows", got=path.name, expected=KNOWN)
    return {"file": str(path), "bytes": path.stat().st_size, **reader(path)}


def _describe_folder(path: Path) -> dict[str, Any]:
    for name in ("bundle.json", "export.json"):
        if (path / name).is_file():
            return describe(path / name)
    what = f"{path} is a folder without bundle.json or export.json"
    raise LongtakeError(what, expected=KNOWN, fix="name a file in it")


def describe_plan(path: Path) -> dict[str, Any]:
    """Facts about a plan from the manifest beside it; the plan itself, being executable code, is never loaded.

    Raises:
        IntegrityError: the manifest is none, or the plan is not the one it describes.
    """
    beside = manifest_path(path)
    if not beside.is_file():
        note = f"none ({beside.name} is not beside it); a plan is executable code and is not opened to look inside"
        return {"kind": "TensorRT plan", "manifest": note}
    manifest = PlanManifest.read(path)
    got = sha256(path)
    if got != manifest.sha256 or path.name != manifest.plan:
        raise IntegrityError(
            f"{path} is not the plan that {beside.name} describes",
            got=f"{path.name}, sha256 {got}",
            expected=f"{manifest.plan}, sha256 {manifest.sha256}",
            fix="build it again (longtake engines); never load a plan that fails this",
        )
    return {"kind": "TensorRT plan", "digest": "matches the manifest", "manifest": asdict(manifest)}


def describe_exported(path: Path) -> dict[str, Any]:
    """Facts about an ONNX file, whose digest must be the one in an export.json beside it.

    Raises:
        IntegrityError: it is not whole, or not the file that was exported under its name.
    """
    export = Export.find(path.parent)
    expected = export.digests if export else {}
    for name in (path.name, f"{path.name}.data"):
        file = path.parent / name
        if name in expected and file.is_file() and (got := sha256(file)) != expected[name]:
            raise IntegrityError(
                f"{file} is not the file that was exported under its name",
                got=f"sha256 {got}",
                expected=f"sha256 {expected[name]}, as export.json says",
                fix="longtake export --force",
            )
    return {**describe_onnx(path), "digest": "matches export.json" if path.name in expected else "not given"}


def describe_tensors(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint, or about a saved session, which is a safetensors file as well."""
    with tensors_in(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != SESSION_FORMAT:
        return describe_safetensors(path)
    snapshot = snapshot_from_file(path)
    sizes = {name: list(tensor.shape) for name, tensor in snapshot.tensors.items()}
    which = {"identity": asdict(snapshot.identity), "position": snapshot.position.as_json()}
    return {"kind": "saved session", "digest": "matches", **which, "tensors": sizes}


def describe_json(path: Path) -> dict[str, Any]:
    """The content of one of the pipeline's JSON files, with its kind."""
    content = read_json(path)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "count" in content[0]:
        return {"kind": "profile", "content": content}
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds no description", got=type(content).__name__, expected=KNOWN)
    kind = next((kind for kind, keys in JSON_KINDS if all(key in content for key in keys)), None)
    if kind is None:
        raise IntegrityError(f"{path} is JSON of no known kind", got=", ".join(content) or "{}", expected=KNOWN)
    return {"kind": kind, "content": content}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".plan": describe_plan,
    ".onnx": describe_exported,
    ".safetensors": describe_tensors,
    ".json": describe_json,
}
