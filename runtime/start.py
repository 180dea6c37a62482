"""What is asked of a session, and what its video starts from: nothing, a picture that is its first frame, or a clip.

What can be refused before a model is opened is refused then: what is missing of a model takes minutes to make.

Legend: F latent frames, C latent channels, h, w latent size, H, W sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.image import (
    LEAST_SIDE,
    image_from_file,
    image_from_pixels,
    pixels_from_file,
    pixels_from_picture,
    rgb_pixels,
)
from longtake.image_cover import covering
from longtake.runtime.camera import CameraPosition, require_cuts
from longtake.runtime.chunk import tensor_of
from longtake.runtime.clip import check_clip, latents_from_clip
from longtake.runtime.conditions import Embeddings, Noise, SessionInputs
from longtake.runtime.sampling import OnStep, checked_on_step
from longtake.runtime.session import Session
from longtake.runtime.session_options import Sampling, SessionOptions, sampling_of
from longtake.runtime.story import Script, Segment, Story, check_fits, fit_segments, frame_count, story_from_script
from longtake.runtime.video_model import VideoModel
from longtake.runtime.view import View, own_picture, require_picture
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset

# A file; pixels, uint8 or floats in 0..1, [H, W, 3], [H, W, 4] or [H, W]; or a PIL image
Picture: TypeAlias = "Path | str | np.ndarray[Any, Any] | Image.Image"
# A video, a file of latents, or normalized latents fp32 [1, F, C, h, w], of torch or numpy
Clip: TypeAlias = "Path | str | Tensor | np.ndarray[Any, Any]"

NO_VIEW = View()

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Start:
    """At most one of image and clip is given. segments: what is seen in the clip."""

    image: Picture | None = None
    clip: Clip | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        """Raise LongtakeError for both at once."""
        if self.image is not None and self.clip is not None:
            what = "a video starts from an image or from a clip"
            raise LongtakeError(what, got="both", expected="one of the two", fix="leave one out")

    @property
    def told(self) -> dict[str, str]:
        """What a report says of it."""
        given = {"picture": self.image, "clip": self.clip}
        return {
            name: str(value) if isinstance(value, (str, Path)) else "given"
            for name, value in given.items()
            if value is not None
        }

    def check(self) -> None:
        """Raise LongtakeError for a picture or clip that cannot be used, as far as that is known without a model."""
        if isinstance(self.image, (str, Path)):
            image_from_file(self.image, LEAST_SIDE, LEAST_SIDE)
        elif self.image is not None:
            self._pixels()
        if isinstance(self.clip, (str, Path)):
            check_clip(Path(self.clip))
        elif self.clip is not None:
            tensor_of(self.clip, "a path, or ")

    def _pixels(self) -> np.ndarray:
        """The given picture as it is, uint8 [H, W, 3]."""
        if isinstance(self.image, (str, Path)):
            return pixels_from_file(self.image)
        if isinstance(self.image, np.ndarray):
            return rgb_pixels(self.image)
        if hasattr(self.image, "getexif"):
            return pixels_from_picture(self.image)
        what, got = "this is not an image", type(self.image).__name__
        expected, fix = "a path, a PIL image, or an array [H, W, 3]", "pass one of these"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)

    def picture_hw(self, preset: Preset) -> tuple[int, int]:
        """Height and width of the given picture, the video's if there is none."""
        if self.image is None:
            return preset.height, preset.width
        pixels = self._pixels()
        return pixels.shape[0], pixels.shape[1]

    def encoded(self, model: VideoModel) -> tuple[Tensor | None, Tensor | None]:
        """The picture's latent, fp32 [1, C, h, w], and the clip's, fp32 [1, F, C, h, w]; None for what isn't given.

        Raises:
            LongtakeError: the picture or clip cannot be used, or `model` cannot encode.
        """
        try:
            clip = None if self.clip is None else latents_from_clip(self.clip, model)
            return self._first_latent(model), clip
        finally:
            if model.device.type == "cuda":
                torch.cuda.empty_cache()  # what the encoder took: the caches to come would not fit into its places

    def _first_latent(self, model: VideoModel) -> Tensor | None:
        if self.image is None:
            return None
        size = model.preset.height, model.preset.width
        cover = "camera" in model.family.can
        pixels = covering(self._pixels(), *size)[0] if cover else image_from_pixels(self._pixels(), *size)
        return model.encoder().encode(pixels[:, None]).clone()


def start_of(
    story: Story, image: Picture | None = None, continue_from: Clip | None = None, clip: Script | None = None
) -> Start:
    """What `story` starts from; a picture or clip given here takes the place of the story's.

    Args:
        clip: what is seen in the clip; the story's own words for it, else its first prompt, if None.

    Raises:
        LongtakeError: a picture and a clip at once, or words for a clip that isn't there.
    """
    if image is None and continue_from is None:
        image, continue_from = story.image, story.clip
    if clip is not None and continue_from is None:
        what, fix = "a clip's prompt was given, but no clip", "pass continue_from=FILE (--continue-from FILE), too"
        raise LongtakeError(what, got="no clip", expected="a clip to go on from", fix=fix)
    told = story_from_script(clip).segments if clip is not None else story.clip_segments
    return Start(image, continue_from, told or (Segment(story.segments[0].prompt),))


