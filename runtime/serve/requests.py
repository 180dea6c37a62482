"""From what a client asks for to a session's description: everything that can be checked is checked here, before it waits."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.formats.model_name import parts_of_full
from longtake.runtime.serve.contract import ServeError, Video, refused
from longtake.runtime.serve.journal import Meta
from longtake.runtime.serve.limits import Limits
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.story import PATHS, Segment, Story, checked_prompt, fit_segments, story_from_mapping
from longtake.training.models.sana_wm.actions import keys_of_frames
from longtake.training.models.text.words import word_tokenizer
from longtake.video import count_frames

DEFAULT_SECONDS = 4.0
SAMPLED = ("seed", "steps", "guidance", "negative_prompt", "shift", "timesteps")  # of a request, in an identity
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Asker:
    """Who asks, and what is served. about: of `describe.description`."""

    user: str
    about: dict[str, Any]
    limits: Limits
    codec: str = "h264"


def chunks_of(frames: int, about: dict[str, Any]) -> int:
    """Chunks that `frames` frames take."""
    first, later = about["first_chunk_frames"], about["chunk_frames"]
    return 1 if frames <= first else 1 + -(-(frames - first) // later)


def frames_of(chunks: int, about: dict[str, Any]) -> int:
    return int(about["first_chunk_frames"] + (chunks - 1) * about["chunk_frames"]) if chunks else 0


def checked_text(text: str, what: str, asker: Asker, read: bool = True) -> str:
    """A prompt. Raises ServeError bad_prompt, also where a small text encoder is to `read` it and knows few of its words."""
    most, words = asker.limits.prompt_bytes, asker.about["words"]
    try:
        if (size := len(checked_prompt(text, what).encode())) > most:
            expected = f"at most {most}"
            raise LongtakeError(f"{what} is too long", got=f"{size} bytes", expected=expected, fix="shorten it")
        if read and words is not None:
            word_tokenizer(words).check([text])
    except LongtakeError as error:
        raise refused("bad_prompt", error, param="prompt") from None
    return text


def checked_story(given: dict[str, Any], asker: Asker) -> Story:
    """A story from its JSON form. Raises ServeError bad_story."""
    limits, about = asker.limits, asker.about
    if len(json.dumps(given)) > limits.story_bytes:
        raise ServeError(
            "bad_story", "the story is too long", param="story", detail={"expected": f"{limits.story_bytes} bytes"}
        )
    if named := [key for key in PATHS if key in given]:
        fix = "send the picture with the request"
        raise ServeError(
            "bad_story", f"a story that is sent names no files: {named[0]}", param="story", detail={"fix": fix}
        )
    try:
        story = story_from_mapping(given, Path("story"))
    except LongtakeError as error:
        raise refused("bad_story", error, param="story") from None
    for key in ("preset", "width", "height", "fps"):
        if getattr(story, key) not in (None, about[key]):
            detail = {"got": str(getattr(story, key)), "expected": str(about[key]), "fix": f"leave {key} out"}
            raise ServeError("bad_story", f"the story's {key} is not the model's", param="story", detail=detail)
    if len(story.segments) > limits.story_segments:
        detail = {"got": str(len(story.segments)), "expected": f"at most {limits.story_segments}"}
        raise ServeError("bad_story", "the story has too many segments", param="story", detail=detail)
    for segment in story.segments:
        checked_text(segment.prompt, "a prompt of the story", asker)
    if view_of(story) and not about["can"]["camera"]:
        raise ServeError(
            "not_supported", "this model has no camera", param="story", detail={"got": ", ".join(view_of(story))}
        )
    return story


def view_of(story: Story | None) -> dict[str, Any]:
    """Where a story's camera goes. Raises ServeError bad_story."""
    view = {key: getattr(story, key, None) for key in ("action", "speed", "turn")}
    try:
        keys_of_frames(view["action"] or "none-1")
    except LongtakeError as error:
        raise refused("bad_story", error, param="story") from None
    return {key: value for key, value in view.items() if value is not None}


def names_of(about: dict[str, Any]) -> set[str]:
    """What a client may call the model that is served: NAME@RECIPE, each alone, and its preset."""
    return {about["model"], *parts_of_full(about["model"]), about["preset"]}


