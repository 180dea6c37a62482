"""Rooms: depth and pixels agree with the cameras that are told, splits share nothing, loops return."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from longtake.training.data.named import dataset_from_name
from longtake.training.data.rooms.paths import random_path
from longtake.training.data.rooms.pictures import PHOTOGRAPHS, photographs_of, texture
from longtake.training.data.rooms.render import render
from longtake.training.data.rooms.rooms import Rooms, Walkthrough
from longtake.training.data.rooms.scene import random_room
from longtake.training.models.presets import PRESETS
from longtake.training.models.text.room_grammar import room_words
from longtake.training.models.text.words import tokenizer_for

PRESET = replace(PRESETS["world-tiny"], height=48, width=64)


def walk(seed: int = 0, frames: int = 9, split: str = "train") -> Walkthrough:
    return Rooms(PRESET, split).walk(torch.Generator().manual_seed(seed), frames)


def test_depth_says_where_a_later_frame_sees_the_same_place() -> None:
    """Points of frame 0, moved by the poses into the last frame, lie where that frame's depth says, and look alike there."""
    checked = 0
    for seed in range(6):
        seen = walk(seed)
        height, width = seen.depth.shape[1:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        fx, fy, cx, cy = seen.intrinsics.tolist()
        points = (
            torch.stack(((columns - cx) / fx, (rows - cy) / fy, torch.ones_like(rows)), -1).double()
            * seen.depth[0, ..., None].double()
        )
        moved = (points - torch.from_numpy(seen.poses[-1][:3, 3])) @ torch.from_numpy(seen.poses[-1][:3, :3])
        u, v = moved[..., 0] / moved[..., 2] * fx + cx, moved[..., 1] / moved[..., 2] * fy + cy
        inside = (moved[..., 2] > 0.2) & (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
        there = seen.depth[-1][v[inside].round().long(), u[inside].round().long()].double()
        same = (there - moved[..., 2][inside]).abs() < 0.05 * there
        if int(inside.sum()) > 200:
            checked += 1
            assert float(same.double().mean()) > 0.8  # the rest is hidden behind an edge
            one = seen.frames[0].permute(1, 2, 0)[inside][same]
            other = seen.frames[-1][:, v[inside].round().long(), u[inside].round().long()].T[same]
            assert float((one - other).abs().mean()) < 0.15
    assert checked >= 3


def test_a_wall_ahead_is_as_far_as_it_is() -> None:
    room = replace(random_room(torch.Generator().manual_seed(1), "train"), boxes=())
    pose = torch.eye(4, dtype=torch.float64)[None].clone()
    pose[0, 1, 3] = -1.5
    _, depth = render(room, pose, torch.tensor([60.0, 60.0, 32.0, 24.0]), 48, 64)
    assert float(depth[0, 24, 32]) == pytest.approx(room.depth / 2, abs=1e-4)
    assert float(depth[0, 47, 32]) == pytest.approx(1.5 / (23 / 60), rel=1e-3) or room.depth / 2 < 1.5 / (23 / 60)


def test_splits_are_disjoint_and_the_same_seed_gives_the_same_video() -> None:
    assert len(photographs_of("eval")) >= 5
    assert not {p.file for p in photographs_of("train")} & {p.file for p in photographs_of("eval")}
    assert not [p.word for p in PHOTOGRAPHS if any(bad in p.file for bad in ("cell", "ihc", "retina", "micro", "lfw"))]
    words = {p.word for p in photographs_of("eval")}
    for seed in range(3):
        hung = {picture.word for picture in walk(seed, 2, "eval").room.pictures}
        assert hung and hung <= words and not hung & {p.word for p in walk(seed, 2).room.pictures}
    assert torch.equal(walk(5, 3).frames, walk(5, 3).frames) and not torch.equal(walk(5, 3).frames, walk(6, 3).frames)


def test_paths_stay_inside_and_loops_return() -> None:
    kinds = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        room = random_room(generator, "train")
        poses, kind = random_path(generator, room, 49)
        kinds.add(kind)
        assert np.abs(poses[:, 0, 3]).max() < room.width / 2 and np.abs(poses[:, 2, 3]).max() < room.depth / 2
        assert np.abs(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1) - np.eye(3)).max() < 1e-9
        if kind == "loop":
            assert np.abs(poses[-1] - poses[0]).max() < 1e-9
    assert kinds == {"keys", "curve", "loop", "turn"}


def test_textures_do_not_repeat() -> None:
    one, other = (texture("bricked", "red", seed) for seed in (1, 2))
    assert float((one - other).abs().mean()) > 0.01 and float(one.min()) >= 0 and float(one.max()) <= 1


def test_it_is_a_data_set_with_captions_that_the_text_encoder_knows() -> None:
    data = dataset_from_name("rooms", PRESET, "train")
    batch = data.sample(torch.Generator().manual_seed(0), 2, 1, torch.device("cpu"))
    assert batch.video.shape == (1, 3, 49, 48, 64) and batch.cuts == [[False, False]]
    take = data.take(3, 1, 1)
    assert take.frames is not None and take.frames.shape == (25, 48, 64, 3)
    assert data.take(3, 1, 1, {take.key}).frames is None
    tokens = tokenizer_for(PRESET, None, None)(batch.prompts[0][:1], 32)
    assert not bool((tokens == 1).any())
    assert {p.word for p in PHOTOGRAPHS} <= set(room_words())
    assert math.isfinite(float(batch.video.mean()))
