"""Videos that start from a picture or go on from a clip: on the toy backend, and on the shipped VAE in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from untrained import random_models

from longtake.errors import LongtakeError
from longtake.formats.recipe import recipe_named
from longtake.image import image_from_file, image_from_picture, image_from_pixels
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.clip import latents_from_clip
from longtake.runtime.generator import Generator
from longtake.runtime.start import one_a_chunk
from longtake.runtime.story import Segment, story_from_file
from longtake.runtime.video_model import VideoModel
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import TINY
from longtake.training.models.text.words import tokenize
from longtake.training.models.wan.rope import timestep_sinusoid
from longtake.video import write_video

Make = Callable[[Any], Generator]


class FlatEncoder:
    """A latent is the mean colour of its frames."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def encode(self, frames_CTHW: Tensor) -> Tensor:
        assert frames_CTHW.dtype == torch.float32 and frames_CTHW.shape[0] == 3 and frames_CTHW.abs().max() <= 1
        self.groups.append(frames_CTHW.shape[1])
        return frames_CTHW.mean() * torch.ones(1, 16, 8, 8)


@pytest.fixture
def encoders(toy: Any) -> list[FlatEncoder]:
    """Gives the toy backend an encoder; the ones it handed out."""
    made: list[FlatEncoder] = []
    toy.new_encoder = lambda: (made.append(FlatEncoder()), made[-1])[1]
    return made


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "first.png"
    Image.fromarray(np.full((50, 70, 3), 200, np.uint8)).save(path)
    return path


