"""`longtake generate` of a small world: video, report, and what is refused before there is a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from worlds import picture

from longtake.commands.generate import generate
from longtake.commands.generate_options import GenerateOptions
from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.story import story_from_file, story_from_prompt
from longtake.training.models.load import Models
from longtake.video import count_frames


@pytest.fixture
def generator(recipe: Recipe, models: Models) -> Generator:
    return Generator(TorchBackend(recipe, models), models.text.tokenizer)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    Image.fromarray(picture()).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def run(generator: Generator, out: Path, chunks: int = 2, **given: Any) -> int:
    options = GenerateOptions(prompt=("a room with red walls",), chunks=chunks, out=out, **given)
    return generate(generator, options, story_from_prompt(options.prompt[0], chunks), out)


def test_a_walk_leaves_a_video_and_a_report(generator: Generator, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mp4"
    assert run(generator, out, image=first, action="w-24, wd-24", speed=0.05) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["frames"] == 25 + 24 and report["window_latents"] == 4 + 3 + 3
    assert report["start"] == {
        "picture": str(first), "action": "w-24, wd-24", "speed": 0.05, "intrinsics": "60 degrees across"
    }  # fmt: skip
    assert count_frames(out, 16) == 49
    assert run(generator, out, image=first) == 0
    assert json.loads(out.with_suffix(".json").read_text())["start"]["action"] == "none: at rest"


def test_what_is_refused_leaves_nothing(generator: Generator, first: Path, tmp_path: Path) -> None:
    out = tmp_path / "never.mp4"
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (49, 1, 1)))
    for given, says in (
        ({"image": first, "action": "x-24"}, r"(?s)unknown key.*did you mean 's'"),
        ({"action": "w-24"}, r"(?s)starts from a picture.*pass --image"),
        ({"continue_from": tmp_path / "clip.mp4"}, r"(?s)does not go on from a clip.*--image"),
        (
            {"image": first, "camera": tmp_path / "poses.npy", "chunks": 3},
            r"(?s)path ends before the video.*expected: 73",
        ),
    ):
        with pytest.raises(LongtakeError, match=says):
            run(generator, out, **given)
    (tmp_path / "cut.yaml").write_text("shots: [{prompt: a room}, {prompt: another room}]\n")
    with pytest.raises(LongtakeError, match=r"(?s)no cuts.*then"):
        options = GenerateOptions(story=str(tmp_path / "cut.yaml"), image=first)
        generate(generator, options, story_from_file(tmp_path / "cut.yaml"), out)
    assert not list(tmp_path.glob("never*"))


def test_a_path_is_as_long_as_all_that_is_asked_for(generator: Generator, first: Path, tmp_path: Path) -> None:
    """--chunks beyond the story is told at the start, not when the path ends."""
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (49, 1, 1)))
    (tmp_path / "walk.yaml").write_text("camera: poses.npy\nshots: [{prompt: a room, chunks: 2}]\n")
    options = GenerateOptions(story=str(tmp_path / "walk.yaml"), image=first, chunks=3)
    with pytest.raises(LongtakeError, match="path ends before the video"):
        generate(generator, options, story_from_file(tmp_path / "walk.yaml"), tmp_path / "never.mp4")
