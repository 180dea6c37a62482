"""A checkpoint pair written one tensor after the other, so that memory holds one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from longtake.files import atomic_path, write_json
from longtake.training.convert.pending import Converted, Pending, made
from longtake.training.models.checkpoint import FORMAT, side_file, versions

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_checkpoint(path: Path, model: Converted, progress: Callable[[int], object] = lambda done: None) -> None:
    """Write `model` and its side file as `training.checkpoint.save_checkpoint` does, each whole or not at all.

    progress: called with the bytes of each tensor written.

    Raises:
        IntegrityError: a tensor is not finite; nothing stands under `path` that wasn't there before.
    """
    names = sorted(
        model.tensors, key=lambda name: (-model.tensors[name].dtype.itemsize, name)
    )  # so that each is aligned
    digest = hashlib.sha256()
    with atomic_path(path) as partial:
        with open(partial, "wb") as out:
            head = header({name: model.tensors[name] for name in names})
            digest.update(head)
            out.write(head)
            for name in names:
                content = made(name, model.tensors[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(content)
                out.write(content)
                progress(content.nbytes)
                del content
        meta = {"format": FORMAT, "kind": model.kind, "preset": model.preset, **model.meta}
        write_json(side_file(path), {**meta, "sha256": digest.hexdigest(), "versions": versions()})


def header(tensors: dict[str, Pending]) -> bytes:
    """The head of a safetensors file that holds `tensors` in this order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        place = [offset, offset + tensor.nbytes]
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
