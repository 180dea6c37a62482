"""What a session is asked for, checked before a model is opened: what is missing of a model takes minutes to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from longtake.errors import LongtakeError
from longtake.runtime.camera import CameraPosition, require_cuts
from longtake.runtime.conditions import Embeddings, Noise, SessionInputs
from longtake.runtime.sampling import OnStep, checked_on_step
from longtake.runtime.session_options import Sampling, SessionOptions, sampling_of
from longtake.runtime.start import Clip, Picture, Start, start_of
from longtake.runtime.story import Script, Segment, Story, check_fits, fit_segments, frame_count, story_from_script
from longtake.runtime.view import View, own_picture, require_picture
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset

NO_VIEW = View()


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
