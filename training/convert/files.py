"""Model files to mapped tensors, without ever running what a file holds: safetensors, .pt/.pth, sharded folders.

Nothing is copied: every tensor is a view of a mapped file, so reading costs address space, not memory.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json
from longtake.formats.model_name import HUB_ID, hub_error
from longtake.tensor_file import read_tensors

TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
AGAIN = "get the file again; compare its size with the published one"
# Where a model lies in the published folders: diffusers' subfolder, then Wan's own file.
PLACES = {
    "dit": ("transformer", "sana_dit", "dit"),
    "vae": ("vae", "Wan2.2_VAE.pth"),
    "text_encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
}


def read_container(path: Path, kind: str = "dit") -> dict[str, Any]:
    """What the file or folder `path` holds: name -> tensor, or for .pt files possibly nested dicts and other values.

    A folder may be a whole published model, of which `kind`'s part is read.

    Raises:
        LongtakeError: nothing there, or of an unknown kind.
        IntegrityError: damaged, truncated, a shard missing, or holding objects that only unpickling would give.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, kind)
    if not path.is_file():
        named = HUB_ID.fullmatch(str(path)) and path.suffix not in {".safetensors", *TORCH_SUFFIXES}
        fix = hub_error(str(path)).fix if named and not path.parent.exists() else "check the path"
        raise LongtakeError(f"{path} does not exist", expected="a .safetensors, .pt or .pth file, or a folder", fix=fix)
    if path.stat().st_size == 0:
        raise IntegrityError(f"{path} is empty", got="0 bytes", fix=AGAIN)
    if path.suffix.lower() == ".safetensors":
        return dict(_read_safetensors(path))
    if path.suffix.lower() in TORCH_SUFFIXES:
        return _read_torch(path)
    what, expected = f"{path} is not a weights file", f".safetensors, {', '.join(sorted(TORCH_SUFFIXES))}"
    raise LongtakeError(what, got=f"suffix {path.suffix!r}", expected=expected, fix="pass the weights file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, f"is truncated or not safetensors, {path.stat().st_size} bytes", AGAIN)


def _read_torch(path: Path) -> dict[str, Any]:
    with open(path, "rb") as source:
        if source.read(2) != b"PK":
            what = f"{path} is not a torch file that can be mapped"
            expected, fix = "a file that torch >= 1.6 saved", f"{AGAIN}; an old file: load and torch.save it again"
            raise IntegrityError(what, got="no zip archive: damaged, or of torch < 1.6", expected=expected, fix=fix)
    try:
        found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        objects = re.findall(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        raise IntegrityError(
            f"{path} holds more than tensors, which would run code when opened",
            got=", ".join(objects[:3]) or str(error).splitlines()[0][:200],
            expected="tensors, dicts, lists and numbers",
            fix="where you trust it, save its state dict alone: safetensors.torch.save_file(state_dict, 'model.safetensors')",
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        got = f"{path.stat().st_size} bytes: {str(error).splitlines()[0][:200]}"
        raise IntegrityError(f"{path} is truncated or damaged", got=got, fix=AGAIN) from None
    if not isinstance(found, dict):
        what, expected = f"{path} is not a state dict", "a dict of tensors"
        raise IntegrityError(what, got=type(found).__name__, expected=expected, fix="pass the file of the weights")
    return found


def _read_folder(folder: Path, kind: str) -> dict[str, Any]:
    for place in PLACES.get(kind, ()):
        if (folder / place).exists():
            return read_container(folder / place, kind)
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return dict(_read_shards(indices[0]))
    files = indices or [p for p in sorted(folder.iterdir()) if p.suffix.lower() in {".safetensors", *TORCH_SUFFIXES}]
    if len(files) != 1 or indices:
        raise LongtakeError(
            f"cannot tell which file of {folder} is the model",
            got=", ".join(p.name for p in files[:6]) or "no weights file",
            expected="one weights file, or one *.index.json with its shards",
            fix="pass the file itself",
        )
    return read_container(files[0], kind)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that the weight map of `index` names, from the shards beside it."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise IntegrityError(
            f"{index} is not the index of a sharded model", expected='"weight_map": key to file', fix=AGAIN
        )
    shards = sorted(set(names.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise IntegrityError(
            f"{index} names a file outside its folder", got=outside[0], expected="plain file names", fix=AGAIN
        )
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        what = f"{index.parent} lacks {len(missing)} of {len(shards)} shards"
        expected = f"every file that {index.name} names"
        raise IntegrityError(what, got=f"no {', '.join(missing)}", expected=expected, fix="download the missing files")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state.update(read_container(index.parent / shard))
    lost = sorted(names.keys() - state.keys())
    if lost:
        what = f"the shards of {index.parent} lack {len(lost)} tensors that {index.name} names"
        raise IntegrityError(what, got=", ".join(lost[:10]), fix=AGAIN)
    return state
