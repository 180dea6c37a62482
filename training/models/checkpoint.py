"""Checkpoints: a safetensors file and its side file (side_file.py); whole or absent, never loaded by half."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError, LongtakeError, some
from longtake.files import atomic_path, sha256
from longtake.paths import REPOSITORY
from longtake.provenance import versions
from longtake.tensor_file import read_tensors
from longtake.training.models.presets import PRESETS, Preset
from longtake.training.models.safetensors_stream import Shaped, write_tensors
from longtake.training.models.side_file import KIND, SideFile

PACKAGES = ("torch", "nvidia-modelopt")  # whose versions a checkpoint's numbers depend on
PICKLE_MAGIC = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
RETRAIN = KIND.remake


def side_file(path: Path) -> Path:
    """The JSON file that belongs to a checkpoint."""
    return path.with_suffix(".json")


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Shaped],
    side: SideFile,
    make: Callable[[str], Tensor] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write `tensors`, one after the other, and `side` with their digest and our versions: a crash at any moment leaves
    the old pair or the new one.

    The new side file waits beside the old one until the tensors have their final name; `finish_save` ends a save that
    was cut off between the two renames.

    make: makes the tensor of a name where `tensors` knows only its shape and dtype. progress: called with the bytes of
    each tensor written.
    """
    content = make or cast(Mapping[str, Tensor], tensors).__getitem__
    with atomic_path(path) as partial:
        with open(partial, "wb") as out:
            digest = write_tensors(out, tensors, content, progress)
        convs = side.convs if side.convs is not None and side.convs.weights == digest else None  # of these very weights
        replace(side, sha256=digest, versions=versions(PACKAGES), convs=convs).write(pending_side_file(path))
    _put_in_place(pending_side_file(path), side_file(path))


def weights_digests(folder: Path) -> dict[str, str]:
    """Digests of the DiT and the VAE in `folder`, by kind, as their side files tell them: whose state a video's is."""
    sides = {kind: side_file(folder / f"{kind}.safetensors") for kind in ("dit", "vae")}
    return {kind: SideFile.read(path).sha256 for kind, path in sides.items() if path.is_file()}


def require_targets(folder: Path) -> None:
    """Raise LongtakeError if a link among the files of a folder of checkpoints is to one that is not there."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        if path.is_symlink() and not path.exists():
            what, fix = f"{path} is a link to a file that is not there", "copy the folder with `cp -rL`"
            raise LongtakeError(what, got=os.readlink(path), expected="a file, or a link to one", fix=fix)


def pending_side_file(path: Path) -> Path:
    """Where a checkpoint's new side file waits until its tensors are in place."""
    return path.with_name(f".{path.stem}.json.pending")


def finish_save(path: Path) -> None:
    """Give the pending side file its name if it describes the tensors that are there; else it is of no use yet."""
    pending = pending_side_file(path)
    if not pending.is_file():
        return
    try:
        waiting = SideFile.read(pending)
    except LongtakeError:  # another process has just put it in place, or it is damaged
        return
    if waiting.describes(path):
        _put_in_place(pending, side_file(path))


