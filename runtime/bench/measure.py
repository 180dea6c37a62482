"""What one side (an engine backend, or plain PyTorch) does in a benchmark: the same session for both.

First chunk (empty cache, warm networks), then until the window is full and both sinks are pinned, then N chunks with
each one's frames awaited (serial: every stage has the device to itself), then N with decoding overlapped.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longtake.runtime.backends.base import Backend
from longtake.runtime.bench.gpu import gpu_state, peak_bytes
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.timed_backend import TimedBackend
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.report import conv_counts
from longtake.runtime.session import Session
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.models.presets import Preset

SCRIPT: tuple[Segment, ...] = (
    Segment("a first shot", 1),
    Segment("a second shot", 1, cut=True),
    Segment("the second shot goes on", 1),
)
Save = Callable[[dict[str, Any]], None]


def chunk_frames(preset: Preset) -> int:
    """Pixel frames of a steady chunk."""
    return preset.chunk_latents * preset.vae.stride[0]


def measure(backend: Backend, options: BenchOptions, save: Save) -> dict[str, Any]:
    """Every figure of one side. `save` is called with what is known after each stage."""
    timed = TimedBackend(backend)
    figures: dict[str, Any] = {"backend": backend.name, "reason": backend.reason, "fps": {}, "stage_ms": {}}
    figures |= {"vae_conv": counts} if (counts := conv_counts(backend)) else {}
    with torch.no_grad():
        if "dit" in options.networks:
            _measure_session(timed, options, figures, save)
        if options.networks == ("vae",):
            _measure_decoder(timed, options, figures)
    figures["peak_gb"] = round(max(peak_bytes(backend.device), backend.peak_bytes()) / 1e9, 3)
    if (decode_device := backend.decode_device) != backend.device:
        figures["decode_peak_gb"] = round(peak_bytes(decode_device) / 1e9, 3)
    figures["gpu_state"] = gpu_state(backend.device)
    save(figures)
    return figures


def _measure_session(timed: TimedBackend, options: BenchOptions, figures: dict[str, Any], save: Save) -> None:
    decode = "vae" in options.networks
    figures["cold_first_chunk_s"] = _throw_away_session(timed, options, decode)
    with _session(timed, options, decode) as session:
        figures["first_chunk_s"], first = _first_chunk(session)
        figures["sample"] = sample_of(first.latents)
        figures["first_chunk_ms"] = {name: round(sum(ms), 2) for name, ms in timed.taken().items()}
        save(figures)
        for _ in range(options.warm_chunks - 1):
            _await(next(session))
        timed.taken()
        _serial(session, timed, options, figures)
        save(figures)
        if decode:
            _overlapped(session, options, figures)


def _session(timed: TimedBackend, options: BenchOptions, decode: bool) -> Session:
    generator = Generator(timed, lambda texts, length: torch.ones(len(texts), length, dtype=torch.int32))
    script, picture = SCRIPT, None
    if "camera" in generator.model.family.can:  # no cuts, and a video starts from a picture
        script, picture = SCRIPT[2:], np.full((timed.preset.height, timed.preset.width, 3), 128, np.uint8)
    return generator.session(
        script, options.seed, steps=options.steps, guidance=1.0, decode=decode, endless=True, image=picture
    )


def _throw_away_session(timed: TimedBackend, options: BenchOptions, decode: bool) -> float:
    """Do whatever is done lazily (compile, capture, autotune) in a first chunk; seconds that took."""
    with _session(timed, options, decode) as session:
        seconds, _ = _first_chunk(session)
    del session  # its cache: the next session's takes the same place, and one is what a peak should show
    gc.collect()
    timed.taken()
    return seconds


def sample_of(latents: torch.Tensor, count: int = 256) -> list[float]:
    """Values spread over a chunk's latents, to see whether two sides computed the same."""
    flat = latents.flatten()
    return [round(float(value), 5) for value in flat[:: max(1, flat.numel() // count)][:count]]


def _first_chunk(session: Session) -> tuple[float, Chunk]:
    start = time.perf_counter()
    chunk = _await(next(session))
    return round(time.perf_counter() - start, 4), chunk


def _await(chunk: Chunk) -> Chunk:
    if chunk.decoding is not None:
        chunk.decoding.result()
    return chunk


def _serial(session: Session, timed: TimedBackend, options: BenchOptions, figures: dict[str, Any]) -> None:
    chunks, walls = [], []
    for _ in range(options.steady_chunks):
        start = time.perf_counter()
        chunks.append(_await(next(session)))
        walls.append(time.perf_counter() - start)
    marks, frames = timed.taken(), chunk_frames(timed.inner.preset)
    passes = [sum(c.stage_ms[stage] for stage in ("denoise", "clean")) for c in chunks]
    stages = {stage: mean([c.timings[stage] for c in chunks]) for stage in chunks[-1].timings}
    stages |= {name: mean(values) for name, values in marks.items()}
    figures["fps"]["dit"] = _rate(frames, mean(passes) / 1e3)
    figures["stage_ms"] |= {"dit_chunk": round(mean(passes), 2)}
    if latents := marks.get("latent"):
        a_chunk = mean(latents) * timed.inner.preset.chunk_latents
        figures["fps"] |= {"vae": _rate(frames, a_chunk / 1e3), "serial": _rate(frames, mean(walls))}
        figures["stage_ms"] |= {"vae_chunk": round(a_chunk, 2), "serial_chunk": round(1e3 * mean(walls), 2)}
        stages["copy_and_convert"] = max(0.0, stages.get("decode", 0.0) - a_chunk)
    figures["stage_ms"] |= {name: round(value, 3) for name, value in stages.items()}
    figures["spread"] = {"dit_chunk": round(spread(passes), 4), "serial_chunk": round(spread(walls), 4)}
    figures["chunks"] = options.steady_chunks


def _overlapped(session: Session, options: BenchOptions, figures: dict[str, Any]) -> None:
    """Steady state with the decoder at work beside the next chunk: from one chunk's last frame to the last one's."""
    first = next(session)
    chunks = [next(session) for _ in range(options.steady_chunks)]
    spent = _await(chunks[-1]).finished_at - _await(first).finished_at
    frames = chunk_frames(session.model.preset) * len(chunks)
    figures["fps"]["end_to_end"] = _rate(frames, spent)
    figures["stage_ms"]["overlapped_chunk"] = round(1e3 * spent / len(chunks), 2)


def _measure_decoder(timed: TimedBackend, options: BenchOptions, figures: dict[str, Any]) -> None:
    """The decoder alone: the first latent, one steady chunk to warm up, then the chunks that count."""
    preset, device = timed.preset, timed.decode_device
    decoder, many = VideoModel(timed).decoder(), preset.chunk_latents
    latents = torch.randn(many, 1, preset.vae.z_channels, *preset.latent_hw, device=device)
    for latent in (latents[0], *latents):
        decoder.decode(latent)
    figures["stage_ms"]["first_latent"] = round(timed.taken()["latent"][0], 3)
    for _ in range(options.steady_chunks):
        for latent in latents:
            decoder.decode(latent)
    spent = timed.taken()["latent"]
    figures["fps"]["vae"] = _rate(chunk_frames(preset), mean(spent) * many / 1e3)
    figures["stage_ms"] |= {"latent": round(mean(spent), 3), "vae_chunk": round(mean(spent) * many, 2)}
    figures["spread"], figures["chunks"] = {"latent": round(spread(spent), 4)}, options.steady_chunks


def _rate(frames: int, seconds: float) -> float | None:
    return round(frames / seconds, 3) if seconds > 0 else None


def mean(values: list[float]) -> float:
    """Mean, 0 for nothing."""
    return statistics.fmean(values) if values else 0.0


def spread(values: list[float]) -> float:
    """Largest minus smallest over the mean: how steady the state was; 0 for fewer than two."""
    return (max(values) - min(values)) / mean(values) if len(values) > 1 and mean(values) else 0.0
