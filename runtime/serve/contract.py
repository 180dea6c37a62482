"""Every message and body that clients send, and every error they get: the only source of the documents under docs/serving."""

from __future__ import annotations

import difflib
import logging
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longtake.errors import LongtakeError

log = logging.getLogger(__name__)
Whole = Annotated[int, Field(strict=True)]
Codecs = Literal["h264", "vp9", "av1"]
# Fields of peers' requests that a model without them cannot obey: refused where they would change the result.
FOREIGN = (
    "guidance_scale_2 boundary_ratio flow_shift true_cfg_scale lora extra_params extra_body num_outputs_per_prompt n "
    "vace_references audio generate_audio"
).split()
HARMLESS = "streaming_buffer_seconds stream response_format quality enable_teacache max_sequence_length".split()


class ServeError(Exception):
    """What a client is told. status: of HTTP; close: of a WebSocket, None if it stays open."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int = 400,
        close: int | None = None,
        param: str | None = None,
        retry_s: int | None = None,
        detail: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.close = code, message, status, close
        self.param, self.retry_s, self.detail = param, retry_s, detail or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's shape, with ours inside."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
        return {"error": {**error, "longtake": self.detail}}

    def frame(self, request_id: str | None, event_id: str | None = None) -> dict[str, Any]:
        """As a message on a socket."""
        ids = {key: value for key, value in (("request_id", request_id), ("event_id", event_id)) if value}
        return {"type": "error", "message": self.message, "code": self.code, "longtake": self.detail, **ids}


def refused(code: str, error: LongtakeError, **how: Any) -> ServeError:
    """A ServeError with what a LongtakeError says."""
    parts = {"got": error.got, "expected": error.expected, "fix": error.fix}
    return ServeError(code, error.what, detail={k: str(v)[:300] for k, v in parts.items() if v is not None}, **how)


def damaged_video(error: Exception) -> ServeError:
    """What a client is told of a file that was altered; which one it is stands in the log."""
    log.warning("%s", error)
    detail = {"fix": "resume its session, which makes damaged chunks again; or make the video anew"}
    return ServeError("damaged", "what is kept of the video is damaged", status=409, close=1011, detail=detail)


class Body(BaseModel):
    """Of what clients send: nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FlowBody(Body):
    mode: Literal["ack", "realtime", "free"] | None = None
    window: Whole | None = None


class ImageReference(Body):
    image_url: str


class Video(Body):
    """What may be said of a video, live or as a job. Sizes and rates must be the model's own, or absent."""

    prompt: str | None = None
    story: dict[str, Any] | None = None
    model: str | None = None
    seconds: str | Annotated[float, Field(allow_inf_nan=False)] | None = None
    size: str | None = None
    num_frames: Whole | None = None
    chunks: Whole | None = None
    width: Whole | None = None
    height: Whole | None = None
    fps: Annotated[float, Field(allow_inf_nan=False)] | None = None
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None
    user: str | None = None
    codec: Codecs | None = None
    image_reference: ImageReference | None = None


class Start(Video):
    """Begin a live session."""

    type: Literal["session.start"] = "session.start"
    format: str | None = None
    endless: bool = False
    flow: FlowBody | None = None


class Resume(Body):
    """Go on with a session: the chunks from `next_chunk` on are sent."""

    type: Literal["session.resume"] = "session.resume"
    session_id: str
    next_chunk: Annotated[int, Field(ge=0, strict=True)] = 0
    flow: FlowBody | None = None


class Retake(Body):
    """A new take of a session from a chunk on; it shares the chunks before it."""

    type: Literal["session.retake"] = "session.retake"
    session_id: str
    from_chunk: Annotated[int, Field(ge=0, strict=True)]
    next_chunk: Annotated[int, Field(ge=0, strict=True)] | None = None
    prompt: str | None = None
    story: dict[str, Any] | None = None
    cut: bool | None = None
    seed: Whole | None = None
    flow: FlowBody | None = None


Number = Annotated[float, Field(ge=-1e3, le=1e3, allow_inf_nan=False)]


class Move(Body):
    """Right, down and forward; and a quaternion x, y, z, w."""

    translation: Annotated[tuple[Number, Number, Number], Field(strict=False)] = (0.0, 0.0, 0.0)
    rotation: Annotated[tuple[Number, Number, Number, Number], Field(strict=False)] = (0.0, 0.0, 0.0, 1.0)


class Camera(Body):
    """Of a model with a camera. velocity: `data` in every frame, until another one comes. target: in one chunk to where `data` is,
    seen from the first frame."""

    mode: Literal["velocity", "target"]
    data: Move = Move()


