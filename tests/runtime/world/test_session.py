"""A session of a world: its chunks, its state in slots against plain memory, and what leaves it untouched."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from worlds import digest, picture

from longtake.accuracy.compare import recipe_models
from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.runtime.generator import Generator
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session_options import Sampling
from longtake.runtime.view import View
from longtake.training.models.load import Models
from longtake.training.models.presets import Preset, WorldPreset
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.models.sana_wm.attention import Camera
from longtake.training.models.sana_wm.dit import Chunk as DiTChunk
from longtake.training.models.sana_wm.memory import Memory
from longtake.training.models.sana_wm.slots import Turns, turns_from_json
from longtake.training.models.text.words import tokenize

WALK = View(action="w-30, wd-40, none-100")


def test_chunks_have_25_and_then_24_frames_and_begin_with_the_picture(generator: Generator) -> None:
    chunks = list(generator.session(["a room"] * 3, image=picture(), view=WALK))
    assert [len(chunk.frames) for chunk in chunks] == [25, 24, 24]
    assert [chunk.visible for chunk in chunks] == [(0,), (0, 1), (0, 1, 2)]
    first = generator.model.encoder().encode(torch.from_numpy(picture(48, 64)).permute(2, 0, 1)[:, None] / 127.5 - 1.0)
    assert first.shape == chunks[0].latents[:, 0].shape
    given = generator.session(["a room"], image=picture(48, 64), view=WALK)
    assert torch.equal(next(given).latents[:, 0], first)


@pytest.mark.parametrize("kind", ["float", "rgba", "PIL on its side"])
def test_a_world_takes_pictures_of_any_kind(kind: str, generator: Generator) -> None:
    plain = picture(48, 64)
    turned = Image.fromarray(np.rot90(plain).copy())
    turned.getexif()[0x0112] = 6  # a quarter to the right, and it stands
    turned.info["exif"] = turned.getexif().tobytes()
    clear = np.concatenate([plain, np.full((48, 64, 1), 255, np.uint8)], -1)
    given = {"float": plain / 255, "rgba": clear, "PIL on its side": turned}[kind]
    session = generator.session(["a room"], image=given, view=WALK, decode=False)
    first = generator.model.encoder().encode(torch.from_numpy(plain).permute(2, 0, 1)[:, None] / 127.5 - 1.0)
    assert torch.equal(next(session).latents[:, 0], first)


def test_what_is_no_picture_is_refused_by_a_world(generator: Generator) -> None:
    for given in (object(), [[0]], np.zeros((3, 48, 64), np.uint8)):
        with pytest.raises(LongtakeError, match="this is not an image"):
            generator.session(["a room"], image=given, view=WALK)  # type: ignore[arg-type]


def plain_video(models: Models, recipe: Recipe, chunks: int, first: Tensor, view: View, seed: int) -> list[Tensor]:
    """The same sampling written out on plain memory, without slots, families or solvers."""
    oracle = recipe_models(models, "bf16")
    preset, dit = oracle.preset, oracle.dit
    assert isinstance(preset, WorldPreset)
    from longtake.training.models.families import family_of

    family, memory, out = family_of(preset), Memory(preset.dit, preset.frame_tokens), []
    embeddings = oracle.text(tokenize(["a room"], preset.text.length))[0]
    bias = torch.where(embeddings.abs().amax(-1) > 0, 0.0, -1e4)
    camera = view.position(preset, (preset.height, preset.width), 1)
    for index in range(chunks):
        poses, intrinsics, walk = camera.take(preset, index)
        camera = camera.after(walk, index)
        tables = family.chunk_inputs(preset, index, 0)
        seen = family.camera_inputs(preset, index, poses, intrinsics)  # type: ignore[attr-defined]
        half = tables["camera_rope_cos"], tables["camera_rope_sin"]
        chunk = DiTChunk((tables["rope_cos"], tables["rope_sin"]), Camera(seen["rays"], seen["inverse_rays"], half),
                         dit.plucker(seen["plucker"][0]), memory.attend, memory.carried)  # fmt: skip
        x = noise_for_chunk(preset, seed, index)[0].transpose(0, 1).clone()
        clean = index == 0
        times = [*preset.sampling.listed, 0]
        for now, after in zip(times, [*times[1:], 0]):
            if clean:
                x[:, 0] = first[0]
            told = family.pass_inputs(preset, x.shape[1], now, int(clean))["timestep_sinusoid"]
            velocity, kept = dit(x, told, dit.context(embeddings), bias, chunk)
            x = x + velocity * ((after - now) / 1000)
        if clean:
            x[:, 0] = first[0]
        memory.commit(kept)
        out.append(x.transpose(0, 1)[None])
    return out


def test_slots_are_plain_memory(generator: Generator, models: Models, recipe: Recipe) -> None:
    """Five chunks, so that every slot is written more than once."""
    session = generator.session(["a room"] * 5, seed=4, image=picture(), view=WALK, decode=False)
    first = session._first
    assert first is not None
    with torch.no_grad():
        wanted = plain_video(models, recipe, 5, first, WALK, 4)
    for chunk, one in zip(session, wanted, strict=True):
        assert float((chunk.latents - one).norm() / one.norm()) < 1e-5


def test_passes_that_fail_or_are_cancelled_leave_the_state(generator: Generator) -> None:
    session = generator.session(["a room"] * 4, image=picture(), view=WALK, decode=False)
    list(islice(session, 2))
    before, snapshot = digest(session), session.snapshot()
    real, passes = session.model.backend.run, []

    def failing(network: str, *rest: object, **more: object) -> object:
        if network == "dit":
            passes.append(network)
            if len(passes) in (1, 2, 3):
                if len(passes) == 3:
                    passes.clear()
                    raise RuntimeError("a fault")
        return real(network, *rest, **more)  # type: ignore[arg-type]

    session.model.backend.run = failing  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="a fault"):
        next(session)  # in the clean pass, after two denoise passes
    session.model.backend.run = real  # type: ignore[method-assign]
    assert digest(session) == before
    session.cancel()
    with pytest.raises(CancelledError):
        next(session)
    assert digest(session) == before and session.snapshot().position == snapshot.position
    third = next(session).latents
    session.restore(snapshot)
    assert digest(session) == before
    assert torch.equal(next(session).latents, third)


def test_a_saved_session_goes_on_bit_for_bit(generator: Generator, tmp_path: Path) -> None:
    poses = np.tile(np.eye(4), (97, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 97)
    for view in (WALK, View(camera=poses)):
        session = generator.session(["a room"] * 4, image=picture(), view=view)
        list(islice(session, 2))
        session.steer(pose=np.eye(4), from_chunk=3)
        session.save(tmp_path / "half.safetensors")
        wanted = [chunk.latents for chunk in session]
        again = generator.load_session(tmp_path / "half.safetensors")
        got = [chunk.latents for chunk in again]
        assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_a_retake_goes_back_with_its_camera(generator: Generator) -> None:
    session = generator.session(["a room"] * 4, image=picture(), view=WALK, decode=False, retakes=True)
    wanted = [chunk.latents for chunk in session]
    for start in (0, 2):
        again = session.retake(start)
        assert all(torch.equal(chunk.latents, one) for chunk, one in zip(again, wanted[start:], strict=True))


def test_slots_take_turns() -> None:
    turns, rows = Turns(3), []
    for _ in range(6):
        inputs = turns.inputs
        rows.append((inputs["table"], inputs["read_slot"][0], inputs["write_slot"][0]))
        assert inputs["write_slot"][0] not in inputs["table"][:-1]
        assert inputs["write_slot"][0] % 2 != inputs["read_slot"][0]
        turns = turns_from_json(turns.after.as_json())
    assert rows == [
        ((-1,), 1, 0),
        ((0, -1), 0, 1),
        ((0, 1, -1), 1, 2),
        ((0, 2, -1), 0, 1),
        ((0, 1, -1), 1, 2),
        ((0, 2, -1), 0, 1),
    ]
    with pytest.raises(LongtakeError, match="no cuts"):
        turns.plan(cut=True)


def test_steering_shapes_the_chunk_it_names_and_no_other(generator: Generator) -> None:
    def video(*changes: tuple[int, dict[str, object]]) -> list[Tensor]:
        session = generator.session(["a room"] * 4, image=picture(), decode=False)
        out = []
        for index in range(4):
            for at, change in changes:
                if at == index:
                    assert session.steer(**change) == change.get("from_chunk", index)  # type: ignore[arg-type]
            out.append(next(session).latents)
        return out

    still = video()
    for changes in (
        [(2, {"action": "w"})],
        [(0, {"action": "w", "from_chunk": 2})],
        [(2, {"velocity": (1.0, 0, 0, 0)})],
    ):
        moved = video(*changes)
        assert [torch.equal(a, b) for a, b in zip(still, moved)] == [True, True, False, False]


def test_a_retake_goes_where_the_camera_went(generator: Generator) -> None:
    session = generator.session(["a room"] * 5, image=picture(), decode=False, retakes=True)
    made = [next(session).latents]
    session.steer(action="w")
    made += [next(session).latents for _ in range(2)]
    session.steer(velocity=(0, 0, 20, 0))
    made.append(next(session).latents)
    session.steer(action="s")
    takes = {start: list(session.retake(start)) for start in (0, 1, 3, 4)}
    made += [chunk.latents for chunk in session]
    for start, take in takes.items():
        assert [torch.equal(a.latents, b) for a, b in zip(take, made[start:], strict=True)] == [True] * (5 - start)


def test_a_chunk_that_is_taken_back_keeps_where_the_camera_goes(generator: Generator) -> None:
    session = generator.session(["a room"] * 4, image=picture())
    decoder = session._decoding.decoder  # type: ignore[union-attr]
    real, left = decoder.decode, [0]

    def broken(*words: object) -> object:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("broken")
        return real(*words)  # type: ignore[arg-type]

    decoder.decode = broken  # type: ignore[method-assign]
    session.steer(action="d")
    assert len(next(session).frames) == 25
    left[0] = 1
    failed = next(session)
    session.steer(action="w", from_chunk=2)
    with pytest.raises(RuntimeError, match="broken"):
        _ = failed.frames
    again = list(session)
    whole = generator.session(["a room"] * 4, image=picture())
    whole.steer(action="d")
    next(whole), next(whole)
    whole.steer(action="w")
    assert [chunk.index for chunk in again] == [1, 2, 3]
    for chunk, other in zip(again[1:], whole, strict=True):
        assert torch.equal(chunk.latents, other.latents)


def test_a_target_is_reached_in_one_chunk_and_kept(generator: Generator) -> None:
    target = np.eye(4)
    target[:3, :3] = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
    target[:3, 3] = [0.5, 0, 1]
    session = generator.session(["a room"] * 3, image=picture(), decode=False)
    next(session)
    session.steer(pose=target)
    next(session)
    assert np.abs(np.array(session._position.camera.walk.pose).reshape(4, 4) - target).max() < 1e-9  # type: ignore[union-attr]
    next(session)
    assert np.abs(np.array(session._position.camera.walk.pose).reshape(4, 4) - target).max() < 1e-9  # type: ignore[union-attr]


def test_timesteps_are_the_presets_unless_others_are_asked_for(generator: Generator, preset: Preset) -> None:
    assert generator.session(["a room"], image=picture()).options.schedule.timesteps == (1000, 727)
    asked = generator.session(["a room"], image=picture(), sampling=Sampling(timesteps=(900, 500, 100)))
    assert asked.options.schedule.timesteps == (900, 500, 100)
    times = generator.model.family.pass_inputs(preset, 4, 727.9, 1)["timestep_sinusoid"]
    same = generator.model.family.pass_inputs(preset, 4, 727, 1)["timestep_sinusoid"]
    assert torch.equal(times, same) and torch.equal(
        times[0], generator.model.family.pass_inputs(preset, 4, 0, 0)["timestep_sinusoid"][0]
    )
    assert replace(preset).first_frame(2) == 7
