"""Encoded stories on disk: made once by as many processes as there are, read ahead by workers, taken in epochs.

A latent's key is the digest of what its story shows; its folder is named after the VAE. So another run, another length
of run or another seed finds what was encoded before, and a changed clip or VAE is encoded anew. A build that was cut
off goes on where it stopped.

Legend: S stories, N chunks, F = N * chunk latents frames, E text length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from longtake.training.data.base import Dataset, Take
from longtake.training.data.facts import facts_from_file
from longtake.training.data.folder import Folder
from longtake.training.data.latent_cache import EncodedStories, encode, histories, tokens_of
from longtake.training.data.loader import Loader, read_in_order
from longtake.training.data.order import Order
from longtake.training.data.shards import Shards
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.objective.teacher_forcing import Clips

FACTS = "clips.json"  # in the cache's folder: what was found out about the clips


@dataclass(frozen=True)
class Takes:
    """Stories 0, 1, … of a data set as items of a loader; those whose key is in `known` come without pictures."""

    dataset: Dataset
    seed: int
    chunks: int
    known: Collection[str] = frozenset()

    def __getitem__(self, index: int) -> Take:
        return self.dataset.take(index, self.seed, self.chunks, self.known)


@dataclass(frozen=True)
class StoredLatents:
    """Items (index, latents [F,C,H,W]) of a loader."""

    shards: Shards
    keys: list[str]

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.shards[self.keys[index]]


@dataclass
class StoredStories(EncodedStories):
    """Stories whose latents stay on disk; `take` goes through them in epochs. cuts are on the host, the rest on the device."""

    stored: StoredLatents
    loader: Loader
    batch_name: str = ""

    def clips(self, index: Tensor, chunks: int) -> Clips:
        """The first `chunks` chunks of stories `index`; the order is not moved on."""
        return self._clips([self.stored[i] for i in index.tolist()], chunks)

    def take(self, count: int, chunks: int) -> Clips:
        """The first `chunks` chunks of the next `count` stories in order."""
        taken = self.loader.take(count)
        self.batch_name = f"stories {[index for index, _ in taken]}"
        return self._clips(taken, chunks)

    def _clips(self, taken: list[tuple[int, Tensor]], chunks: int) -> Clips:
        device = self.tokens.device
        index = torch.tensor([i for i, _ in taken], device=device)
        latents = torch.stack([latents[: chunks * self.preset.chunk_latents] for _, latents in taken])
        return self.clips_of(latents.to(device, non_blocking=True), index, chunks)

    def position(self) -> dict[str, Any]:
        """The place in the data, JSON-ready: the same for any number of ranks and workers."""
        order = self.loader.order
        return {"taken": self.loader.position, "stories": order.items, "seed": order.seed}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from what `position` gave; of another number of stories or seed, from the start."""
        order = self.loader.order
        same = (position.get("stories"), position.get("seed")) == (order.items, order.seed)
        self.loader.seek(int(position["taken"]) if same else 0)


def stored_from_dataset(
    dataset: Dataset,
    vae: CausalVAE,
    vae_digest: str,
    text: AnyTextEncoder,
    preset: Preset,
    *,
    cache_dir: Path,
    stories: int,
    chunks: int,
    context: str,
    seed: int,
    workers: int = 0,
    what: str = "stories",
) -> StoredStories:
    """Encode what is missing of `stories` stories of `chunks` chunks on the VAE's device, and open them all.

    Several ranks may do it at once, in the same folder or in one of each host: all see the same stories missing or not.

    Raises:
        LongtakeError: no story can be made, or too many clips are broken (see `data.folder.Folder`).
    """
    device = next(vae.parameters()).device
    if isinstance(dataset, Folder):
        dataset.facts.merge(facts_from_file(cache_dir / FACTS))
        dataset.share_memory(max(1, workers))
    kind = "bf16" if device.type == "cuda" else "fp32"
    shards = Shards(cache_dir / "latents" / f"{preset.name}-{vae_digest[:16]}-{kind}")
    if dist.is_initialized():
        dist.barrier()  # ranks may encode a story together: nobody writes before all have looked
    takes = list(_encoded(dataset, vae, shards, range(stories), seed, chunks, workers, f"encode {what}"))
    if isinstance(dataset, Folder):
        dataset.facts.save(cache_dir / FACTS)
    prompts = [prompt for take in takes for prompt in take.prompts]
    tokens = tokens_of(text, prompts, dataset).unflatten(0, (-1, chunks)).to(device)
    cuts = [take.cuts for take in takes]
    history, offsets = histories(cuts, chunks, context, preset, device)
    stored = StoredLatents(shards, [take.key for take in takes])
    loader = Loader(stored, Order(stories, seed), workers)
    return StoredStories(preset, tokens, history, offsets, torch.tensor(cuts), stored, loader)


def _encoded(
    dataset: Dataset, vae: CausalVAE, shards: Shards, share: range, seed: int, chunks: int, workers: int, what: str
) -> Iterator[Take]:
    """The stories of a share without their pictures, after what is missing was encoded into `shards`."""
    source = Takes(dataset, seed, chunks, frozenset(shards.places))
    with shards, tqdm(total=len(share), unit="story", desc=what, dynamic_ncols=True) as bar:
        for take in read_in_order(source, share, workers):
            if isinstance(dataset, Folder):
                dataset.learn(take.facts)
            if take.frames is not None and take.key not in shards:
                shards.add(take.key, encode(vae, video_from_frames(take.frames, vae))[0])
            yield Take(take.key, None, take.prompts, take.cuts, take.facts)
            bar.update()


def video_from_frames(frames_THWC: np.ndarray, vae: CausalVAE) -> Tensor:
    """uint8 [T,H,W,3] to fp32 [1,3,T,H,W] in [-1,1] on the VAE's device."""
    frames = torch.from_numpy(frames_THWC).to(next(vae.parameters()).device)
    return frames.permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1).contiguous()