def _put_in_place(pending: Path, final: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # a reader may have done it already
        os.replace(pending, final)


def read_side_file(path: Path, *, kind: str, preset: str | Preset) -> SideFile:
    """The side file of checkpoint `path`, checked to be of `kind` and `preset` (by its name, or by what it says, too).

    Raises:
        LongtakeError: checkpoint or side file is missing, or it is of another kind or preset.
        IntegrityError: the side file is damaged.
    """
    name = preset if isinstance(preset, str) else preset.name
    if not path.is_file():
        require_targets(path.parent)
        fix = _train_fix(kind, preset, path.parent)
        raise LongtakeError(f"checkpoint {path} does not exist", expected=f"a {kind} checkpoint", fix=fix)
    refuse_pickle(path)
    finish_save(path)
    side = side_file(path)
    if not side.is_file():
        got = f"no {side.name}"
        raise LongtakeError(f"checkpoint {path} has no side file", got=got, expected=str(side), fix=RETRAIN)
    told = SideFile.read(side)
    for key, got, wanted in (("kind", told.kind, kind), ("preset", told.preset, name)):
        if got != wanted and not (key == "preset" and kind == "vae" and _same_vae(told, preset)):
            fix = f"pass a folder whose {path.name} was trained for {key} {wanted!r}"
            raise IntegrityError(f"checkpoint {path} is of another {key}", got=got, expected=wanted, fix=fix)
    own = {} if isinstance(preset, str) else preset.digests
    if kind in own and told.preset_digests.get(kind, own[kind]) != own[kind]:
        what = f"checkpoint {path} is of another preset {name!r}: its {kind} is described otherwise"
        got, expected = f"sha256 {told.preset_digests[kind]}", f"sha256 {own[kind]}"
        raise IntegrityError(what, got=got, expected=expected, fix="give one of the preset files another name")
    return told


def _same_vae(told: SideFile, preset: str | Preset) -> bool:
    """Whether the VAE of another preset is this one's: presets that share it differ in DiT, text encoder or size only."""
    if isinstance(preset, str):
        return False
    shipped = PRESETS.get(told.preset)
    other = shipped.digest_of("vae") if shipped else told.preset_digests.get("vae")
    return other == preset.digest_of("vae")


def require_digest(path: Path, side: SideFile, fix: str = RETRAIN) -> None:
    """Raise IntegrityError unless the file's digest is the one in its side file."""
    digest = sha256(path)
    if digest != side.sha256:
        raise IntegrityError(
            f"checkpoint {path} is not the file its side file describes",
            got=f"sha256 {digest[:16]}…, {path.stat().st_size} bytes",
            expected=f"sha256 {side.sha256[:16]}…",
            fix=fix,
        )


def load_checkpoint(path: Path, *, kind: str, preset: str | Preset) -> tuple[dict[str, Tensor], SideFile]:
    """Tensors and side file of a checkpoint whose digest was verified before anything was parsed.

    Raises:
        LongtakeError: see `read_side_file`.
        IntegrityError: the file is truncated, altered, a pickle, or of another kind or preset.
    """
    path = Path(path)
    side = read_side_file(path, kind=kind, preset=preset)
    require_digest(path, side)
    return read_tensors(path, "is not safetensors", RETRAIN), side


def copy_checkpoint(path: Path, folder: Path) -> None:
    """Copy a checkpoint and its side file into `folder`, each of them whole or not at all."""
    finish_save(path)
    for source in (path, side_file(path)):
        if source.resolve() != (folder / source.name).resolve():
            with atomic_path(folder / source.name) as partial:
                shutil.copyfile(source, partial)


def refuse_pickle(path: Path) -> None:
    """Raise IntegrityError when `path` is a pickle by name or by content: unpickling runs whatever it holds."""
    with open(path, "rb") as source:
        head = source.read(4)
    if path.suffix.lower() in PICKLE_SUFFIXES or head.startswith(PICKLE_MAGIC):
        raise IntegrityError(
            f"{path} is a pickle, which could run code when opened",
            got=f"suffix {path.suffix}, first bytes {head!r}",
            expected="a .safetensors file",
            fix="convert it where you trust it: safetensors.torch.save_file(state_dict, 'model.safetensors')",
        )


def load_into(module: nn.Module, path: Path, *, kind: str, preset: str | Preset) -> SideFile:
    """Load a checkpoint into `module` (casting to its dtypes) and return the side file.

    Nothing is written to the module unless every key and shape fits.

    Raises:
        LongtakeError, IntegrityError: see `load_checkpoint`; also for missing, extra or wrong-shaped keys.
    """
    tensors, side = load_checkpoint(path, kind=kind, preset=preset)
    copy_state(module, tensors, str(path))
    return side


def map_into(module: nn.Module, path: Path, *, kind: str, preset: str | Preset) -> SideFile:
    """Let a module built on the meta device have the checkpoint's tensors as its own, and return the side file.

    The tensors are views of the mapped file, in its dtypes: memory is taken only for what is read, and writing to them
    never reaches the file.

    Raises:
        LongtakeError, IntegrityError: as `load_into`.
    """
    tensors, side = load_checkpoint(path, kind=kind, preset=preset)
    check_state(module, tensors, str(path))
    module.load_state_dict(tensors, assign=True)
    return side


@torch.no_grad()
def copy_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into the module's parameters and buffers, in place, all of them or none."""
    check_state(module, tensors, where)
    for name, tensor in module.state_dict().items():
        tensor.copy_(tensors[name])


def check_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise IntegrityError, listing names, unless `tensors` has exactly the module's keys and shapes."""
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "extra": sorted(tensors.keys() - own.keys()),
        "wrong shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if own[name].shape != tensors[name].shape
        ],
    }
    found = "; ".join(f"{kind}: {some(names, 6)}" for kind, names in problems.items() if names)
    if found:
        raise IntegrityError(
            f"{where} doesn't fit the model",
            got=found,
            expected=f"the {len(own)} tensors of {type(module).__name__}",
            fix="use a checkpoint of the same preset and version",
        )


def _train_fix(kind: str, preset: str | Preset, folder: Path) -> str:
    name = preset if isinstance(preset, str) else preset.name
    if name.startswith("wan"):
        option = {"vae": "--vae", "text_encoder": "--text"}.get(kind, "--dit")
        command = f"longtake convert --preset {name} {option} RELEASED --out {folder}"
        return f"convert it: {command}; or name another folder with --checkpoints"
    stage = "vae" if kind == "vae" else "dit"
    shipped = REPOSITORY / "training" / "checkpoints" / "tiny"
    if not folder.is_dir():
        return f"check the path; the shipped checkpoints are {shipped}"
    return f"name the folder that has it (shipped: {shipped}), or train it: longtake train --stage {stage} --data digits --out runs/{stage}"