def take_in(session: Session, latents_BFCHW: Tensor | None, segments: tuple[Segment, ...]) -> Session:
    """Feed a clip, if there is one, to a new session, chunk by chunk, each with its own prompt; on an error it is closed.

    Raises:
        LongtakeError: the latents are not whole chunks of the session's preset.
    """
    if latents_BFCHW is None:
        return session
    try:
        preset = session.model.preset
        first, rest = latents_BFCHW.tensor_split([preset.frames_of(0)], dim=1)
        chunks = [first, *(rest.split(preset.chunk_latents, dim=1) if rest.shape[1] else ())]
        for chunk, segment in zip(chunks, one_a_chunk(fit_segments(segments, len(chunks))), strict=True):
            session.feed(chunk, segment.prompt, segment.cut)
    except BaseException:
        session.close(discard=True)
        raise
    return session


def one_a_chunk(segments: tuple[Segment, ...]) -> Iterator[Segment]:
    """`segments` taken apart into segments of one chunk; a cut is the first one's."""
    for segment in segments:
        for index in range(segment.chunks):
            yield Segment(segment.prompt, 1, segment.cut and index == 0)


@dataclass(frozen=True)
class Request:
    """The parameters of `Generator.session`."""

    script: Script
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampling: Sampling | None = None
    noise: Noise | None = None
    embeddings: Embeddings | None = None
    negative_prompt: str | None = None
    chunks: int | None = None
    decode: bool = True
    endless: bool = False
    retakes: bool = False
    image: Picture | None = None
    continue_from: Clip | None = None
    clip: Script | None = None
    on_step: OnStep | None = None
    view: View = NO_VIEW

    @cached_property
    def story(self) -> Story:
        return story_from_script(self.script)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The script, as long as the video is to be."""
        return self.story.segments if self.chunks is None else fit_segments(self.story.segments, self.chunks)

    @property
    def start(self) -> Start:
        return start_of(self.story, self.image, self.continue_from, self.clip)

    def check(self) -> Request:
        """This, unless no model could make it: raises what `Generator.session` would."""
        asked, story = sampling_of(self.sampling, self.steps, self.guidance), self.story
        told = {"seed": self.seed, "negative_prompt": self.negative_prompt, **vars(asked)}
        told = {name: getattr(story, name, None) if value is None else value for name, value in told.items()}
        SessionOptions(**{name: value for name, value in told.items() if value is not None})  # type: ignore[arg-type]
        checked_on_step(self.on_step)
        SessionInputs(self.noise, self.embeddings)
        self.view.over(view_of(story)).check_values()
        self.start.check()
        _ = self.segments
        return self

    def check_for(self, preset: Preset) -> None:
        """Raise what `Generator.session` would, as far as the model's preset tells."""
        start, segments = self.start, self.segments
        check_fits(self.story, preset, continued=start.clip is not None)
        start, view = world_of(self.story, start, self.view, preset)
        camera_of(view, start, preset, segments, self.endless)
        # How long a clip is, which is part of the video, shows when it is encoded: then the noise may yet be too short.
        SessionInputs(self.noise).require_noise(preset, sum(segment.chunks for segment in segments), self.endless)


def view_of(story: Story) -> View:
    """Where a story's camera goes."""
    return View(story.action, story.camera, story.intrinsics, story.speed, story.turn)


def world_of(story: Story, start: Start, view: View, preset: Preset) -> tuple[Start, View]:
    """What a model with cameras starts from: a picture always, and a view. Raises LongtakeError for what it cannot do."""
    can, view = family_of(preset).can, view.over(view_of(story))
    view.check(can, preset)
    if any(segment.cut for segment in story.segments):
        require_cuts(can, f"story {story.name} with a cut")
    if "camera" in can and start.clip is not None:
        require_picture(start.told["clip"])
    return replace(start, image=own_picture(preset)) if "camera" in can and start.image is None else start, view


def camera_of(
    view: View, start: Start, preset: Preset, segments: Sequence[Segment], endless: bool
) -> CameraPosition | None:
    """Where the camera of a model with cameras is before the first frame. Raises LongtakeError for what is no way of one."""
    if "camera" not in family_of(preset).can:
        return None
    if endless and view.camera is not None:
        what, fix = "a camera's path ends, an endless session does not", "pass an action, or steer the session"
        raise LongtakeError(what, got="both", expected="one of the two", fix=fix)
    frames = frame_count(preset, sum(segment.chunks for segment in segments))
    return view.position(preset, start.picture_hw(preset), frames)