def clip_of(path: Path, frames: int, fps: int = 24) -> Path:
    """Flat frames; number k has brightness 3 k."""
    pixels = (3 * np.arange(frames, dtype=np.uint8))[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    write_video(path, pixels, fps)
    return path


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_is_resized_without_cropping_or_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((40, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[:, :100] = 0
    Image.fromarray(stripes).save(tmp_path / "p.png")
    got = image_from_file(tmp_path / "p.png", 20, 40)
    assert got.shape == (3, 20, 40) and got.dtype == torch.float32
    assert torch.all(got[:, :, :9] == -1)  # the left quarter is all there
    assert got[:, :, 12:].abs().max() < 0.1  # one-pixel stripes become grey


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_is_read(tmp_path: Path, mode: str) -> None:
    ending = "tif" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(tmp_path / "p.png")
    else:
        Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(tmp_path / f"p.{ending}")
    assert image_from_file(tmp_path / f"p.{ending}", 16, 16).min() > 0.98


def test_a_picture_lying_on_its_side_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright: what was left is then on top
    Image.fromarray(pixels).save(tmp_path / "p.jpg", exif=exif, quality=95)
    got = image_from_file(tmp_path / "p.jpg", 64, 32)
    assert got[:, :24].mean() > 0.9 and got[:, 40:].mean() < -0.9


def test_what_is_clear_becomes_black(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(tmp_path / "p.png")
    assert torch.all(image_from_file(tmp_path / "p.png", 16, 16) == -1)


def test_pixels_are_checked() -> None:
    with pytest.raises(LongtakeError, match="this is not an image"):
        image_from_pixels(np.zeros((64, 64, 2), np.uint8), 16, 16)
    with pytest.raises(LongtakeError, match="(?s)of unknown range.*from 0 to 255.*pixels / 255"):
        image_from_pixels(np.linspace(0, 255, 64 * 64).reshape(64, 64), 16, 16)


@pytest.mark.parametrize("kind", ["float", "grey", "rgba", "PIL", "PIL grey", "PIL rgba"])
def test_pictures_of_any_kind_are_the_same_picture(kind: str) -> None:
    grey = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) % 251
    plain = np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    clear = np.concatenate([plain, np.full((32, 32, 1), 255, np.uint8)], -1)
    wanted = image_from_pixels(plain, 32, 32)
    pixels = {"float": plain / 255, "grey": grey.astype(np.uint8), "rgba": clear}
    if kind in pixels:
        got = image_from_pixels(pixels[kind], 32, 32)
    else:
        given = {"PIL": plain, "PIL grey": grey.astype(np.uint8), "PIL rgba": clear}[kind]
        got = image_from_picture(Image.fromarray(given), 32, 32)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBX", "RGBa", "HSV", "CMYK", "YCbCr", "F", "I;16"])
def test_a_pil_image_of_any_mode_is_a_picture(mode: str) -> None:
    if mode in ("F", "I;16"):
        given = Image.fromarray(np.full((32, 32), *((1.0, np.float32) if mode == "F" else (65535, np.uint16))))
    else:
        between = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
        given = Image.new("RGB", (32, 32), "white").convert(between).convert(mode)
    assert given.mode == mode
    assert image_from_picture(given, 32, 32).min() > 0.98


def test_a_pil_image_of_integers_has_no_known_range() -> None:
    with pytest.raises(LongtakeError, match="numbers whose range is unknown"):
        image_from_picture(Image.fromarray(np.full((32, 32), 255, np.int32)), 32, 32)


# ---- the first chunk -------------------------------------------------------------------------------------------------


def test_the_picture_is_latent_0_before_every_pass(
    toy: Any, make_generator: Make, encoders: Any, picture: Path
) -> None:
    """As the reference: latent 0 is clean at timestep 0 in each pass, all others are at the step's own timestep."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = toy.dit

    def watch(latents: Tensor, inputs: Any, *rest: Any) -> Tensor:
        seen.append((latents[:, :, 0].clone(), inputs["timestep_sinusoid"].clone()))
        return original(latents, inputs, *rest)

    toy.dit = watch
    session = make_generator(toy).session(["x"] * 2, steps=3, guidance=2.0, image=picture)
    chunk = next(session)
    clean = torch.full((1, 16, 8, 8), 200 / 127.5 - 1)
    assert encoders[0].groups == [1]
    assert len(seen) == 8 and all(torch.allclose(latent, clean, atol=1e-6) for latent, _ in seen)
    zero, first = timestep_sinusoid([0.0], 256)[0], timestep_sinusoid([999.0], 256)[0]
    assert all(torch.equal(sinusoid[0], zero) for _, sinusoid in seen)
    assert all(torch.equal(row, first) for row in seen[0][1][1:])
    assert all(not torch.equal(sinusoid[1], zero) for _, sinusoid in seen[:6])
    assert torch.allclose(chunk.latents[:, 0], clean, atol=1e-6) and chunk.latents.shape[1] == 8
    assert len(chunk.frames) == 29  # the picture takes the place of a latent, it adds none
    seen.clear()
    next(session)
    assert not any(torch.allclose(latent, clean, atol=1e-3) for latent, _ in seen)
    assert all(not torch.equal(sinusoid[0], zero) for _, sinusoid in seen[:6])


def test_pixels_do_as_well_as_a_file(toy: Any, make_generator: Make, encoders: Any, picture: Path) -> None:
    generator = make_generator(toy)
    chunks = [next(generator.session(["x"], steps=1, guidance=1.0, image=image))
              for image in (picture, str(picture), np.asarray(Image.open(picture)))]  # fmt: skip
    assert all(torch.equal(chunk.latents, chunks[0].latents) for chunk in chunks)


def test_a_session_saved_before_its_first_chunk_keeps_the_picture(
    toy: Any, make_generator: Make, encoders: Any, picture: Path, tmp_path: Path
) -> None:
    generator = make_generator(toy)
    with generator.session(["x"] * 2, steps=2, guidance=1.0, image=picture) as session:
        session.save(tmp_path / "s.safetensors")
        expected = [chunk.latents for chunk in session]
        session.save(tmp_path / "late.safetensors")
    with generator.load_session(tmp_path / "s.safetensors") as loaded:
        assert all(torch.equal(chunk.latents, wanted) for chunk, wanted in zip(loaded, expected, strict=True))
    with generator.load_session(tmp_path / "late.safetensors") as late:
        assert late._first is None


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_a_clip_keeps_its_end(toy: Any, encoders: Any, tmp_path: Path) -> None:
    """70 frames are two chunks of 29 and 32: the first nine are left out."""
    latents = latents_from_clip(clip_of(tmp_path / "c.mp4", 70), VideoModel(toy))
    assert latents.shape == (1, 16, 16, 8, 8) and encoders[0].groups == [1] + [4] * 15
    brightness = (latents.mean(dim=(0, 2, 3, 4)) + 1) * 127.5
    wanted = [9.0, *(np.arange(10, 70).reshape(-1, 4).mean(1))]
    assert np.abs(brightness.numpy() / 3 - np.array(wanted)).max() < 0.9  # h264 leaves it so; the next frame is 1 off


def test_a_clip_of_another_rate_is_resampled(toy: Any, encoders: Any, tmp_path: Path) -> None:
    assert (
        latents_from_clip(clip_of(tmp_path / "c.mp4", 40, fps=12), VideoModel(toy)).shape[1] == 16
    )  # 80 frames at 24 a second


def test_the_clip_fills_the_cache_and_the_decoder(toy: Any, make_generator: Make, tmp_path: Path) -> None:
    """Going on from generated latents is going on: same chunks, same frames, as if it had never stopped."""
    generator = make_generator(toy)
    prompts = ["a red one", "a blue two", "a green three"]
    whole = list(generator.session([*prompts, "end"], seed=3, steps=2, guidance=2.0))
    latents = torch.cat([chunk.latents for chunk in whole[:3]], dim=1)
    save_file({"latents": latents[0].contiguous()}, str(tmp_path / "clip.safetensors"))
    for clip in (latents, tmp_path / "clip.safetensors"):
        session = generator.session(["end"], seed=3, steps=2, guidance=2.0, continue_from=clip, clip=prompts)
        assert session.next_index == 3
        (chunk,) = session
        assert chunk.index == 3 and torch.equal(chunk.latents, whole[3].latents)
        assert np.array_equal(chunk.frames, whole[3].frames) and len(chunk.frames) == 32


def test_each_chunk_of_a_clip_has_its_own_prompt(toy: Any, make_generator: Make) -> None:
    texts: list[str] = []
    generator = Generator(toy, lambda prompts, length: (texts.extend(prompts), make_tokens(length))[1])
    script = (Segment("a"), Segment("b", 1, cut=True))
    latents = torch.zeros(1, 32, 16, 8, 8)
    session = generator.session(["c"], steps=1, guidance=1.0, continue_from=latents, clip=script)
    assert texts == ["a", "The scene transitions. b", "b"]  # the fourth chunk's is kept
    assert session._position.shot == 1 and next(session).visible == (0, 1, 3, 4)
    generator.session(["c"], steps=1, guidance=1.0, continue_from=latents)
    assert texts[3:] == ["c", "c"]  # of the chunk above, then of this clip's four


def make_tokens(length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.int32)


def test_a_live_change_waits_for_the_next_generated_chunk(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0)
    session.change_prompt("y")
    fed = session.feed(torch.zeros(1, 8, 16, 8, 8), "seen")
    assert fed.prompt == "seen" and len(fed.frames) == 29 and session.remaining == 1
    assert next(session).prompt == "y"


def test_a_failed_feed_leaves_the_session_as_it_was(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0)
    toy.fail_at(3, RuntimeError("boom"))  # its clean pass
    with pytest.raises(RuntimeError):
        session.feed(torch.zeros(1, 8, 16, 8, 8), "seen")
    assert session.next_index == 0 and session.change_prompt("y") == 0
    with pytest.raises(LongtakeError, match="these latents are not a chunk"):
        session.feed(torch.zeros(1, 7, 16, 8, 8), "seen")


def test_both_starts_at_once_are_refused(toy: Any, make_generator: Make, encoders: Any, picture: Path) -> None:
    with pytest.raises(LongtakeError, match="starts from an image or from a clip"):
        make_generator(toy).session(["x"], image=picture, continue_from=torch.zeros(1, 8, 16, 8, 8))
    with pytest.raises(LongtakeError, match="a clip's prompt was given, but no clip"):
        make_generator(toy).session(["x"], clip=["y"])


def test_a_story_says_what_it_starts_from(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("image: p.png\nshots: [{prompt: x}]\n")
    assert story_from_file(tmp_path / "s.yaml").image == tmp_path / "p.png"
    (tmp_path / "s.yaml").write_text(
        "continue_from: {clip: c.mp4, shots: [{prompt: a, chunks: 2}, {prompt: b}]}\nshots: [{prompt: x}]\n"
    )
    story = story_from_file(tmp_path / "s.yaml")
    assert story.clip == tmp_path / "c.mp4" and story.image is None
    assert list(one_a_chunk(story.clip_segments)) == [Segment("a"), Segment("a"), Segment("b", 1, True)]
    (tmp_path / "s.yaml").write_text("continue_from: c.mp4\nshots: [{prompt: x}]\n")
    assert story_from_file(tmp_path / "s.yaml").clip_segments == ()


# ---- the shipped VAE, in PyTorch ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_backend() -> Iterator[TorchBackend]:
    """The shipped VAE and text encoder with a DiT of one layer."""
    shipped = load_models(TINY)
    preset = replace(TINY, dit=replace(TINY.dit, layers=1))
    models = Models(preset, random_models(preset).dit, shipped.vae, shipped.text)
    backend = TorchBackend(recipe_named("tiny_bf16_sm90"), models)
    yield backend
    backend.close()


def vae_of(backend: TorchBackend) -> Any:
    return backend._modules["vae_first"].vae


def test_encoding_in_groups_is_encoding_the_whole(torch_backend: TorchBackend) -> None:
    video = torch.rand(3, 13, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        whole = vae_of(torch_backend).encode(video[None])
    encoder = VideoModel(torch_backend).encoder()
    latents = [encoder.encode(group).clone() for group in (video[:, :1], *video[:, 1:].split(4, dim=1))]
    assert torch.allclose(torch.stack(latents, dim=1), whole, atol=1e-4)


def test_the_first_frame_looks_like_the_picture(torch_backend: TorchBackend) -> None:
    """Through the shipped VAE: the first frame of the video is the picture, up to what the VAE loses."""
    ramp = np.linspace(40, 215, 128, dtype=np.uint8)[None, :, None].repeat(128, 0).repeat(3, 2)
    generator = Generator(torch_backend, partial(tokenize, vocabulary=torch_backend.vocabulary))
    with generator.session(["a green seven"], steps=1, guidance=1.0, image=ramp) as session:
        frame = next(session).frames[0]
    assert np.abs(frame.astype(float) - ramp).mean() < 20
    with generator.session(["a green seven"], steps=1, guidance=1.0) as session:
        other = next(session).frames[0]
    assert np.abs(other.astype(float) - ramp).mean() > 30


def test_the_joint_of_a_clip_is_seamless(torch_backend: TorchBackend) -> None:
    """Latents cut in two and fed as a clip decode to the frames of one uninterrupted decode."""
    latents = torch.randn(1, 16, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    generator = Generator(torch_backend, partial(tokenize, vocabulary=torch_backend.vocabulary))
    with generator.session(["a"], steps=1, guidance=1.0, continue_from=latents[:, :8]) as session:
        after = session.feed(latents[:, 8:], "a").frames
    with torch.no_grad():
        whole = vae_of(torch_backend).decode(latents)[0, :, 29:]
    wanted = (whole * 127.5 + 127.5).round().clamp(0, 255).permute(1, 2, 3, 0).numpy()
    assert after.shape == wanted.shape == (32, 128, 128, 3)
    assert np.abs(after.astype(float) - wanted).max() <= 1
