"""Tensors on disk by key, in safetensors files of a few dozen: written whole or not at all, read through mmap.

A file's name is the digest of its keys, so processes that share a folder never overwrite each other's. It says each
tensor's checksum, too: what was damaged later is found when it is read.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import IntegrityError
from longtake.files import atomic_path
from longtake.tensor_file import tensors_in

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
SHARD_TENSORS = 64


def key_of(*parts: object) -> str:
    """A key for what `parts` (of plain values) describe."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a CPU tensor's bytes."""
    return f"{zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data):08x}"


class Shards:
    """The tensors of a folder. `add` gathers, and `flush` (or leaving the context) writes what was gathered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}
        self._gathered: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder again; files that cannot be read are named and left out, so their tensors are made anew."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with tensors_in(path) as file:
                    self.places |= dict.fromkeys(file.keys(), path)
            except IntegrityError as error:
                logger.warning("%s cannot be read and is left out: %s", path, error.got)

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self._gathered

    def __len__(self) -> int:
        return len(self.places) + len(self._gathered)

    def __getitem__(self, key: str) -> Tensor:
        """The tensor under `key`, on the CPU.

        Raises:
            KeyError: there is none.
            IntegrityError: its file was damaged or deleted meanwhile.
        """
        if key in self._gathered:
            return self._gathered[key]
        path = self.places[key]
        again = "delete it and start again: it is made anew"
        with tensors_in(path, "can no longer be read", again) as file:
            tensor, sums = file.get_tensor(key), file.metadata() or {}
        if key in sums and sums[key] != checksum(tensor):
            raise IntegrityError(
                f"{path} is damaged", got=f"checksum {checksum(tensor)} of {key}", expected=sums[key], fix=again
            )
        return tensor

    def leave_out(self, key: str) -> None:
        """Delete the file that holds `key`, which is damaged, and forget all that is in it."""
        path = self.places[key]
        path.unlink(missing_ok=True)
        self.places = {key: place for key, place in self.places.items() if place != path}

    def add(self, key: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor` under `key`."""
        self._gathered[key] = tensor.detach().to("cpu", copy=True).contiguous()
        size = sum(kept.nbytes for kept in self._gathered.values())
        if size >= SHARD_BYTES or len(self._gathered) >= SHARD_TENSORS:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._gathered:
            return
        path = self.folder / f"{key_of(*sorted(self._gathered))}.safetensors"
        with atomic_path(path) as partial:
            save_file(self._gathered, partial, {key: checksum(x) for key, x in self._gathered.items()})
        self.places |= dict.fromkeys(self._gathered, path)
        self._gathered = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
