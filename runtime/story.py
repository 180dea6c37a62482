"""Stories: YAML files that say what happens in a video, shot by shot, checked against runtime/schema/story.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from longtake.checked_yaml import read_yaml
from longtake.errors import LongtakeError
from longtake.record import reject_unknown_keys, whole_number
from longtake.training.models.presets import Preset
from longtake.training.models.wan.prompts import CUT_PREFIX

PATHS = ("image", "camera", "intrinsics", "continue_from")  # keys that name files
STORIES = Path(__file__).parent / "stories"  # the shipped ones
SCHEMA = Path(__file__).parent / "schema" / "story.json"
MAX_PROMPT = 4096  # characters; the schema says the same, a test compares
WHOLE = {"seed", "steps", "chunks", "height", "width", "fps"}  # what the schema wants whole; a test compares


@dataclass(frozen=True)
class Segment:
    """A prompt and how many chunks it lasts; `cut` says that it begins with a scene cut."""

    prompt: str
    chunks: int = 1
    cut: bool = False

    def __post_init__(self) -> None:
        """Raise LongtakeError if it doesn't last a whole number of chunks; 2.0 is 2."""
        object.__setattr__(self, "chunks", whole_number(self.chunks, "number of chunks", "pass 2"))


@dataclass(frozen=True)
class Story:
    """A checked story. None stands for "as the preset says".

    image: a picture that is the first frame. clip: a video or file of latents to go on from; clip_segments says what is
    seen in it, and is cut short or continued to its length; without any, it is what the first shot's prompt says.
    action, camera, intrinsics, speed, turn: see runtime/view.py, of a model with cameras.
    """

    name: str
    segments: tuple[Segment, ...]
    preset: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None
    seconds: float | None = None
    image: Path | None = None
    clip: Path | None = None
    clip_segments: tuple[Segment, ...] = ()
    action: str | None = None
    camera: Path | None = None
    intrinsics: Path | None = None
    speed: float | None = None
    turn: float | None = None

    def __post_init__(self) -> None:
        """Raise LongtakeError where the story contradicts itself."""
        if self.image and self.clip:
            what = f"story {self.name}: a video starts from an image or from a clip"
            got = f"image {self.image} and clip {self.clip}"
            raise LongtakeError(what, got=got, expected="one of the two", fix="leave one out")

    @property
    def chunks(self) -> int:
        return sum(segment.chunks for segment in self.segments)


def frame_count(preset: Preset, chunks: int, continued: bool = False) -> int:
    """Video frames of `chunks` chunks: a video's first latent makes one frame, each later one `stride` frames.

    `continued`: they go on from earlier ones, so that none is the video's first.
    """
    latents = chunks * preset.chunk_latents if continued else preset.first_frame(chunks)
    frames = preset.vae.stride[0] * latents
    return frames if continued else frames - (preset.vae.stride[0] - 1)


def checked_prompt(text: object, where: str) -> str:
    """`text` if it is a prompt. Raises LongtakeError if it is empty, huge, or cannot be encoded as UTF-8."""
    fix = "write what is to be seen, such as 'a green seven drifts left over a dark blue background, soft light'"
    if not isinstance(text, str):
        raise LongtakeError(f"{where} is not text", got=repr(text), expected="a string", fix="put it in quotes")
    if not text.strip():
        raise LongtakeError(f"{where} is empty", got=repr(text), expected="at least one word", fix=fix)
    if len(text) > MAX_PROMPT:
        raise LongtakeError(
            f"{where} is too long", got=f"{len(text)} characters", expected=f"at most {MAX_PROMPT}", fix="shorten it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LongtakeError(
            f"{where} is not UTF-8 text", got=str(error), expected="UTF-8", fix="check the terminal's encoding"
        ) from None
    return text


Script = Story | Path | str | list[str] | tuple[Segment, ...]


def story_from_prompt(prompt: str, chunks: int) -> Story:
    """A story of one shot with one prompt."""
    return Story("prompt", (Segment(checked_prompt(prompt, "the prompt"), checked_chunks(chunks)),))


def story_from_prompts(prompts: Sequence[str]) -> Story:
    """A story of one chunk a prompt, as of a list that `story_from_script` takes."""
    return replace(story_from_script(list(prompts)), name="prompts")


