"""One measurement of `training.parallel.bench`, on every rank: iterations of one mode at one length.

Weights, latents, prompts and pixels are random and made on the device. An iteration is what training does with a clip
that isn't cached: VAE encode, forward and backward pass with gradient checkpointing, AdamW on the sharded weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from longtake.training.data.base import chunk_frames
from longtake.training.dit import CausalDiT
from longtake.training.flex import flex_attention_for
from longtake.training.parallel.forcing import attention, part_loss, part_of, part_velocity
from longtake.training.parallel.halo import Window, encode_window, evened, halo_needed, share, window_of
from longtake.training.parallel.layout import NONE, Layout
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import shard_dit
from longtake.training.presets import Preset
from longtake.training.report import peak_memory
from longtake.training.teacher_forcing import Clips, draw_noise
from longtake.training.vae import CausalVAE
from longtake.training.window import full_history


@dataclass(frozen=True)
class Case:
    """What to measure. halo: "even" gives all ranks as many latents to encode, "equal" to keep (the reference's).
    attention: "blocks" (`attend_seen`) or "flex"."""

    mode: str
    chunks: int
    iterations: int = 2
    warmup: int = 1
    vae: bool = True
    halo: str = "even"
    attention: str = "blocks"
    bf16: bool = True


@dataclass(frozen=True)
class Found:
    """What one rank found; seconds are medians of the iterations, memory is the peak since the weights were made."""

    rank: int
    iteration_s: float
    vae_s: float
    dit_s: float
    optimizer_s: float
    loss_tokens: int
    tokens: int
    vae_latents: int
    peak_gb: float
    loss: float


class Measurement:
    """Model, data and clock of one case on one rank."""

    def __init__(self, preset: Preset, case: Case, ranks: Ranks) -> None:
        self.preset, self.case, self.ranks = preset, case, ranks
        self.layout = Layout(case.mode, case.chunks, ranks.sequence)
        self.frames, self.cuda = preset.chunk_latents, ranks.device.type == "cuda"
        self.seconds: dict[str, list[float]] = {}
        torch.manual_seed(0)
        with ranks.device:
            self.dit = CausalDiT(preset.dit)
            torch.nn.init.normal_(self.dit.head.head.weight, std=0.02)
        self.dit.checkpointing = True
        shard_dit(self.dit, ranks, bf16=case.bf16)
        self.adamw = torch.optim.AdamW(self.dit.parameters(), lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
        # Every rank of a sequence group draws the same; groups draw different samples
        self.generator = torch.Generator(ranks.device).manual_seed(1 + ranks.my_group)
        self.window = self.vae_window()
        if case.vae:
            dtype = torch.bfloat16 if case.bf16 else torch.float32
            with ranks.device:
                self.vae = CausalVAE(preset.vae).requires_grad_(False).eval().to(dtype)
            shape = (1, 3, self.window.stop - self.window.start, preset.height, preset.width)
            self.pixels = torch.randint(256, shape, dtype=torch.uint8, device=ranks.device, generator=self.generator)
        self.clips = self.random_clips()

    def vae_window(self) -> Window:
        """What this rank encodes: its share of the clip under balanced SP, else all of it."""
        latents, place = self.case.chunks * self.frames, self.ranks.place
        if self.case.mode != "balanced":
            return Window(0, chunk_frames(self.preset, self.case.chunks), 0)
        halo, count = halo_needed(self.preset.vae), self.ranks.sequence
        bounds = evened(latents, count, halo)[place] if self.case.halo == "even" else share(latents, count, place)
        return window_of(*bounds, halo) if bounds[1] > bounds[0] else Window(0, 1, 0)

    def random_clips(self) -> Clips:
        preset, chunks, device = self.preset, self.case.chunks, self.ranks.device
        shape = (1, chunks * self.frames, preset.dit.channels, *preset.latent_hw)
        latents = torch.randn(shape, device=device, generator=self.generator)
        tokens = torch.zeros(1, chunks, preset.dit.text_len, dtype=torch.int32, device=device)
        return Clips(latents, tokens, full_history(chunks).to(device), chunks)

    def embed(self, tokens: Tensor) -> Tensor:
        """Random prompts, [P, E, text_dim]."""
        shape = (*tokens.shape, self.preset.dit.text_dim)
        return torch.randn(shape, device=tokens.device, dtype=torch.bfloat16 if self.case.bf16 else torch.float32)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Seconds until the device is done, under `name`."""
        start = self.now()
        yield
        self.seconds.setdefault(name, []).append(self.now() - start)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def iteration(self) -> Tensor:
        """One training step; returns its loss."""
        self.ranks.wait()
        with self.timed("iteration"):
            with self.timed("vae"):
                if self.case.vae:
                    encode_window(self.vae, self.pixels, self.window, at_once=2)
            self.ranks.wait()  # latents are exchanged here: the slowest rank's encode is what an iteration waits for
            with self.timed("dit"):
                loss = self.loss()
                loss.backward()
            with self.timed("optimizer"):
                self.adamw.step()
                self.adamw.zero_grad(set_to_none=True)
            self.ranks.wait()
        return loss.detach()

    def loss(self) -> Tensor:
        clips, layout, place = self.clips, self.layout, self.ranks.place
        noise = draw_noise(clips, self.preset.sampling.shift, self.generator)
        part = part_of(clips, noise, layout, place, self.frames)
        whole = None
        if self.case.attention == "flex":
            whole = flex_attention_for(clips.history, clips.chunks, self.preset.chunk_tokens, layout.order)
        attend = attention(layout, clips.history, self.ranks.group, whole=whole)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.case.bf16):
            velocity = part_velocity(self.dit, self.preset, self.embed, part, attend)
        return part_loss(velocity, clips, noise, layout, self.ranks, self.frames)[0]

    def run(self) -> Found:
        """Warm up, then measure."""
        loss = torch.zeros(())
        for number in range(self.case.warmup + self.case.iterations):
            if number == self.case.warmup:
                self.seconds.clear()
            loss = self.iteration()
        place, chunk = self.ranks.place, self.preset.chunk_tokens
        middle = {name: sorted(values)[len(values) // 2] for name, values in self.seconds.items()}
        return Found(
            rank=self.ranks.rank,
            iteration_s=middle["iteration"],
            vae_s=middle["vae"],
            dit_s=middle["dit"],
            optimizer_s=middle["optimizer"],
            loss_tokens=len(self.layout.noisy(place)) * chunk,
            tokens=len(self.layout.local(place)) * chunk,
            vae_latents=1 + (self.window.stop - self.window.start - 1) // self.preset.vae.stride[0],
            peak_gb=peak_memory(self.ranks.device)["peak_gb"],
            loss=float(loss),
        )


def measure(preset: Preset, case: Case, ranks: Ranks) -> dict[str, object]:
    """Run a case; JSON-ready, of this rank."""
    return asdict(Measurement(preset, case, ranks).run())


def sized(preset: Preset, layers: int | None, height: int | None, width: int | None) -> Preset:
    """The preset with another depth or size."""
    return replace(
        preset,
        dit=replace(preset.dit, layers=layers or preset.dit.layers),
        height=height or preset.height,
        width=width or preset.width,
    )


def sequence_of(mode: str, ranks: int) -> int:
    """Ranks that share a sample in a mode."""
    return 1 if mode == NONE else ranks
