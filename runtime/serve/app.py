"""The application: routes that are neither live nor jobs, who comes in, what an error looks like."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtake.errors import IntegrityError
from longtake.runtime.serve.auth import TICKET_S
from longtake.runtime.serve.contract import ServeError, damaged_video
from longtake.runtime.serve.front import Front
from longtake.runtime.serve.limits import NO_BODY_BYTES
from longtake.runtime.serve.realtime import serve_socket
from longtake.runtime.serve.requests import names_of
from longtake.runtime.serve.users import user_of
from longtake.runtime.serve.videos import videos_of
from longtake.version import __version__

log = logging.getLogger(__name__)

WEB = Path(__file__).parent / "web"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}
SAFE = ("GET", "HEAD", "OPTIONS")


def response_of(error: ServeError) -> JSONResponse:
    """An error as HTTP has it."""
    headers = {"retry-after": str(error.retry_s or 5)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


class Gate:
    """Before everything else: the Host and Origin headers. After it: security headers, counts and times."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self.app, self.front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            if scope["type"] == "websocket":
                await receive()
                await WebSocket(scope, receive, send).send_denial_response(response_of(refusal))
            else:
                await response_of(refusal)(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._measured(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServeError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host"), headers.get("origin")
        if not self.front.door.knows_host(host):
            detail = {"got": str(host)[:100], "fix": "name it with --allow-origin"}
            return ServeError("bad_host", "this server goes by another name", status=403, detail=detail)
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        if changes and not self.front.door.knows_origin(origin, host):
            detail = {"got": str(origin)[:100], "fix": "allow it with --allow-origin"}
            return ServeError("bad_origin", "another page may not use this server", status=403, detail=detail)
        return None

    async def _measured(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status, left = time.perf_counter(), 500, self._most(scope)
        if (stated := dict(scope["headers"]).get(b"content-length", b"0")).isdigit() and int(stated) > left:
            await response_of(too_large(left))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise too_large(self._most(scope))
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        try:
            await self.app(scope, counted, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            meters = self.front.meters
            meters.add("http_requests", route=route, method=_known(scope["method"]), status=str(status))
            meters.observe("http_request_seconds", time.perf_counter() - begun, route=route)

    def _most(self, scope: Scope) -> int:
        """Bytes that a request's body may have."""
        limits = self.front.limits
        files = {
            "/v1/videos": max(limits.image_bytes, limits.first_message_bytes),
            "/v1/videos/extensions": limits.clip_bytes,
        }
        return files.get(scope["path"], 0) + NO_BODY_BYTES


def too_large(most: int) -> ServeError:
    return ServeError("too_large", "the body is too large", status=413, detail={"expected": f"at most {most} bytes"})


def _known(method: str) -> str:
    return method if method in (*SAFE, "POST", "DELETE", "PUT", "PATCH") else "other"


def app_from(front: Front) -> FastAPI:
    """The application over one front."""
    about = "Long videos, made live and as jobs."
    app = FastAPI(title="longtake", version=__version__, description=about, docs_url=None, redoc_url=None)
    app.state.front = front
    app.add_middleware(Gate, front=front)
    _add_errors(app)
    _add_state(app, front)
    _add_realtime(app, front)
    app.include_router(videos_of(front))
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    return app


def _add_errors(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        app.state.front.meters.add("errors", code=error.code)
        return response_of(error)

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return response_of(ServeError("bad_request", f"{where}: {first['msg']}", param=where))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "bad_request")
        response = response_of(ServeError(code, str(error.detail), status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    async def damaged(_: Request, error: Exception) -> Response:
        return await ours(_, damaged_video(error))

    async def defect(_: Request, error: Exception) -> Response:
        return response_of(ServeError("internal_error", "a defect; it is in the log", status=500))

    app.add_exception_handler(ServeError, ours)
    app.add_exception_handler(IntegrityError, damaged)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, defect)


def _add_state(app: FastAPI, front: Front) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/health")
    @app.get("/healthz", include_in_schema=False)
    async def health() -> dict[str, str]:
        """200 while the process answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/ready", responses={503: {"description": "not yet"}})
    @app.get("/readyz", include_in_schema=False)
    async def ready() -> Response:
        """200 once a chunk can be started."""
        if reason := await front.ready():
            return JSONResponse({"status": "not ready", "reason": reason}, 503, {"retry-after": "2"})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(front.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        user_of(front, request)
        return {"object": "list", "data": [model_card(await front.about(), front)]}

    @app.get("/v1/models/{model}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        """The same, by name."""
        user_of(front, request)
        card = model_card(await front.about(), front)
        if model not in names_of(await front.about()):
            raise ServeError("model_not_found", "this model is not served here", status=404, param="model")
        return card


def model_card(about: dict[str, Any], front: Front) -> dict[str, Any]:
    """OpenAI's model object, and what ours can."""
    keys = "width height fps first_chunk_frames chunk_frames chunk_s steps guidance can session_gb".split()
    measured = front.measured()
    ours = {
        **{key: about[key] for key in keys},
        "max_chunks": front.limits.session_chunks,
        "codecs": list(about["codecs"]),
        "window": front.limits.window,
        "measured": {"first_chunk_s": None, "chunk_s": None, **measured, "gpu": about["gpu"]} if measured else None,
    }
    return {"id": about["model"], "object": "model", "created": 0, "owned_by": "longtake", "longtake": ours}


def _add_realtime(app: FastAPI, front: Front) -> None:
    @app.post("/v1/realtime/tickets")
    async def tickets(request: Request) -> dict[str, Any]:
        """A ticket with which a browser opens a WebSocket: ?ticket=…"""
        return {"ticket": front.door.ticket(user_of(front, request)), "expires_in": TICKET_S}

    @app.get("/v1/realtime/sessions")
    async def sessions(request: Request) -> dict[str, Any]:
        """Own live and parked sessions."""
        user = user_of(front, request)
        own = [journal for journal in front.store.all() if journal.meta.user == user and journal.meta.kind == "live"]
        rows = []
        for journal in sorted(own, key=lambda one: -one.meta.created):
            state = (journal.end() or {}).get("state") or await front.desk.state(journal.id) or "parked"
            meta = journal.meta
            row = {"id": journal.id, "object": "realtime.session", "state": state, "chunks": journal.count()}
            more = {"created_at": int(meta.created), "prompt": meta.script[0][0], "parent": meta.parent}
            rows.append({**row, **more, "from_chunk": meta.from_chunk})
        return {"object": "list", "data": rows}

    @app.delete("/v1/realtime/sessions/{session}")
    async def remove(session: str, request: Request) -> dict[str, Any]:
        """End a session and remove its files."""
        journal = front.own(user_of(front, request), session)
        if journal.meta.kind != "live":
            raise ServeError("not_found", "there is no such session", status=404)
        for connection in [one for one in front.connections if one.journal and one.journal.id == session]:
            await connection.close(1000)
        await front.forget(journal)
        return {"id": session, "object": "realtime.session.deleted", "deleted": True}

    @app.websocket("/v1/realtime/video")
    async def realtime(socket: WebSocket) -> None:
        user = front.door.user(socket.headers.get("authorization"), socket.query_params.get("ticket"))
        refusal = None
        if user is None:
            refusal = ServeError("unauthorized", "a token or ticket is needed", status=401)
        elif front.leaving:
            refusal = ServeError("stopping", "the server is stopping", status=503)
        elif not front.has_room_for_socket(user):
            detail = {"fix": "close one of them; the option is --user-sockets"}
            refusal = ServeError("quota", "too many sockets are open", status=429, retry_s=10, detail=detail)
        if refusal is None:
            await serve_socket(front, socket, str(user))
        else:
            front.meters.add("errors", code=refusal.code)
            await socket.send_denial_response(response_of(refusal))
