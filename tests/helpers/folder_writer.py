"""Render stories of digits into the folder layout of `folder.Folder`."""

from __future__ import annotations

from pathlib import Path

import torch

from longtake.files import write_json
from longtake.training.data.base import chunk_frames
from longtake.training.data.digit_stories import Story
from longtake.training.data.digits import Digits, caption, random_story
from longtake.training.models.presets import Preset
from longtake.video import write_video

CPU = torch.device("cpu")


def write_digits_folder(folder: Path, preset: Preset, stories: int, seed: int = 0, chunks: int = 4) -> list[Story]:
    """Write `stories` random stories of `chunks` chunks, one mp4 with a caption a shot; returns the stories."""
    generator = torch.Generator().manual_seed(seed)
    told = [random_story(generator, chunks, changes=False) for _ in range(stories)]
    for number, story in enumerate(told):
        _write(folder, f"{number:04d}", story, preset)
    return told


def _write(folder: Path, name: str, story: Story, preset: Preset) -> None:
    video_3THW = Digits(preset).render([story], CPU)[0]
    frames = video_3THW.mul(127.5).add_(127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    begin = chunks = 0
    for number, shot in enumerate(story.shots):
        chunks += shot.chunks
        end = chunk_frames(preset, chunks)
        write_video(folder / "video" / name / f"{number}.mp4", frames[begin:end], preset.fps)
        write_json(folder / "caption" / name / f"{number}.json", {"caption": caption(shot)})
        begin = end
