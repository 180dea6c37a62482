"""OpenAI's Videos API over the same sessions: jobs."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from longtake.runtime.serve.bodies import body_of, upload
from longtake.runtime.serve.contract import (
    Create,
    Extension,
    Remix,
    RetakeBody,
    ServeError,
    VideoReference,
    parsed,
    refused,
)
from longtake.runtime.serve.fork import Wish, position_on_disk
from longtake.runtime.serve.front import Front, writing
from longtake.runtime.serve.journal import Journal
from longtake.runtime.serve.openings import forked, wish_of
from longtake.runtime.serve.pictures import film_of, shown_chunks, spritesheet, thumbnail
from longtake.runtime.serve.rebuild import legible, script_from
from longtake.runtime.serve.registry import QuotaError
from longtake.runtime.serve.requests import (
    DEFAULT_SECONDS,
    Asker,
    checked_text,
    chunks_of,
    described,
    frames_of,
    image_from_url,
    seconds_of,
    with_clip,
    with_image,
)
from longtake.runtime.serve.store import new_id
from longtake.runtime.serve.users import user_of
from longtake.runtime.story import Segment

PAGE, MOST_PAGE = 20, 100
JSON_OR_FORM = ("application/json", "multipart/form-data")


def videos_of(front: Front) -> APIRouter:
    """The routes under /v1/videos."""
    router, desk = APIRouter(), Videos(front)
    router.add_api_route("/v1/videos", desk.create, methods=["POST"], openapi_extra=_body(Create, *JSON_OR_FORM))
    router.add_api_route("/v1/videos", desk.list, methods=["GET"])
    for name in ("edits", "characters"):
        router.add_api_route(f"/v1/videos/{name}", desk.not_supported, methods=["POST", "GET"], include_in_schema=False)
    extra = _body(Extension, *JSON_OR_FORM)
    router.add_api_route("/v1/videos/extensions", desk.extend, methods=["POST"], openapi_extra=extra)
    router.add_api_route("/v1/videos/{video}", desk.retrieve, methods=["GET"])
    router.add_api_route("/v1/videos/{video}", desk.delete, methods=["DELETE"])
    router.add_api_route("/v1/videos/{video}/content", desk.content, methods=["GET"], response_class=Response)
    router.add_api_route(
        "/v1/videos/{video}/remix", desk.remix, methods=["POST"], openapi_extra=_body(Remix, *JSON_OR_FORM)
    )
    retake = _body(RetakeBody, "application/json")
    router.add_api_route("/v1/videos/{video}/retake", desk.retake, methods=["POST"], openapi_extra=retake)
    return router


def _body(kind: type[Any], *media: str) -> dict[str, Any]:
    """What OpenAPI says of a body that we read ourselves."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})
    schema = _inlined(schema, inner)
    return {"requestBody": {"required": True, "content": {each: {"schema": schema} for each in media}}}