def story_file(text: str) -> Path | None:
    """The story that a string names: a path that ends in .yaml, .yml or .json, or one of the shipped stories."""
    path = Path(text)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        shipped = STORIES / path.name
        return shipped if not path.exists() and len(path.parts) == 1 and shipped.is_file() else path
    shipped = STORIES / f"{text}.yaml"
    return shipped if re.fullmatch(r"[\w-]+", text) and shipped.is_file() else None


def story_from_file(path: Path | str) -> Story:
    """Read and check a story, from a path or by the name of a shipped one. Raises LongtakeError that says where in the file what is wrong."""
    source = (story_file(path) if isinstance(path, str) else None) or Path(path)
    return story_from_mapping(_read(source), source)


def story_from_mapping(given: Any, source: Path) -> Story:
    """A story from what stands in its file. source: where paths in it are seen from, and what errors call it."""
    _validate(given, source.name)
    given = _whole_numbers(given)
    rest = {key: value for key, value in given.items() if key not in ("shots", "name", *PATHS)}
    starts = _starts(given, source)
    return Story(given.get("name", source.stem), _segments(given["shots"], f"{source.name}: "), **starts, **rest)


def _whole_numbers(given: Any) -> Any:
    """`given` with 7 for 7.0 where the schema wants a whole number: to JSON Schema they are the same."""
    if isinstance(given, list):
        return [_whole_numbers(item) for item in given]
    if not isinstance(given, dict):
        return given
    return {
        key: int(value) if key in WHOLE and isinstance(value, float) else _whole_numbers(value)
        for key, value in given.items()
    }


def _segments(shots: list[dict[str, Any]], where: str) -> tuple[Segment, ...]:
    """The segments of a list of shots; every shot but the first begins with a cut. `where` begins error messages."""
    segments = []
    for i, shot in enumerate(shots):
        for j, part in enumerate((shot, *shot.get("then", ()))):
            place = f"{where}shots[{i}]" + (f".then[{j - 1}]" if j else "") + ".prompt"
            segments.append(Segment(checked_prompt(part["prompt"], place), part.get("chunks", 1), i > 0 and j == 0))
    return tuple(segments)


def _starts(given: dict[str, Any], source: Path) -> dict[str, Any]:
    """What the video starts from, as fields of Story; paths in a story are seen from where it lies."""
    fields: dict[str, Any] = {}
    fields |= {key: source.parent / given[key] for key in ("image", "camera", "intrinsics") if key in given}
    start = given.get("continue_from")
    if start is not None:
        about: dict[str, Any] = {"clip": start} if isinstance(start, str) else start
        fields["clip"] = source.parent / about["clip"]
        fields["clip_segments"] = _segments(about.get("shots", []), f"{source.name}: continue_from.")
    return fields


def story_from_script(script: Script) -> Story:
    """A story from whatever `Generator.session` takes. In a list, a prompt that begins with CUT_PREFIX is a cut.

    A string is a prompt, unless it ends in .yaml, .yml or .json or is the name of a shipped story.
    """
    if isinstance(script, Story):
        return script
    if isinstance(script, Path):
        return story_from_file(script)
    if isinstance(script, str):
        file = story_file(script)
        return story_from_prompt(script, 1) if file is None else story_from_file(file)
    if not isinstance(script, list | tuple) or not script:
        what = "the script is empty" if isinstance(script, list | tuple) else "this is no script"
        expected, fix = "a prompt, a list of prompts, a Story or its path", "pass such as 'a green seven rises'"
        raise LongtakeError(what, got=f"{script!r:.80}", expected=expected, fix=fix)
    parts = [p if isinstance(p, Segment) else _segment(p, i == 0) for i, p in enumerate(script)]
    for i, part in enumerate(parts):
        checked_prompt(part.prompt, f"prompt {i} of the script")
    return Story("script", tuple(parts))


def _segment(prompt: Any, first: bool) -> Segment:
    """One chunk of `prompt`, the reference's way: a prompt that begins with CUT_PREFIX begins a shot.

    The first one keeps the prefix: where nothing stands before it, there is no cut, and the prefix is its text.
    """
    cut = isinstance(prompt, str) and prompt.startswith(CUT_PREFIX)
    return Segment(prompt.removeprefix(CUT_PREFIX) if cut and not first else prompt, cut=cut)