class MultiModal(Body):
    camera: Camera | None = None


class InteractionEvent(Body):
    prompt: str | None = None
    cut: bool | None = None
    multi_modal_data: MultiModal | None = None


class InteractionBody(Body):
    event_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    event: InteractionEvent
    transition_chunks: Whole | None = None


class Interaction(Body):
    """Another prompt, a cut, a move of the camera, or all of them, at the next chunk that has not begun."""

    type: Literal["session.interaction"] = "session.interaction"
    interaction: InteractionBody


class Acknowledge(Body):
    """Chunk `chunk` is on the screen now."""

    type: Literal["session.ack"] = "session.ack"
    chunk: Annotated[int, Field(ge=-1, strict=True)]
    stalled_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Playback(Body):
    """The same, said by the position of the play-head."""

    type: Literal["session.playback"] = "session.playback"
    position_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Pause(Body):
    type: Literal["session.pause"] = "session.pause"


class Continue(Body):
    type: Literal["session.continue"] = "session.continue"


class Extend(Body):
    type: Literal["session.extend"] = "session.extend"
    chunks: Annotated[int, Field(ge=1, strict=True)]
    event_id: str | None = None


class SnapshotNow(Body):
    type: Literal["session.snapshot"] = "session.snapshot"


class Stop(Body):
    type: Literal["session.stop"] = "session.stop"


class Ping(Body):
    type: Literal["session.ping"] = "session.ping"


class VideoReference(Body):
    id: str


class Create(Video):
    """POST /v1/videos as JSON."""

    input_reference: ImageReference | None = None


class Remix(Body):
    """POST /v1/videos/{id}/remix"""

    prompt: str


class Extension(Body):
    """POST /v1/videos/extensions as JSON; as a form `video` may be a file."""

    prompt: str | None = None
    seconds: str | Annotated[float, Field(allow_inf_nan=False)] | None = None
    video: VideoReference


class RetakeBody(Body):
    """POST /v1/videos/{id}/retake"""

    from_chunk: Annotated[int, Field(ge=0, strict=True)]
    prompt: str | None = None
    story: dict[str, Any] | None = None
    cut: bool | None = None
    seed: Whole | None = None


FIRST = (Start, Resume, Retake)
LATER = (Interaction, Acknowledge, Playback, Pause, Continue, Extend, SnapshotNow, Stop, Ping)
MESSAGES: dict[str, type[Body]] = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in (*FIRST, *LATER)}


def parsed(kind: type[Body], given: Any) -> Any:
    """`given` as a message or body of a kind.

    Raises:
        ServeError: bad_request, or unknown_field naming the nearest known one.
    """
    if not isinstance(given, dict):
        raise ServeError("bad_request", "this is no JSON object", detail={"got": type(given).__name__})
    given = without_foreign(kind, given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _as_error(kind, error) from None


def without_foreign(kind: type[Body], given: dict[str, Any]) -> dict[str, Any]:
    """`given` without fields of other servers that change nothing here.

    Raises:
        ServeError: one of them would change the result.
    """
    if not issubclass(kind, Video):
        return given
    for name in FOREIGN:
        if name in given and given[name] not in (
            None,
            {},
            [],
            "",
            1 if name in ("n", "num_outputs_per_prompt") else None,
            False,
        ):
            raise ServeError(
                "unsupported_field", f"this model does not know {name}", param=name, detail={"fix": f"leave {name} out"}
            )
    return {key: value for key, value in given.items() if key not in FOREIGN and key not in HARMLESS}


def _as_error(kind: type[Body], error: ValidationError) -> ServeError:
    first = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
    place = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        owner: Any = kind
        for part in first["loc"][:-1]:
            owner = _inner(owner, str(part)) or owner
        near = difflib.get_close_matches(name, owner.model_fields, n=1)
        detail = {
            "got": name[:100],
            "expected": ", ".join(owner.model_fields),
            "fix": f"did you mean {near[0]}?" if near else f"leave {name[:100]} out",
        }
        return ServeError("unknown_field", f"unknown field {name[:100]}", param=place, detail=detail)
    got = repr(first.get("input"))[:100]
    return ServeError("bad_request", f"{place or 'the body'}: {first['msg']}", param=place, detail={"got": got})


def _inner(kind: Any, name: str) -> Any:
    found = kind.model_fields.get(name)
    if found is None:
        return None
    kinds = [found.annotation, *get_args(found.annotation)]
    return next((each for each in kinds if isinstance(each, type) and issubclass(each, Body)), None)