def _inlined(schema: Any, inner: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(each, inner) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(inner[schema["$ref"].rsplit("/", 1)[1]], inner)
    return {key: _inlined(value, inner) for key, value in schema.items()}


class Videos:
    """One method a route."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def not_supported(self) -> None:
        """Routes of OpenAI's that have no meaning here."""
        raise ServeError("not_supported", "this server has no such thing", status=404)

    async def _asker(self, request: Request) -> Asker:
        user = user_of(self.front, request)
        if reason := await self.front.ready():
            raise ServeError("stopping" if self.front.leaving else "not_ready", reason, status=503, retry_s=5)
        return Asker(user, await self.front.about(), self.front.limits, self.front.codec)

    async def create(self, request: Request) -> JSONResponse:
        """Make a video."""
        asker = await self._asker(request)
        await self.front.room_for(asker.user)
        async with body_of(request, Create, ("input_reference",)) as given:
            body: Create = parsed(Create, given.fields)
            data = None
            if (file := given.files.get("input_reference")) is not None:
                data = await upload(file, asker.limits.image_bytes, "bad_image")
        reference = body.input_reference or body.image_reference
        if data is None and reference is not None:
            data = image_from_url(reference.image_url, asker.limits)
        return await self._queued(await asyncio.to_thread(self._begun, asker, body, data))

    def _begun(self, asker: Asker, body: Create, data: bytes | None) -> Journal:
        ident = new_id("video")
        meta = described(body, asker, ident, "video", most=asker.limits.job_chunks)
        with writing():
            if data is not None:
                meta = with_image(meta, self.front.store.folder(ident), data, asker, "input_reference")
            return self.front.store.create(meta)

    async def _queued(self, journal: Journal) -> JSONResponse:
        """Queue a job that is in the store; without room for it, it is none."""
        try:
            await self.front.jobs.add(journal)
        except QuotaError as error:
            await asyncio.to_thread(self.front.store.remove, journal.id)
            raise refused(error.code, error, status=429, retry_s=10) from None
        return await self._answer(journal)

    async def list(
        self, request: Request, after: str | None = None, limit: int = PAGE, order: str = "desc"
    ) -> dict[str, Any]:
        """Own videos, the newest first."""
        user = user_of(self.front, request)
        if not 1 <= limit <= MOST_PAGE or order not in ("asc", "desc"):
            detail = {"expected": f"limit 1 to {MOST_PAGE}, order asc or desc"}
            raise ServeError("bad_request", "bad page", param="limit", detail=detail)
        own = [one for one in self.front.store.all() if one.meta.user == user and one.meta.kind == "video"]
        own.sort(key=lambda one: (one.meta.created, one.id), reverse=order == "desc")
        start = next((index + 1 for index, one in enumerate(own) if one.id == after), None if after else 0)
        if start is None:
            raise ServeError("not_found", "there is no such video to go on after", param="after")
        page = [await self.status(one) for one in own[start : start + limit]]
        ids = [one["id"] for one in page]
        more = start + limit < len(own)
        return {
            "object": "list",
            "data": page,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": more,
        }

    async def retrieve(self, video: str, request: Request) -> JSONResponse:
        """How far a video is."""
        return await self._answer(self.front.own(user_of(self.front, request), video, "video"))

    async def _answer(self, journal: Journal) -> JSONResponse:
        status = await self.status(journal)
        wait = 1000 if status["status"] in ("queued", "in_progress") else 0
        return JSONResponse(status, headers={"openai-poll-after-ms": str(wait)} if wait else {})

    async def status(self, journal: Journal) -> dict[str, Any]:
        """OpenAI's video object, and what ours knows."""
        meta, end, done = journal.meta, journal.end(), journal.count()
        total = max(meta.chunks, done) if not (end and end["state"] == "stopped") else done
        state = {"done": "completed", "stopped": "completed", "failed": "failed"}.get((end or {}).get("state", ""))
        waiting = await self.front.desk.position(journal.id) if state is None else None
        if state is None:
            state = "queued" if waiting is not None and not done else "in_progress"
        error = {"code": end["code"] or "failed", "message": end["reason"]} if end and state == "failed" else None
        about = await self.front.about() if meta.frames is None else {}
        frames = meta.frames if meta.frames is not None else frames_of(total, about)
        return {
            "id": journal.id,
            "object": "video",
            "model": meta.model,
            "status": state,
            "progress": 100 if state == "completed" else min(99, 100 * done // max(1, total)),
            "created_at": int(meta.created),
            "completed_at": int(end["at"]) if end and state == "completed" else None,
            "expires_at": int(end["at"] + self.front.limits.kept_s) if end and meta.kind == "video" else None,
            "seconds": f"{frames / meta.fps:g}",
            "size": f"{meta.width}x{meta.height}",
            "prompt": meta.script[0][0],
            "remixed_from_video_id": meta.remixed_from,
            "error": error,
            "longtake": {
                "chunks": total,
                "chunks_done": done,
                "seed": meta.seed,
                "parent": meta.parent,
                "from_chunk": meta.from_chunk,
                "queue_position": waiting.position if waiting else None,
            },
        }

    async def content(self, video: str, request: Request, variant: str = "video") -> Response:
        """The film as mp4, its first frame or a sheet of frames as PNG."""
        journal = self.front.own(user_of(self.front, request), video, "video")
        end = journal.end()
        if end and end["state"] == "failed" and (journal.meta.kind == "video" or not shown_chunks(journal)):
            words, detail = end["reason"] or "the video failed", {"got": "failed", "fix": "make the video anew"}
            raise ServeError(end["code"] or "failed", words, status=404, detail=detail)
        if end is not None and not shown_chunks(journal):
            detail = {"got": str(end["state"]), "fix": "make the video anew"}
            raise ServeError("not_completed", "it ended before its first chunk", status=404, detail=detail)
        if end is None and (journal.meta.kind == "video" or not shown_chunks(journal)):
            detail = {"got": "in progress", "fix": "wait until its status is completed"}
            raise ServeError("not_completed", "the video is not there yet", status=404, detail=detail)
        if variant == "video":
            path = await asyncio.to_thread(film_of, journal)
            return FileResponse(
                path, media_type="video/mp4", filename=f"{journal.id}.mp4", content_disposition_type="inline"
            )
        maker = {"thumbnail": thumbnail, "spritesheet": spritesheet}.get(variant)
        if maker is None:
            detail = {"got": variant[:40], "expected": "video | thumbnail | spritesheet"}
            raise ServeError("bad_request", "unknown variant", param="variant", detail=detail)
        return Response(await asyncio.to_thread(maker, journal), media_type="image/png")

    async def delete(self, video: str, request: Request) -> dict[str, Any]:
        """Cancel it if it runs, and remove its files."""
        journal = self.front.own(user_of(self.front, request), video, "video")
        await self.front.forget(journal)
        return {"id": video, "object": "video.deleted", "deleted": True}

    async def remix(self, video: str, request: Request) -> JSONResponse:
        """The same video, seed, length and cuts, of another prompt."""
        asker = await self._asker(request)
        source = self.front.own(asker.user, video, "video")
        async with body_of(request, Remix) as given:
            body: Remix = parsed(Remix, given.fields)
        checked_text(body.prompt, "the prompt", asker)
        with legible(source):
            script = script_from(source, 0, position_on_disk(source, source.count()))
        story = tuple(Segment(body.prompt, one.chunks, one.cut) for one in script)
        total = sum(one.chunks for one in story)
        wish = Wish(
            0, story=story, chunks=total, frames=source.meta.frames, bounded=True, kind="video", remixed_from=video
        )
        return await self._forked(source, asker, wish)

    async def retake(self, video: str, request: Request) -> JSONResponse:
        """A new take from a chunk on; the chunks before it are shared."""
        asker = await self._asker(request)
        source = self.front.own(asker.user, video, "video")
        async with body_of(request, RetakeBody) as given:
            body: RetakeBody = parsed(RetakeBody, given.fields)
        wish = wish_of(body, asker, bounded=True, kind="video")
        return await self._forked(source, asker, wish)

    async def _forked(self, source: Journal, asker: Asker, wish: Wish) -> JSONResponse:
        await self.front.room_for(asker.user)
        journal = await asyncio.to_thread(forked, self.front, source, asker.user, wish, "video")
        return await self._queued(journal)

    async def extend(self, request: Request) -> JSONResponse:
        """Go on from a video of one's own, exactly, or from an uploaded clip."""
        asker = await self._asker(request)
        async with body_of(request, Extension, ("video",)) as given:
            file, fields = given.files.get("video"), dict(given.fields)
            if file is not None:
                data = await upload(file, asker.limits.clip_bytes, "bad_clip")
                fields["video"] = {"id": "upload"}
            elif isinstance(fields.get("video"), str):
                fields["video"] = {"id": fields["video"]}
            body: Extension = parsed(Extension, fields)
        if body.prompt is not None:
            checked_text(body.prompt, "the prompt", asker)
        frames = max(
            1, round(seconds_of(DEFAULT_SECONDS if body.seconds is None else body.seconds) * asker.about["fps"])
        )
        if file is not None:
            return await self._queued(await asyncio.to_thread(self._begun_from_clip, asker, body, data, frames))
        return await self._forked_on(asker, body.video, body.prompt, frames)

    def _begun_from_clip(self, asker: Asker, body: Extension, data: bytes, frames: int) -> Journal:
        ident, chunks = new_id("video"), -(-frames // asker.about["chunk_frames"])
        create = Create(prompt=body.prompt or "", chunks=chunks)
        meta = described(create, asker, ident, "video", most=asker.limits.job_chunks)
        with writing():
            return self.front.store.create(with_clip(meta, self.front.store.folder(ident), data, asker, frames))

    async def _forked_on(self, asker: Asker, video: VideoReference, prompt: str | None, frames: int) -> JSONResponse:
        source = self.front.own(asker.user, video.id, "video")
        count, meta = source.count(), source.meta
        if source.end() is None or not count:
            raise ServeError("not_completed", "a video is extended once it is completed", detail={"got": video.id})
        made = frames_of(count, asker.about) if meta.frames is None else min(meta.frames, frames_of(count, asker.about))
        total = made + frames
        chunks = chunks_of(total, asker.about)
        if chunks > asker.limits.job_chunks:
            raise ServeError(
                "bad_length", "the film would be too long", param="seconds", detail={"got": f"{chunks} chunks"}
            )
        wish = Wish(count, prompt, chunks=chunks, frames=total, bounded=True, kind="video")
        return await self._forked(source, asker, wish)
