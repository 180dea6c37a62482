"""Cameras: actions against a plain reading of their rule, maps against diffusers', files, and what bad input gets."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from walked import poses_of_action
from worlds import picture

from longtake.errors import LongtakeError
from longtake.runtime.camera import CameraPosition, camera_from_json, frames_of_chunk
from longtake.runtime.camera_files import intrinsics_from, of_frames, poses_from
from longtake.runtime.generator import Generator
from longtake.runtime.story import story_from_file
from longtake.runtime.view import View
from longtake.training.models.camera_poses import relative_poses
from longtake.training.models.presets import PRESETS, Preset
from longtake.training.models.sana_wm.actions import Pace, Walk, keys_of_frames
from longtake.training.models.sana_wm.camera import chunk_maps, frames_of_latent


def plain_roll_out(action: str) -> np.ndarray:
    """The rule written out once more, frame by frame, on matrices and angles."""
    frames = [
        ("" if keys == "none" else keys)
        for keys, count in (part.split("-") for part in action.split(","))
        for _ in range(int(count))
    ]
    rotation, place, velocity, pitch, before = np.eye(3), np.zeros(3), np.zeros(4), 0.0, ""
    poses = [np.eye(4)]
    for held in frames:
        rate = math.radians(0.6)
        target = np.array([0.025 * (("w" in held) - ("s" in held)), 0.025 * (("l" in held) - ("j" in held)),
                           rate * (("d" in held) - ("a" in held)), rate * (("i" in held) - ("k" in held))])  # fmt: skip
        if any(key not in before for key in held):
            velocity = target
        else:
            tau = np.where(target != 0, 0.45, 1.0)
            velocity = velocity + (target - velocity) * (1 - np.exp(-(1 / 16) / tau))
        new = min(max(pitch + velocity[3], -math.pi / 3), math.pi / 3)
        c, s = math.cos(velocity[2]), math.sin(velocity[2])
        cp, sp = math.cos(new - pitch), math.sin(new - pitch)
        rotation = (
            np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ rotation @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        )
        forward, right = rotation[:, 2] * [1, 0, 1], rotation[:, 0] * [1, 0, 1]
        place = (
            place
            + forward / (np.linalg.norm(forward) + 1e-6) * velocity[0]
            + right / (np.linalg.norm(right) + 1e-6) * velocity[1]
        )
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, place
        poses.append(pose)
        pitch, before = new, held
    return np.stack(poses).astype(np.float32)


def test_actions() -> None:
    action = "w-10,wd-20,none-12,ia-5,i-120,jk-30,sl-9,a-3,none-4"
    got = poses_of_action(action)
    assert got.dtype == np.float32 and len(got) == 214
    assert np.abs(got - plain_roll_out(action)).max() < 1e-6
    assert np.array_equal(got, poses_of_action(" W-10, dw-20 ,NONE-12,ai-5,i-120,kj-30,ls-9,a-3,none-4"))
    # each key by its sign: forward is +z, right +x; turning right brings +z to +x, looking up brings it to -y
    for key, (axis, sign) in {"w": (2, 1), "s": (2, -1), "l": (0, 1), "j": (0, -1)}.items():
        assert np.sign(poses_of_action(f"{key}-3")[-1][axis, 3]) == sign
    for key, (axis, sign) in {"d": (0, 1), "a": (0, -1), "i": (1, -1), "k": (1, 1)}.items():
        assert np.sign(poses_of_action(f"{key}-3")[-1][axis, 2]) == sign
    assert np.allclose(poses_of_action("w-4", Pace(speed=0.1))[-1][2, 3], 0.4, atol=1e-5)


@pytest.mark.parametrize(
    "action, says",
    [
        ("w-24,x-3", r"(?s)unknown key.*got: 'x'.*did you mean 's'"),
        ("w24", r"(?s)bad action.*got: 'w24'.*KEYS-FRAMES"),
        ("w-0", "bad action"),
        ("", "bad action"),
        ("w-99999999", "bad action"),
    ],
)
def test_bad_actions(action: str, says: str) -> None:
    with pytest.raises(LongtakeError, match=says):
        keys_of_frames(action)


def test_maps_are_those_of_diffusers(tmp_path: Path) -> None:
    utils = pytest.importorskip("diffusers.pipelines.sana_wm.cam_utils")
    preset = PRESETS["sana-wm"]
    poses = poses_of_action("wd-40,is-33").astype(np.float64)
    poses = np.linalg.inv(poses[5]) @ poses  # the first is not the identity
    intrinsics = np.tile([700.0, 720.0, 630.0, 340.0], (len(poses), 1))
    theirs = utils.prepare_camera(poses, intrinsics, target_size=(704, 1280), vae_stride=(8, 32, 32))
    assert [list(frames_of_latent(i, 8))[:2] for i in (0, 1, 2)] == [[0, 1], [1, 2], [9, 10]]
    own = torch.from_numpy(relative_poses(poses))
    grid = torch.from_numpy(intrinsics) * torch.tensor([40 / 1280, 22 / 704, 40 / 1280, 22 / 704])
    for chunk in (0, 1, 2):
        start, count = frames_of_chunk(preset, chunk)
        first, latents = preset.first_frame(chunk), preset.frames_of(chunk)
        wanted = theirs["chunk_plucker"][:, first : first + latents]
        _, _, maps = chunk_maps(
            own[start : start + count], grid[start : start + count], range(first, first + latents), 8, (22, 40), start
        )
        assert float((maps - wanted).abs().max()) < 1e-5
    rays, inverse, _ = chunk_maps(own, grid, range(0, 4), 8, (22, 40))
    assert torch.allclose(rays @ inverse, torch.eye(4).expand_as(rays), atol=1e-5)


def test_chunks_of_frames() -> None:
    assert [frames_of_chunk(PRESETS["world-tiny"], chunk) for chunk in range(3)] == [(0, 25), (25, 24), (49, 24)]


def test_files(tmp_path: Path) -> None:
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (3, 1, 1)))
    assert poses_from(tmp_path / "poses.npy").shape == (3, 4, 4)
    matrix = np.array([[50.0, 0, 32], [0, 51, 24], [0, 0, 1]])
    assert intrinsics_from(matrix, 48, 64).tolist() == [50, 51, 32, 24]
    assert intrinsics_from(np.tile(matrix, (2, 1, 1)), 48, 64).shape == (2, 4)
    assert of_frames(np.array([[1.0, 2, 3, 4], [3, 4, 5, 6]]), 3)[:, 0].tolist() == [1, 2, 3]


def turned(change: Any) -> np.ndarray:
    poses = np.tile(np.eye(4), (4, 1, 1))
    change(poses)
    return poses


@pytest.mark.parametrize(
    "poses, says",
    [
        (np.eye(4), r"(?s)no camera poses.*got: \(4, 4\)"),
        (turned(lambda p: p[2].__setitem__((0, 3), np.nan)), r"pose of frame 2 is not finite"),
        (turned(lambda p: p[1].__imul__(1.1)), r"(?s)pose of frame 1 is no rigid motion.*without scale"),
        (turned(lambda p: p[3].__setitem__((0, 0), -1)), r"pose of frame 3 is no rigid motion"),
        (np.array(["a"]), r"no numbers"),
        ("nowhere.npy", r"(?s)nowhere.npy does not exist"),
    ],
)
def test_bad_poses(poses: Any, says: str) -> None:
    with pytest.raises(LongtakeError, match=says):
        poses_from(poses)


HEADER = "{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(128)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(60), npy("{'descr': ((("), npy(HEADER.format(shape="(True, 4, 4)")),
     npy(HEADER.format(shape=f"({10**12}, 4, 4)")), npy(HEADER.format(shape=f"({10**40}, 4, 4)")),
     npy(HEADER.format(shape="(-1, 4, 4)")), npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 4), }")],
    ids=["empty", "zip", "cut header", "bool", "terabytes", "overflow", "negative", "pickle"],
)  # fmt: skip
def test_a_damaged_file_of_poses(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "poses.npy").write_bytes(content)
    with pytest.raises(LongtakeError, match="cannot read the camera poses"):
        poses_from(tmp_path / "poses.npy")


@pytest.mark.parametrize(
    "values", [[0.0, 50, 32, 24], [50, 50, 90, 24], [np.inf, 50, 32, 24], [1e6, 50, 32, 24], [1.0, 2, 3]]
)
def test_bad_intrinsics(values: list[float]) -> None:
    with pytest.raises(LongtakeError, match=r"intrinsics"):
        intrinsics_from(np.array(values), 48, 64)


def test_a_video_refuses_at_its_start_what_cannot_be(generator: Generator, tmp_path: Path) -> None:
    image = picture()
    for view, says in (
        (View(camera=np.tile(np.eye(4), (48, 1, 1))), r"(?s)path ends before the video.*got: 48 poses.*expected: 49"),
        (View(camera=np.tile(np.eye(4), (49, 1, 1)), action="w-3"), "a camera has one path"),
        (View(action="q-3"), r"(?s)unknown key.*did you mean 'w'"),
        (View(speed=math.inf), "bad speed"),
        (View(intrinsics=np.array([1.0, 1, 0, 0])), "no camera of this picture"),
    ):
        with pytest.raises(LongtakeError, match=says):
            generator.session(["a room"] * 2, image=image, view=view)
    with pytest.raises(LongtakeError, match=r"(?s)starts from a picture.*--image"):
        generator.session(["a room"])
    with pytest.raises(LongtakeError, match=r"(?s)no cuts.*then"):
        generator.session(["a room", "The scene transitions. another"], image=image)
    path = np.tile(np.eye(4), (49, 1, 1))
    with pytest.raises(LongtakeError, match="endless session does not"):
        generator.session(["a room"] * 2, image=image, view=View(camera=path), endless=True)
    session = generator.session(["a room"] * 2, image=image, view=View(camera=path), decode=False)
    with pytest.raises(LongtakeError, match="no cuts"):
        session.cut()
    session.extend(1)
    list(islice(session, 2))
    with pytest.raises(LongtakeError, match=r"(?s)path ends before chunk 2.*steer"):
        next(session)
    session.steer(action="w")  # a session that is steered never runs out
    next(session)
    for given, says in (
        ({"action": "y"}, "unknown key"),
        ({}, r"(?s)one way at a time.*got: nothing"),
        ({"action": "w", "velocity": (0, 0, 0, 0)}, r"got: action and velocity"),
        ({"pose": np.zeros((4, 4))}, "no rigid motion"),
        ({"velocity": (math.nan, 0, 0, 0)}, "bad velocity"),
        ({"action": "w", "from_chunk": 1}, r"(?s)made already.*got: chunk 1.*expected: 3"),
    ):
        with pytest.raises(LongtakeError, match=says):
            session.steer(**given)


def test_chunks_that_are_given_have_four_latents_first(generator: Generator, preset: Preset) -> None:
    session = generator.session(["a room"] * 2, image=picture(), decode=False)
    for shape in ((1, 3, 8, 3, 4), (2, 4, 8, 3, 4)):
        with pytest.raises(LongtakeError, match=r"(?s)not a chunk.*expected: \(1, 4, 8, 3, 4\)"):
            session.feed(torch.zeros(shape), "a room")


def test_a_story_says_where_the_camera_goes(tmp_path: Path, generator: Generator) -> None:
    np.save(tmp_path / "own.npy", np.array([100.0, 100, 64, 48]))
    (tmp_path / "walk.yaml").write_text(
        "action: w-24\nintrinsics: own.npy\nspeed: 0.05\nshots: [{prompt: a room, chunks: 2}]\n"
    )
    story = story_from_file(tmp_path / "walk.yaml")
    session = generator.session(story, image=picture(), decode=False)
    camera = session._position.camera
    assert camera is not None and len(camera.keys) == 24 and camera.pace.speed == 0.05
    assert camera.intrinsics[0][0] == pytest.approx(
        100 * 0.5 * 4 / 64
    )  # half the picture's size, on a grid of 4 columns
    over = generator.session(story, image=picture(), view=View(action="s-3"), decode=False)._position.camera
    assert over is not None and over.keys == ("s",) * 3 and over.intrinsics == camera.intrinsics


def test_a_camera_position_survives_json() -> None:
    position = CameraPosition(((1.0, 2.0, 3.0, 4.0),), keys=("w", ""), walk=Walk().step("wd", Pace()))
    assert camera_from_json(position.as_json()) == position
