"""Rotary positions of a chunk's frames: continuous over cuts but for the shot offset."""

from __future__ import annotations

from longtake.training.models.presets import Preset


def frame_positions(preset: Preset, chunk: int, shot: int) -> list[float]:
    """Absolute temporal RoPE position of each latent frame; every shot begun so far inserts a gap."""
    start = preset.first_frame(chunk) + shot * preset.shot_rope_offset
    return [float(start + frame) for frame in range(preset.frames_of(chunk))]