def check_same_size(body: Video, about: dict[str, Any]) -> None:
    """Raise ServeError for a model, size or rate that is not served."""
    if body.model and body.model not in names_of(about):
        detail = {"got": str(body.model)[:100], "expected": about["model"], "fix": "leave model out"}
        raise ServeError("model_not_found", "this model is not served here", status=404, param="model", detail=detail)
    width, height = about["width"], about["height"]
    sizes = {"size": body.size and body.size.lower(), "width": body.width, "height": body.height}
    wanted = {"size": f"{width}x{height}", "width": width, "height": height}
    for name, value in sizes.items():
        if value not in (None, "", "auto", wanted[name]):
            detail = {"got": str(value)[:40], "expected": str(wanted[name]), "fix": f"leave {name} out"}
            raise ServeError("bad_size", "the model makes another size", param=name, detail=detail)
    if body.fps not in (None, about["fps"]):
        detail = {"got": str(body.fps), "expected": str(about["fps"]), "fix": "leave fps out"}
        raise ServeError("bad_fps", "the model makes another frame rate", param="fps", detail=detail)


def seconds_of(given: str | float) -> float:
    """Seconds as text or number. Raises ServeError bad_length."""
    try:
        seconds = float(given)
        if (
            not (math.isfinite(seconds) and seconds > 0)
            or isinstance(given, str)
            and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", given)
        ):
            raise ValueError
    except ValueError:
        detail = {"got": str(given)[:40], "expected": "seconds, above 0", "fix": 'pass "4"'}
        raise ServeError("bad_length", "bad length", param="seconds", detail=detail) from None
    return seconds


def length(body: Video, story: Story | None, asker: Asker, most: int) -> tuple[int, int | None]:
    """Chunks, and frames if the last chunk is to be cut to them. Raises ServeError bad_length."""
    about = asker.about
    frames: int | None = None
    if body.chunks is not None and body.num_frames is not None:
        raise ServeError(
            "bad_length", "chunks and num_frames say the same", param="chunks", detail={"fix": "leave one out"}
        )
    if body.chunks is not None:
        chunks = body.chunks
    elif body.num_frames is not None:
        frames, chunks = body.num_frames, chunks_of(max(body.num_frames, 1), about)
    elif body.seconds is not None or story is None:
        frames = max(1, round(seconds_of(DEFAULT_SECONDS if body.seconds is None else body.seconds) * about["fps"]))
        chunks = chunks_of(frames, about)
    else:
        chunks = story.chunks
    if chunks < 1 or (frames is not None and frames < 1) or chunks > most:
        got = f"{chunks} chunks" if frames is None else f"{frames} frames, {chunks} chunks"
        detail = {"got": got, "expected": f"1 to {most} chunks, up to {frames_of(most, about) / about['fps']:.0f} s"}
        raise ServeError("bad_length", "that length cannot be made", param="seconds", detail=detail)
    return chunks, frames


def described(body: Video, asker: Asker, ident: str, kind: str, *, endless: bool = False, most: int) -> Meta:
    """The description of a new session.

    Raises:
        ServeError: something of it cannot be made here.
    """
    about = asker.about
    check_same_size(body, about)
    if (body.prompt is None) == (body.story is None):
        what = "a prompt or a story is needed" if body.prompt is None else "a prompt and a story were given"
        raise ServeError("bad_request", what, param="prompt", detail={"expected": "one of the two"})
    story = checked_story(body.story, asker) if body.story is not None else None
    if story is None:
        segments: tuple[Segment, ...] = (Segment(checked_text(body.prompt or "", "the prompt", asker)),)
    else:
        segments = story.segments
    if endless and (body.num_frames is not None or body.chunks is not None or body.seconds is not None):
        raise ServeError(
            "bad_length", "an endless session has no length", param="endless", detail={"fix": "leave one out"}
        )
    chunks, frames = (sum(one.chunks for one in segments), None) if endless else length(body, story, asker, most)
    options = _options(body, story, asker)
    codec: str = body.codec or (asker.codec if asker.codec in about["codecs"] else next(iter(about["codecs"])))
    if codec not in about["codecs"]:
        detail = {"got": codec, "expected": ", ".join(about["codecs"]), "fix": "leave codec out"}
        raise ServeError("bad_codec", "this server does not write that codec", param="codec", detail=detail)
    if len(segments) > 1 and any(one.cut for one in segments) and not about["can"]["cut"]:
        raise ServeError("not_supported", "this model knows no cuts", param="story", detail={"fix": "leave cuts out"})
    script = [(one.prompt, one.chunks, one.cut) for one in fit_segments(segments, chunks)]
    return Meta(
        id=ident,
        kind=kind,
        user=asker.user,
        created=time.time(),
        model=about["model"],
        script=tuple(script),
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        negative_prompt=options.negative_prompt,
        shift=options.shift,
        solver=options.solver,
        timesteps=options.timesteps,
        width=about["width"],
        height=about["height"],
        fps=about["fps"],
        codec=codec,
        encoder=about["codecs"][codec]["encoder"],
        endless=endless,
        frames=frames,
        view=view_of(story),
        identity={**about["identity"], **{name: getattr(options, name) for name in SAMPLED}},
        about={"mime": about["codecs"][codec]["mime"]},
    )


