"""Embeddings of prompts on disk, beside the encoded stories: a frozen text encoder reads every prompt once.

A key is the digest of a prompt's token ids, which is all that an encoder sees of it; the folder is named after the
encoder's digest. So another run, or distillation after training, finds what was encoded before, and with another
encoder everything is encoded anew. Rows of padding, which come out zero, are not stored.

Legend: P prompts, R rows of tokens, E text length, U prompts that differ.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from longtake.errors import IntegrityError
from longtake.training.data.shards import Shards, key_of
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder

logger = logging.getLogger(__name__)

RESIDENT_BYTES = 1 << 30  # a table of all embeddings up to this size stays on the device
BATCH = 16


@dataclass(frozen=True)
class Known:
    """A table of embeddings on the device: hashes int64 [U], ascending, and table [U, E, dim] in their order."""

    hashes: Tensor
    table: Tensor

    def __call__(self, found: Tensor) -> Tensor:
        """Embeddings of rows with these hashes, without the host waiting: NaN where one isn't known."""
        place = torch.searchsorted(self.hashes, found).clamp(max=len(self.hashes) - 1)
        known = (self.hashes[place] == found)[:, None, None]
        return self.table[place].float().where(known, torch.nan)


class CachedText:
    """tokens int32 [P, E] -> what the encoder makes of them, fp32 [P, E, dim] on the tokens' device.

    `resident`: looked up on the device, which CUDA graphs can capture; otherwise read from disk, for which the host
    waits. A prompt outside the cache is NaN, or a KeyError.
    """

    def __init__(self, shards: Shards, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shards, self.dim, self.dtype, self.device = shards, dim, dtype, device
        self.known: Known | None = None

    @property
    def resident(self) -> bool:
        return self.known is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.known is not None:
            return self.known(row_hash(tokens))
        read = torch.stack([self.read(row) for row in tokens.cpu()])
        return read.to(tokens.device, non_blocking=True).float()

    def read(self, row: Tensor) -> Tensor:
        """One prompt's embedding [E, dim] from disk."""
        words = length(row)
        found = self.shards[row_key(row)] if words else torch.zeros(0, self.dim, dtype=self.dtype)
        return functional.pad(found, (0, 0, 0, len(row) - words))

    def keep_on_device(self, rows: Tensor) -> None:
        """Read all `rows` int32 [U, E] at once, for lookups without the disk."""
        hashes, order = row_hash(rows).sort()
        table = torch.stack([self.read(rows[i]) for i in order.tolist()])
        self.known = Known(hashes.to(self.device), table.to(self.device))


def digest_of_state(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, for an encoder that no checkpoint describes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def row_hash(tokens: Tensor) -> Tensor:
    """A 64-bit hash of each row of int [P, E], int64 [P], the same on every device; padding at the end counts, too."""
    generator = torch.Generator().manual_seed(tokens.shape[-1])
    factors = torch.randint(-(2**62), 2**62, tokens.shape[-1:], generator=generator) | 1
    return (tokens.long() * factors.to(tokens.device)).sum(-1)  # wraps around


def length(row: Tensor) -> int:
    """Tokens of a prompt before its padding."""
    words = row.nonzero()
    return int(words[-1]) + 1 if len(words) else 0


def row_key(row: Tensor) -> str:
    """The key of one prompt's tokens."""
    return key_of(row[: length(row)].tolist())


def different(tokens: Tensor) -> Tensor:
    """The rows of int [R, E] that differ, and the empty prompt, on the CPU."""
    rows = torch.cat((tokens.cpu(), torch.zeros_like(tokens[:1], device="cpu")))
    _, inverse = row_hash(rows).unique(return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(rows)).scatter_reduce(
        0, inverse, torch.arange(len(rows)), "amin", include_self=True
    )
    return rows[first.sort().values]


def embeddings_from_cache(
    text: AnyTextEncoder,
    digest: str,
    tokens: Tensor,
    preset: Preset,
    *,
    cache_dir: Path,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    bf16: bool,
) -> CachedText:
    """Embeddings of all rows of `tokens` [R, E] (and of the empty prompt), encoding what is missing on `device`.

    Several ranks may do it at once, in the same folder or in one of each host. `text` is moved to the device only if
    there is something to encode, and back again when ranks don't share it.

    Args:
        digest: of the encoder's checkpoint. bf16: compute and keep bf16, as everything after it would round to anyway.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    shards = Shards(Path(cache_dir) / "text" / f"{preset.name}-{digest[:16]}-{'bf16' if bf16 else 'fp32'}")
    cached = CachedText(shards, preset.text.dim, dtype, device)
    rows = different(tokens)
    wanted = {key: row for row in rows if length(row) for key in (row_key(row),)}

    @torch.no_grad()
    def encode(found: Tensor) -> Tensor:
        with autocast():
            return text.to(device)(found.to(device)).to(dtype)

    resident = len(rows) * preset.text.length * preset.text.dim * dtype.itemsize <= RESIDENT_BYTES
    if resident:
        _leave_out_damaged(shards, wanted)
    if dist.is_initialized():
        dist.barrier()  # nobody writes before all have looked
        missing = [key for key in wanted if key not in shards]
        _encode_rows(encode, shards, wanted, missing[dist.get_rank() :: dist.get_world_size()])
        dist.barrier()
        shards.refresh()
    _encode_rows(encode, shards, wanted, [key for key in wanted if key not in shards])
    if resident:
        cached.keep_on_device(rows)
    if not dist.is_initialized():
        text.to("cpu")
    return cached


def _leave_out_damaged(shards: Shards, keys: Collection[str]) -> None:
    for key in keys:
        try:
            if key in shards:
                shards[key]
        except IntegrityError as error:
            logger.warning("%s: %s; its prompts are encoded again", error.what, error.got)
            shards.leave_out(key)


def _encode_rows(
    encode: Callable[[Tensor], Tensor], shards: Shards, wanted: dict[str, Tensor], keys: list[str]
) -> None:
    if not keys:
        return
    with shards, tqdm(total=len(keys), unit="prompt", desc="encode prompts", dynamic_ncols=True) as bar:
        for start in range(0, len(keys), BATCH):
            own = keys[start : start + BATCH]
            rows = torch.stack([wanted[key] for key in own])
            for key, row, embedding in zip(own, rows, encode(rows)):
                shards.add(key, embedding[: length(row)])
            bar.update(len(own))
