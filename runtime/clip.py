"""Clips that a video goes on from, as latents: encoded from a video file, or read from a file of latents.

Legend: F latent frames, C latent channels, h, w latent size, T video frames, H, W sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.image import image_from_pixels
from longtake.runtime.chunk import finite, tensor_of
from longtake.runtime.snapshot import FORMAT as SESSION_FORMAT
from longtake.runtime.story import frame_count
from longtake.runtime.video_model import VideoModel
from longtake.tensor_file import tensors_in
from longtake.training.models.presets import Preset

log = logging.getLogger(__name__)

LATENTS = "latents"  # the tensor's name in a file of latents


def latents_from_clip(path: Path | str | Tensor | np.ndarray, model: VideoModel) -> Tensor:
    """A clip's normalized latents, fp32 [1, F, C, h, w], F a whole number of chunks.

    A file of latents is a safetensors file with one tensor "latents", [F, C, h, w] or [1, F, C, h, w]; a tensor will do as well.
    A video is resampled to the preset's frame rate, by time stamps, and resized to its size, without cropping. Of what is not a whole
    number of chunks the *beginning* is left out: the new frames follow on the clip's last one. Only one group of frames
    is in memory at a time, so a clip may be of any length.

    Raises:
        LongtakeError: missing, not a video or file of latents, too short, of another preset; or the model cannot
            encode.
        IntegrityError: a file of latents is damaged.
    """
    from longtake.video import count_frames, frames_one_by_one

    if not isinstance(path, (str, Path)):
        return _checked("continue_from", tensor_of(path, "a path, or "), [], model.preset)
    source, preset = Path(path), model.preset
    if source.suffix.lower() == ".safetensors":
        return _checked(source, *_latents_in(source), preset)
    count = count_frames(source, preset.fps)
    skip = count - _whole(count, preset)
    if skip == count:
        what = f"{source} is too short to go on from"
        got, expected = f"{count} frames at {preset.fps} a second", f"at least {frame_count(preset, 1)}, one chunk"
        raise LongtakeError(what, got=got, expected=expected, fix="pass a longer clip")
    video = islice(frames_one_by_one(source, (preset.height, preset.width), preset.fps), skip, None)
    encoder = model.encoder()
    latents = [encoder.encode(group).to("cpu", copy=True) for group in _groups(video, preset.vae.stride[0])]
    whole = preset.first_frame(preset.whole_chunks(len(latents)))
    if not whole:  # the file said that it had more frames than came
        what, got = f"{source} ends too early", f"{len(latents)} latents"
        raise LongtakeError(what, got=got, expected=f"at least {preset.frames_of(0)}", fix="convert it to mp4")
    log.info("%s: %d of %d frames, %d latents", source, count - skip, count, whole)
    return torch.stack(latents[:whole], dim=1)


def latents_from_frames(frames_THWC: np.ndarray, model: VideoModel) -> Tensor:
    """Frames uint8 [T, H, W, 3], at the preset's rate, as `latents_from_clip` gives a video's; the end is left out.

    Raises:
        LongtakeError: they are none, too few for a chunk, or the model cannot encode.
    """
    preset, shape = model.preset, tuple(getattr(frames_THWC, "shape", ()))
    if not isinstance(frames_THWC, np.ndarray) or frames_THWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        got = f"{getattr(frames_THWC, 'dtype', type(frames_THWC).__name__)} {shape or ''}"
        fix = "pass RGB frames, 0 to 255, such as np.stack(pictures)"
        raise LongtakeError("these are no frames", got=got, expected="uint8 [T, H, W, 3] of numpy", fix=fix)
    whole = _whole(shape[0], preset)
    if not whole:
        got, expected = f"{shape[0]} frames at {preset.fps} a second", f"at least {frame_count(preset, 1)}, one chunk"
        raise LongtakeError("the clip is too short to encode", got=got, expected=expected, fix="pass a longer clip")
    size = preset.height, preset.width
    pixels = (image_from_pixels(frame, *size).permute(1, 2, 0) for frame in frames_THWC[:whole])
    bytes_ = (pixel.add(1).mul(127.5).round().to(torch.uint8).numpy() for pixel in pixels)
    encoder = model.encoder()
    latents = [encoder.encode(group).to("cpu", copy=True) for group in _groups(bytes_, preset.vae.stride[0])]
    return torch.stack(latents, dim=1)


def check_clip(source: Path) -> None:
    """Raise what `latents_from_clip` does, as far as that is known without a model."""
    if source.suffix.lower() == ".safetensors":
        _latents_in(source)
    else:
        from longtake.video import probe_video

        probe_video(source)


def _is_whole(latents: int, preset: Preset) -> bool:
    """Whether that many latents are one chunk or several, with nothing left over."""
    chunks = preset.whole_chunks(latents)
    return chunks > 0 and preset.first_frame(chunks) == latents


def _whole(frames: int, preset: Preset) -> int:
    """The most frames, up to `frames`, that are a whole number of chunks; 0 if there are too few for one."""
    chunks = preset.whole_chunks((frames + preset.vae.stride[0] - 1) // preset.vae.stride[0])
    return frame_count(preset, chunks) if chunks else 0


def _groups(frames: Iterator[np.ndarray], size: int) -> Iterator[Tensor]:
    """What one call of the encoder takes, fp32 [3, T, H, W] in [-1, 1]: the first frame, then `size` at a time."""
    wanted = 1
    while len(group := list(islice(frames, wanted))) == wanted:
        pixels = torch.from_numpy(np.stack(group)).permute(3, 0, 1, 2)
        yield pixels.float().div_(127.5).sub_(1.0)
        wanted = size


def _latents_in(source: Path) -> tuple[Tensor | None, list[str]]:
    """The tensor called "latents", if there is one, and the names of all."""
    if not source.is_file():
        what = f"{source} does not exist" if not source.exists() else f"{source} is not a file"
        got = "a folder" if source.is_dir() else "nothing there"
        raise LongtakeError(what, got=got, expected="a file of latents", fix="check the path")
    with tensors_in(source, "is no readable file of latents", "write it again") as opened:
        if (opened.metadata() or {}).get("format") == SESSION_FORMAT:
            what = f"{source} is a saved session, not a clip"
            got, fix = "a file from --save-session", f"load_session({str(source)!r}), or --load-session {source}"
            raise LongtakeError(what, got=got, expected="a video or a file of latents", fix=fix)
        names = list(opened.keys())
        latents = opened.get_tensor(LATENTS) if LATENTS in names else None
    return latents, names


def _checked(source: Path | str, latents: Tensor | None, names: list[str], preset: Preset) -> Tensor:
    frame = (preset.vae.z_channels, *preset.latent_hw)
    expected = (
        f"latents of preset {preset.name}, [F, {', '.join(map(str, frame))}], F a multiple of {preset.chunk_latents}"
    )
    if latents is None:
        got, named = ", ".join(names)[:120] or "no tensors", f"a tensor named {LATENTS!r}: {expected}"
        raise LongtakeError(f"{source} holds no latents", got=got, expected=named, fix="pass a video, or name it so")
    frames = latents[None] if latents.ndim == 4 else latents
    good = frames.ndim == 5 and frames.shape[0] == 1 and tuple(frames.shape[2:]) == frame
    if not good or not _is_whole(frames.shape[1], preset) or not frames.is_floating_point():
        what, got = f"the latents in {source} do not fit", f"{latents.dtype} {tuple(latents.shape)}"
        fix = "encode the clip with this preset's VAE (generator.encode(frames)), or pass the video"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return finite(frames, f"the latents in {source}").contiguous()
