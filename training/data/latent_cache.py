"""Stories rendered once and encoded by a frozen VAE: what the DiT trains on, kept in device memory.

Legend: S stories, N chunks, F = N * chunk latents frames, E text length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.paths import REPOSITORY
from longtake.training.data.base import Batch, Dataset
from longtake.training.models.checkpoint import load_into, side_file
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import AnyTextEncoder, TextEncoder
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.window import full_history, shot_offsets, window_history
from longtake.training.objective.teacher_forcing import Clips


@dataclass
class EncodedStories:
    """tokens int32 [S, N, E], history bool [S or 1, N, N], offsets int64 [S, N] or None: see `teacher_forcing.Clips`.
    cuts bool [S, N]: where a shot begins.

    Without offsets the context is full, and one history holds for all stories."""

    preset: Preset
    tokens: Tensor
    history: Tensor
    offsets: Tensor | None
    cuts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def unmasked(self, chunks: int) -> int:
        """Blocks before this number see everything before them in every story of `chunks` chunks."""
        return chunks if self.offsets is None else self.preset.window_chunks

    def clips_of(self, latents: Tensor, index: Tensor, chunks: int) -> Clips:
        """The first `chunks` chunks of stories `index`, whose latents are given."""
        history = self.history[:, :chunks, :chunks]
        return Clips(
            latents=latents.float(),
            tokens=self.tokens[index, :chunks],
            history=history[0] if self.offsets is None else history[index],
            unmasked=self.unmasked(chunks),
            offsets=None if self.offsets is None else self.offsets[index, :chunks],
        )


@dataclass
class LatentCache(EncodedStories):
    """Stories whose latents [S, F, C, H, W] (bf16 on a GPU, else fp32) are in memory."""

    latents: Tensor

    def clips(self, index: Tensor, chunks: int) -> Clips:
        """The first `chunks` chunks of stories `index`."""
        return self.clips_of(self.latents[index, : chunks * self.preset.chunk_latents], index, chunks)


def vae_checkpoint(preset: Preset, folder: Path | None, start: Path | None = None) -> Path:
    """The VAE of a folder; if None, the one beside the DiT that is started from, if any; else the shipped one."""
    beside = start is not None and (start / "vae.safetensors").is_file()
    return (folder or (start if beside else None) or REPOSITORY / preset.checkpoints) / "vae.safetensors"


def vae_mismatch(start: Path, vae: Path, digest: str) -> LongtakeError | None:
    """An error if the DiT in `start` says that it was made with another VAE than the one in `vae`."""
    side = side_file(start / "dit.safetensors")
    known = read_json(side).get("vae_sha256") if side.is_file() else None
    if known in (None, digest):
        return None
    return LongtakeError(
        f"the DiT in {start} was trained on latents of another VAE",
        got=f"{vae}, sha256 {digest[:16]}…",
        expected=f"the VAE of sha256 {str(known)[:16]}…",
        fix="pass the folder of that VAE with --vae",
    )


def frozen_vae(path: Path, preset: Preset, device: torch.device) -> tuple[Any, str]:
    """A trained VAE and its digest."""
    vae = family_of(preset).vae(preset)
    side = load_into(vae, path, kind="vae", preset=preset)
    return vae.requires_grad_(False).eval().to(device), side.sha256


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """Normalized latents [B, F, C, H, W] of video fp32 [B, 3, T, H, W]; bf16 convolutions on a GPU."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        return vae.encode(video).to(torch.bfloat16 if video.is_cuda else torch.float32)


def batches(dataset: Dataset, stories: int, chunks: int, seed: int, device: torch.device, what: str) -> Iterator[Batch]:
    """`stories` stories of `chunks` chunks in batches that fit the device, under a progress bar."""
    generator = torch.Generator().manual_seed(seed)
    size = 16 if device.type == "cuda" else 2
    with tqdm(total=stories, unit="story", desc=f"encode {what}", dynamic_ncols=True) as bar:
        for start in range(0, stories, size):
            count = min(size, stories - start)
            yield dataset.sample(generator, chunks, count, device)
            bar.update(count)


def cache_from_dataset(
    dataset: Dataset,
    vae: CausalVAE,
    text: AnyTextEncoder,
    preset: Preset,
    *,
    stories: int,
    chunks: int,
    context: str,
    seed: int,
    what: str = "stories",
) -> LatentCache:
    """Render, encode and tokenize `stories` stories of `chunks` chunks on the VAE's device.

    context: "full" (the reference's history and positions) or "window" (the runtime's window and shot offset).
    """
    require_context(context)
    device = next(vae.parameters()).device
    latents, prompts, cuts = [], [], []
    for batch in batches(dataset, stories, chunks, seed, device, what):
        latents.append(encode(vae, batch.video))
        prompts += [prompt for story in batch.prompts for prompt in story]
        cuts += batch.cuts
    tokens = tokens_of(text, prompts, dataset).unflatten(0, (-1, chunks)).to(device)
    history, offsets = histories(cuts, chunks, context, preset, device)
    return LatentCache(preset, tokens, history, offsets, torch.tensor(cuts), torch.cat(latents))


def tokens_of(text: AnyTextEncoder, prompts: list[str], dataset: Dataset) -> Tensor:
    """Token ids of a data set's prompts, int32 [P, E].

    Raises:
        LongtakeError: most of their words are unknown to a small text encoder, and they are not held out.
    """
    held_out = getattr(dataset, "split", "train") == "eval"
    with text.tokenizer.taking_all() if held_out and isinstance(text, TextEncoder) else nullcontext():
        return text.tokenize(prompts)


def histories(
    cuts: list[list[bool]], chunks: int, context: str, preset: Preset, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which clean chunks each chunk of stories sees, bool [S or 1, N, N], and its offset, int64 [S, N] or None.

    context: "full" (the reference's history and positions) or "window" (the runtime's window and shot offset).
    """
    require_context(context)
    if context == "full":
        return full_history(chunks)[None].to(device), None
    history = torch.stack([window_history(story, preset.window_chunks) for story in cuts]).to(device)
    return history, torch.tensor([shot_offsets(story, preset.shot_rope_offset) for story in cuts], device=device)


def require_context(context: str) -> None:
    """Raise LongtakeError unless it is one that `histories` knows."""
    if context not in ("full", "window"):
        raise LongtakeError("unknown context", got=context, expected="full or window", fix="--context window")