def checked_chunks(chunks: int) -> int:
    """`chunks` as a whole number of at least 1."""
    chunks = whole_number(chunks, "number of chunks", "pass 2")
    if chunks < 1:
        raise LongtakeError("bad number of chunks", got=chunks, expected="1 or more", fix="pass chunks=2 (--chunks 2)")
    return chunks


def fit_segments(segments: tuple[Segment, ...], chunks: int) -> tuple[Segment, ...]:
    """`segments` cut short or continued to `chunks` chunks in all."""
    chunks = checked_chunks(chunks)
    fitted: list[Segment] = []
    left = chunks
    for segment in segments:
        if left <= 0:
            break
        fitted.append(Segment(segment.prompt, min(segment.chunks, left), segment.cut))
        left -= fitted[-1].chunks
    if left > 0:
        fitted.append(Segment(fitted[-1].prompt, left))
    return tuple(fitted)


def _read(source: Path) -> Any:
    if not source.is_file():
        raise LongtakeError(
            f"story {source} does not exist" if not source.exists() else f"story {source} is not a file",
            fix=f"pass the path of a story; shipped ones: {', '.join(sorted(path.name for path in STORIES.glob('*.yaml')))}",
        )
    return read_yaml(
        source,
        "story",
        "a YAML mapping with shots, such as the shipped demo.yaml",
        "mind the indentation, and put text that holds ': ' or '#' in quotes",
    )


@cache
def _validator() -> Any:
    import jsonschema  # slow to import, and only for stories from files

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _validate(given: Any, name: str) -> None:
    errors = sorted(_validator().iter_errors(given), key=lambda error: (len(error.path), str(error.path)))
    if not errors:
        return
    error = errors[0]
    where = _place(error.absolute_path)
    if error.validator == "additionalProperties":
        reject_unknown_keys(error.instance, list(error.schema["properties"]), f"story {name}{where and ' at ' + where}")
    if error.validator in ("minLength", "maxLength") and "prompt" in where:
        checked_prompt(error.instance, f"{name}: {where}")
    raise LongtakeError(
        f"story {name} does not fit the schema" + (f" at {where}" if where else ""),
        got=_shown(error.instance, error.validator),
        expected=_expected(error),
        fix=error.schema.get("description") or f"see {STORIES / 'demo.yaml'}",
    )


def _place(path: Any) -> str:
    """JSON path as in shots[1].then[0].prompt."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _shown(value: Any, validator: str) -> str:
    if validator == "required":
        return "only " + ", ".join(sorted(map(str, value))) if value else "an empty mapping"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _expected(error: Any) -> str:
    wanted, kind = error.validator_value, error.validator
    phrases = {"type": f"type {wanted}", "minimum": f"{wanted} or more", "maximum": f"at most {wanted}",
               "required": f"the keys {wanted}", "minItems": f"at least {wanted} item",
               "exclusiveMinimum": f"more than {wanted}"}  # fmt: skip
    return phrases.get(kind, error.message)


def check_fits(story: Story, preset: Preset, continued: bool | None = None) -> None:
    """Raise LongtakeError where the story states a preset, resolution, frame rate or length that isn't the preset's.

    `continued`: whether it goes on from a clip; None asks the story.
    """
    frames = frame_count(preset, story.chunks, story.clip is not None if continued is None else continued)
    seconds = frames / preset.fps
    for key, wanted in (
        ("preset", preset.name),
        ("height", preset.height),
        ("width", preset.width),
        ("fps", preset.fps),
    ):
        stated = getattr(story, key)
        if stated is not None and stated != wanted:
            what = f"story {story.name}: {key} does not fit preset {preset.name}"
            raise LongtakeError(what, got=stated, expected=wanted, fix=f"set {key}: {wanted}, or leave {key} out")
    if story.seconds is not None and abs(story.seconds - seconds) > 0.5 / preset.fps:
        raise LongtakeError(
            f"story {story.name}: the length does not fit preset {preset.name}",
            got=f"{story.seconds} s stated",
            expected=f"{seconds:.4f} s: {story.chunks} chunks are {frames} frames at {preset.fps} a second",
            fix=f"set seconds: {seconds:.4f}, leave it out, or change the chunks ("
            f"{preset.vae.stride[0] * preset.chunk_latents / preset.fps:.4f} s each)",
        )