def _options(body: Video, story: Story | None, asker: Asker) -> SessionOptions:
    """How it is sampled: the request's words, else the story's, else the checkpoint's."""
    about = asker.about

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    guidance = float(first(body.guidance_scale, story and story.guidance, about["guidance"]))
    negative: str = first(body.negative_prompt, story and story.negative_prompt, about["negative_prompt"])
    if negative:
        checked_text(negative, "the negative prompt", asker, guidance != 1)
    told = story.seed if story is not None and "seed" in (body.story or {}) else None
    steps = first(body.num_inference_steps, story and story.steps, about["steps"])
    if not 1 <= steps <= 1000:
        detail = {"got": str(steps), "expected": "1 to 1000"}
        raise ServeError("bad_request", "bad number of denoise steps", param="num_inference_steps", detail=detail)
    listed = tuple(about["timesteps"]) if steps == len(about["timesteps"]) else ()  # a student's own, as everywhere
    try:
        return SessionOptions(
            seed=first(body.seed, told, secrets.randbelow(1 << 31)),
            steps=steps,
            guidance=guidance,
            negative_prompt=negative,
            shift=1.0 if listed else about["shift"],
            solver=about["solver"],
            timesteps=listed,
        )
    except LongtakeError as error:
        raise refused("bad_request", error) from None


def image_from_url(url: str, limits: Limits) -> bytes:
    """A picture inside a message. Raises ServeError bad_image: nothing is ever fetched."""
    head = DATA_URL.match(url[:100])
    if head is None:
        detail = {
            "got": url[:60],
            "expected": "data:image/png;base64,…",
            "fix": "send the picture itself; no URL is fetched",
        }
        raise ServeError("bad_image", "a picture must be a data URL", param="image_reference", detail=detail)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServeError(
            "bad_image", "the picture is no base64", param="image_reference", detail={"got": str(error)}
        ) from None
    if len(data) > limits.inline_image_bytes:
        detail = {"got": f"{len(data)} bytes", "expected": f"at most {limits.inline_image_bytes}"}
        raise ServeError("bad_image", "the picture is too large", param="image_reference", detail=detail)
    return data


def checked_image(data: bytes, limits: Limits, param: str) -> str:
    """The suffix of a picture that can be used, by its content. Its size is read before anything is decoded.

    Raises:
        ServeError: bad_image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as opened:
            kind, size = str(opened.format), opened.size
            if max(size) <= limits.image_side:
                opened.load()
    except Image.DecompressionBombError:
        kind, size = "PNG", (1 << 20, 1 << 20)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        got = "no picture" if isinstance(error, UnidentifiedImageError) else str(error)[:100]
        detail = {"got": got, "expected": ", ".join(FORMATS)}
        raise ServeError("bad_image", "the picture cannot be read", param=param, detail=detail) from None
    if max(size) > limits.image_side or min(size) < 16:
        detail = {"got": f"{size[0]}x{size[1]}", "expected": f"16 to {limits.image_side} pixels a side"}
        raise ServeError("bad_image", "the picture is too large or too small", param=param, detail=detail)
    return FORMATS[kind]


def with_image(meta: Meta, folder: Path, data: bytes, asker: Asker, param: str) -> Meta:
    """`meta` with a picture that is stored under our name. Raises ServeError."""
    if not asker.about["can"]["image"]:
        raise ServeError(
            "not_supported", "this model starts from no picture", param=param, detail={"fix": f"leave {param} out"}
        )
    suffix = checked_image(data, asker.limits, param)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"image.{suffix}").write_bytes(data)
    return replace(meta, image=f"image.{suffix}")


def with_clip(meta: Meta, folder: Path, data: bytes, asker: Asker, frames: int) -> Meta:
    """`meta` of a video that goes on from an uploaded clip, which is stored under our name. Raises ServeError bad_clip."""
    if not asker.about["can"]["clip"]:
        raise ServeError("not_supported", "this model goes on from no clip", param="video")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "clip.mp4"
    path.write_bytes(data)
    try:
        count = count_frames(path, asker.about["fps"])
        if count < asker.about["first_chunk_frames"] or count / asker.about["fps"] > asker.limits.clip_seconds:
            got = f"{count} frames at {asker.about['fps']} a second"
            wanted = f"{asker.about['first_chunk_frames']} frames to {asker.limits.clip_seconds:g} s"
            raise LongtakeError("the clip is too short or too long", got=got, expected=wanted)
    except LongtakeError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise refused(
            "bad_clip",
            LongtakeError(error.what.replace(str(path), "the clip"), got=error.got, expected=error.expected),
            param="video",
        ) from None
    return replace(meta, clip="clip.mp4", clip_prompt=meta.script[0][0], frames=frames)
