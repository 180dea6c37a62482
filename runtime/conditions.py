"""What a chunk is conditioned on: prompt, timesteps, positions, noise. Worked out on the host, then moved once.

Legend: F latent frames of a chunk, C channels, E text length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from longtake.runtime.backends.base import Backend
from longtake.training.models.noise import noise_for_chunk
from longtake.training.models.wan.positions import frame_positions
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid

MOST_EMBEDDINGS = 16  # prompts whose text embeddings are kept, in host memory: 8 MB each for the 5B model

Tokenize = Callable[[list[str], int], Tensor]


@dataclass(frozen=True)
class Conditions:
    """Tensors of one chunk. context and negative: each layer's cross-attention K and V (negative: only under CFG)."""

    context: list[Tensor]
    negative: list[Tensor] | None
    rope_cos: Tensor
    rope_sin: Tensor
    noise_BCFHW: Tensor


class Conditioner:
    """Builds a session's conditions; keeps the last prompt's context and the constant tensors on the device."""

    def __init__(
        self, backend: Backend, tokenize: Tokenize, seed: int, negative_prompt: str | None, timesteps: Sequence[int]
    ) -> None:
        self.backend, self.tokenize, self.seed, self.negative_prompt = backend, tokenize, seed, negative_prompt
        self._sinusoids = {(t, clean): self._sinusoid(t, clean) for t in (*timesteps, 0) for clean in (0, 1)}
        self._kept: dict[str, list[Tensor]] = {}
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def for_chunk(self, chunk: int, shot: int, prompt: str) -> Conditions:
        """Conditions of chunk `chunk` in shot `shot`; `prompt` is the text to encode."""
        preset, device = self.backend.preset, self.backend.device
        context, negative = self._contexts(prompt)
        cos, sin = rope_tables(preset.dit, frame_positions(preset, chunk, shot), preset.grid_hw)
        noise = noise_for_chunk(preset, self.seed, chunk).transpose(1, 2).contiguous()
        return Conditions(context, negative, cos.to(device), sin.to(device), noise.to(device))

    def sinusoid(self, timestep: int, clean_frames: int = 0) -> Tensor:
        """The embedding input fp32 [F, freq_dim] of a pass at `timestep`, whose first `clean_frames` (0 or 1) are clean."""
        return self._sinusoids[timestep, clean_frames]

    def forget(self) -> None:
        """Drop everything that is kept of prompts."""
        self._kept.clear()
        self._embeddings.clear()

    def _contexts(self, prompt: str) -> tuple[list[Tensor], list[Tensor] | None]:
        """Encode what is not kept already; keep these prompts only (a large model's context is large)."""
        wanted = [prompt] if self.negative_prompt is None else [prompt, self.negative_prompt]
        # What is not needed goes first: at no time are there more contexts on the device than one chunk has.
        self._kept = {text: self._kept[text] for text in wanted if text in self._kept}
        for text in wanted:
            if text not in self._kept:
                self._kept[text] = self.backend.context(self._embedding(text))
        negative = None if self.negative_prompt is None else self._kept[self.negative_prompt]
        return self._kept[prompt], negative

    def _embedding(self, prompt: str) -> Tensor:
        """Text embeddings of `prompt` on the device; those of the last MOST_EMBEDDINGS prompts are not computed again."""
        if prompt not in self._embeddings:
            tokens = self.tokenize([prompt], self.backend.preset.text.length).to(self.backend.device)
            self._embeddings[prompt] = self.backend.text(tokens).to("cpu", copy=True)
            if len(self._embeddings) > MOST_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt].to(self.backend.device)

    def _sinusoid(self, timestep: int, clean_frames: int) -> Tensor:
        preset = self.backend.preset
        times = [0.0] * clean_frames + [float(timestep)] * (preset.chunk_latents - clean_frames)
        return timestep_sinusoid(times, preset.dit.freq_dim).to(self.backend.device)
