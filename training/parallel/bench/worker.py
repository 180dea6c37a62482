"""One measurement of `training.parallel.bench`, on every rank: iterations of one mode at one length.

Weights, latents, prompts and pixels are random and made on the device. An iteration is what training does with a clip
that isn't cached: VAE encode, forward and backward pass with gradient checkpointing, AdamW on the sharded weights.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from longtake.training.data.base import chunk_frames
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import Attend, CausalDiT
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.window import full_history
from longtake.training.objective.flex import flex_attention_for
from longtake.training.objective.teacher_forcing import Clips, draw_noise
from longtake.training.parallel.attention import Seen, attend_seen
from longtake.training.parallel.forcing import attention, part_loss, part_of, part_velocity
from longtake.training.parallel.halo import Window, encode_window, evened, halo_needed, share, window_of
from longtake.training.parallel.layout import NONE, Layout
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import shard_dit
from longtake.training.report import peak_memory

AT_ONCE = 2  # latents that the encoder takes in one call


@dataclass(frozen=True)
class Case:
    """What to measure. halo: "even" gives all ranks as many latents to encode, "equal" to keep (the reference's).

    attention: "blocks" (`attend_seen`) or "flex". iterations: at most; fewer, but one, where they take longer than
    `allowed_s`. rehearsed: nothing is timed, only `Measurement.rehearse`, which takes as much memory.
    """

    mode: str
    chunks: int
    iterations: int = 3
    warmup: int = 1
    vae: bool = True
    halo: str = "even"
    attention: str = "blocks"
    bf16: bool = True
    allowed_s: float = float("inf")
    rehearsed: bool = False
    fails_on: int | None = None


@dataclass(frozen=True)
class Found:
    """What one rank found; seconds are medians of the iterations, memory is the peak, models included."""

    rank: int
    iterations: int
    iteration_s: float
    vae_s: float
    dit_s: float
    optimizer_s: float
    loss_tokens: int
    tokens: int
    vae_latents: int
    peak_gb: float
    loss: float


class Models:
    """Sharded transformer, its optimizer, and encoder, on random weights: the same for every case of a process."""

    def __init__(self, preset: Preset, ranks: Ranks, bf16: bool, vae: bool) -> None:
        self.preset, self.ranks, self.planned = preset, ranks, dict[int, int]()
        torch.manual_seed(0)
        with ranks.device:
            self.dit = CausalDiT(preset.dit)
            torch.nn.init.normal_(self.dit.head.head.weight, std=0.02)
        self.dit.checkpointing = True
        shard_dit(self.dit, ranks, bf16=bf16)
        self.adamw = torch.optim.AdamW(self.dit.parameters(), lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
        self.vae: CausalVAE | None = None
        if vae:
            with ranks.device:
                made = CausalVAE(preset.vae)
            made.decoder = torch.nn.Identity()  # type: ignore[assignment]  # nothing is decoded here
            self.vae = made.requires_grad_(False).eval().to(torch.bfloat16 if bf16 else torch.float32)


class Measurement:
    """Data and clock of one case on one rank."""

    def __init__(self, models: Models, case: Case, ranks: Ranks) -> None:
        preset = models.preset
        self.models, self.preset, self.case, self.ranks, self.dit = models, preset, case, ranks, models.dit
        self.layout = Layout(case.mode, case.chunks, ranks.sequence)
        self.frames, self.cuda = preset.chunk_latents, ranks.device.type == "cuda"
        self.seconds: dict[str, list[float]] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        # Every rank of a sequence group draws the same; groups draw different samples
        self.generator = torch.Generator(ranks.device).manual_seed(1 + ranks.my_group)
        self.window = self.vae_window()
        if models.vae is not None:
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

    def iteration(self, light: bool = False) -> Tensor:
        """One training step; returns its loss. `light`: see `rehearse`."""
        self.ranks.wait()
        with self.timed("iteration"):
            with self.timed("vae"):
                self.encode(light)
            self.ranks.wait()  # latents are exchanged here: the slowest rank's encode is what an iteration waits for
            with self.timed("dit"):
                loss = self.loss(light)
                loss.backward()
            with self.timed("optimizer"):
                self.models.adamw.step()
                self.models.adamw.zero_grad(set_to_none=True)
            self.ranks.wait()
        return loss.detach()

    def rehearse(self) -> Tensor:
        """An iteration that takes as much memory as a real one, but less time.

        Only the block that sees most sees more than itself, apart from the first layer where this process hasn't met
        such lengths yet (kernels are planned for each), and few latents are encoded.
        """
        return self.iteration(light=True)

    def encode(self, light: bool) -> None:
        if self.models.vae is None:
            return
        few = min(self.pixels.shape[2], 1 + self.preset.vae.stride[0] * (2 * AT_ONCE - 1))
        pixels, window = (self.pixels[:, :, :few], Window(0, few, 0)) if light else (self.pixels, self.window)
        encode_window(self.models.vae, pixels, window, at_once=AT_ONCE)

    def loss(self, light: bool) -> Tensor:
        clips, layout, place = self.clips, self.layout, self.ranks.place
        noise = draw_noise(clips, self.preset.sampling.shift, self.generator)
        part = part_of(clips, noise, layout, place, self.frames)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.case.bf16):
            velocity = part_velocity(self.dit, self.preset, self.embed, part, self.attend(light))
        return part_loss(velocity, clips, noise, layout, self.ranks, self.frames)[0]

    def attend(self, light: bool) -> Attend:
        """Self-attention of every layer."""
        history, layout, group, whole = self.clips.history, self.layout, self.ranks.group, None
        if self.case.attention == "flex":
            whole = flex_attention_for(history, self.clips.chunks, self.preset.chunk_tokens, layout.order)
        full = attention(layout, history, group, whole=whole)
        heads, planned = self.preset.dit.heads // self.ranks.sequence, self.models.planned
        first = full if self.case.chunks > planned.get(heads, 0) and not self.case.rehearsed else None
        planned[heads] = max(planned.get(heads, 0), 0 if first is None else self.case.chunks)
        seen = [thinned(layout.seen(history.cpu()))]
        thin = attention(layout, history, group, whole=lambda _, q, k, v: attend_seen(q, k, v, seen))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.case.fails_on == self.ranks.rank and layer == self.preset.dit.layers - 1:
                raise torch.OutOfMemoryError("out of memory, rehearsed")
            if not light or whole is not None:
                return full(layer, q, k, v)
            return (first if first is not None and layer == 0 else thin)(layer, q, k, v)

        return attend

    def run(self) -> Found:
        """Warm up, then measure, as often as time allows."""
        case = self.case
        loss = self.rehearse() if case.rehearsed or case.warmup else torch.zeros(())
        for _ in range(case.warmup - 1):
            loss = self.iteration()
        count = 0
        if not case.rehearsed:
            self.seconds.clear()
            started = time.monotonic()
            while count < case.iterations:
                loss, count = self.iteration(), count + 1
                spent = time.monotonic() - started
                if self.ranks.largest(spent * (count + 1) / count) > case.allowed_s:
                    break
        place, chunk = self.ranks.place, self.preset.chunk_tokens
        middle = {name: sorted(values)[len(values) // 2] for name, values in self.seconds.items()}
        return Found(
            rank=self.ranks.rank,
            iterations=count,
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


def thinned(seen: Seen) -> Seen:
    """Every block sees itself, but the one that sees most, which goes on seeing all of that."""
    most = max(range(len(seen)), key=lambda position: len(seen[position]))
    return tuple(keys if position in (most,) or not keys else (position,) for position, keys in enumerate(seen))


def measure(models: Models, case: Case, ranks: Ranks) -> dict[str, object]:
    """Run a case; JSON-ready, of this rank. `ranks`: of which all share a sample, if the mode shares one."""
    own = replace(ranks, sequence=1, group=None) if case.mode == NONE else ranks
    try:
        return asdict(Measurement(models, case, own).run())
    finally:
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def sized(preset: Preset, layers: int | None, height: int | None, width: int | None) -> Preset:
    """The preset with another depth or size."""
    return replace(
        preset,
        dit=replace(preset.dit, layers=layers or preset.dit.layers),
        height=height or preset.height,
        width=width or preset.width,
    )
