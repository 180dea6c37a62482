"""Measurements of `longtake bench parallel` on one rank: iterations of one mode at one length.

Weights, latents, prompts and pixels are random and made on the device. An iteration is what training does with a clip
that isn't cached: VAE encode, forward and backward pass with gradient checkpointing, AdamW on the sharded weights.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from longtake.files import read_json, write_json
from longtake.record import record_from_json
from longtake.training.data.base import chunk_frames
from longtake.training.models.wan.dit import Attend, CausalDiT
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.models.wan.window import full_history
from longtake.training.objective.flex import flex_attention_for
from longtake.training.objective.teacher_forcing import Clips, draw_noise
from longtake.training.parallel.attention import Seen, attend_seen
from longtake.training.parallel.bench.options import ParallelBenchOptions
from longtake.training.parallel.forcing import attention, part_loss, part_of, part_velocity
from longtake.training.parallel.halo import Window, encode_window, evened, halo_needed, share, window_of
from longtake.training.parallel.layout import NONE, Layout
from longtake.training.parallel.ranks import Ranks, join_ranks
from longtake.training.parallel.sharding import shard_dit
from longtake.training.report import peak_memory

AT_ONCE = 2  # latents that the encoder takes in one call
TIMED = 0.8  # of the time left is shared among the cases


@dataclass(frozen=True)
class Case:
    """What to measure. rehearsed: nothing is timed, only `Measurement.rehearse`, which takes as much memory."""

    mode: str
    chunks: int
    rehearsed: bool = False

    @property
    def work(self) -> int:
        """About how much it is, beside other cases: attention grows with the square of the length."""
        return self.chunks * (self.chunks + 8)


@dataclass(frozen=True)
class Job:
    """What the ranks are handed, as JSON. deadline: of time.monotonic()."""

    options: ParallelBenchOptions
    cases: tuple[Case, ...]
    deadline: float


class Models:
    """Sharded transformer, its optimizer, and encoder, on random weights: the same for every case of a process."""

    def __init__(self, options: ParallelBenchOptions, ranks: Ranks) -> None:
        preset = options.sized
        self.planned: dict[int, int] = {}
        torch.manual_seed(0)
        with ranks.device:
            self.dit = CausalDiT(preset.dit)
            torch.nn.init.normal_(self.dit.head.head.weight, std=0.02)
        self.dit.checkpointing = True
        shard_dit(self.dit, ranks, bf16=not options.fp32)
        self.adamw = torch.optim.AdamW(self.dit.parameters(), lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
        self.vae: CausalVAE | None = None
        if options.vae:
            with ranks.device:
                made = CausalVAE(preset.vae)
            made.decoder = torch.nn.Identity()  # type: ignore[assignment]  # nothing is decoded here
            self.vae = made.requires_grad_(False).eval().to(options.dtype)


class Measurement:
    """Data and clock of one case on one rank."""

    def __init__(self, models: Models, options: ParallelBenchOptions, case: Case, ranks: Ranks) -> None:
        preset = options.sized
        self.models, self.options, self.case, self.ranks, self.dit = models, options, case, ranks, models.dit
        self.preset = preset
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
        bounds = evened(latents, count, halo)[place] if self.options.halo == "even" else share(latents, count, place)
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
        return torch.randn(shape, device=tokens.device, dtype=self.options.dtype)

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
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=not self.options.fp32):
            velocity = part_velocity(self.dit, self.preset, self.embed, part, self.attend(light))
        return part_loss(velocity, clips, noise, layout, self.ranks, self.frames)[0]

    def attend(self, light: bool) -> Attend:
        """Self-attention of every layer."""
        history, layout, group, whole = self.clips.history, self.layout, self.ranks.group, None
        if self.options.attention == "flex":
            whole = flex_attention_for(history, self.clips.chunks, self.preset.chunk_tokens, layout.order)
        full = attention(layout, history, group, whole=whole)
        heads, planned = self.preset.dit.heads // self.ranks.sequence, self.models.planned
        first = full if self.case.chunks > planned.get(heads, 0) and not self.case.rehearsed else None
        planned[heads] = max(planned.get(heads, 0), 0 if first is None else self.case.chunks)
        seen = [thinned(layout.seen(history.cpu()))]
        thin = attention(layout, history, group, whole=lambda _, q, k, v: attend_seen(q, k, v, seen))

        fails = self.options.rehearse_oom == self.case.mode and self.ranks.rank == self.ranks.world - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if fails and layer == self.preset.dit.layers - 1:
                raise torch.OutOfMemoryError("out of memory, rehearsed")
            if not light or whole is not None:
                return full(layer, q, k, v)
            return (first if first is not None and layer == 0 else thin)(layer, q, k, v)

        return attend

    def run(self, allowed: float) -> dict[str, float]:
        """Warm up, then measure as often as `allowed` seconds permit, once at least.

        What this rank found: seconds are medians of the iterations, memory is the peak, models included.
        """
        warmup, count = self.options.warmup, 0
        loss = self.rehearse() if self.case.rehearsed or warmup else torch.zeros(())
        for _ in range(warmup - 1):
            loss = self.iteration()
        if not self.case.rehearsed:
            self.seconds.clear()
            started = time.monotonic()
            while count < self.options.iterations:
                loss, count = self.iteration(), count + 1
                spent = time.monotonic() - started
                if self.ranks.largest(spent * (count + 1) / count) > allowed:
                    break
        place, chunk = self.ranks.place, self.preset.chunk_tokens
        return {
            "rank": self.ranks.rank,
            "iterations": count,
            **{f"{name}_s": sorted(values)[len(values) // 2] for name, values in self.seconds.items()},
            "loss_tokens": len(self.layout.noisy(place)) * chunk,
            "tokens": len(self.layout.local(place)) * chunk,
            "vae_latents": 1 + (self.window.stop - self.window.start - 1) // self.preset.vae.stride[0],
            "peak_gb": peak_memory(self.ranks.device)["peak_gb"],
            "loss": float(loss),
        }


def thinned(seen: Seen) -> Seen:
    """Every block sees itself, but the one that sees most, which goes on seeing all of that."""
    most = max(range(len(seen)), key=lambda position: len(seen[position]))
    return tuple(keys if position in (most,) or not keys else (position,) for position, keys in enumerate(seen))


def measure(
    models: Models, options: ParallelBenchOptions, case: Case, ranks: Ranks, allowed: float
) -> dict[str, float]:
    """What this rank finds of a case. `ranks`: of which all share a sample, if the mode shares one."""
    own = replace(ranks, sequence=1, group=None) if case.mode == NONE else ranks
    try:
        return Measurement(models, options, case, own).run(allowed)
    finally:
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def work(folder: Path, job: Job) -> None:
    """Measure all cases on this rank; the time until the deadline is shared by the work they are."""
    options, cases = job.options, job.cases
    with join_ranks(options.on, int(os.environ["WORLD_SIZE"])) as ranks:
        models = Models(options, ranks)
        for number, case in enumerate(cases):
            part = case.work / sum(one.work for one in cases[number:])
            allowed = ranks.largest(TIMED * part * (job.deadline - time.monotonic()))
            found = measure(models, options, case, ranks, allowed)
            write_json(folder / f"{number}-{ranks.rank}.json", found)


def main() -> None:
    """argv: the folder that holds the cases, and takes results.

    A rank that fails is gone at once: leaving the process group would wait for ranks that wait for this one.
    """
    folder = Path(sys.argv[1])
    try:
        work(folder, record_from_json(Job, read_json(folder / "job.json")))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
