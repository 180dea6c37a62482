"""Bodies of requests as they come: JSON, or a form with files, read no further than is allowed."""

from __future__ import annotations

import json
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from longtake.runtime.serve.contract import Body, ServeError

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


@dataclass
class Given:
    """A body. fields: as JSON would have them. files: what was uploaded, by field."""

    fields: dict[str, Any]
    files: dict[str, UploadFile] = field(default_factory=dict)


@asynccontextmanager
async def body_of(request: Request, kind: type[Body], files: tuple[str, ...] = ()) -> AsyncIterator[Given]:
    """The body of a request, JSON or a form; uploaded files live as long as this.

    Raises:
        ServeError: it is neither.
    """
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media not in FORMS:
        if media != "application/json" and not media.endswith("+json"):
            detail = {"got": media[:60], "expected": "application/json or multipart/form-data"}
            raise ServeError("bad_request", "the body is of another kind", status=415, detail=detail)
        yield Given(_object(await request.body()))
        return
    try:
        form = await request.form(max_files=4, max_fields=64, max_part_size=1 << 20)
    except (MultiPartException, HTTPException, ValueError) as error:
        raise ServeError("bad_request", "the form cannot be read", detail={"got": str(error)[:200]}) from None
    try:
        yield _given(form.multi_items(), kind, files)
    finally:
        await form.close()


def _object(data: bytes) -> dict[str, Any]:
    try:
        given = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise ServeError("bad_request", "the body is no JSON", detail={"got": str(error)[:200]}) from None
    if not isinstance(given, dict):
        raise ServeError("bad_request", "the body is no JSON object", detail={"got": type(given).__name__})
    return given


def _given(items: list[tuple[str, Any]], kind: type[Body], files: tuple[str, ...]) -> Given:
    given = Given({})
    for name, value in items:
        if isinstance(value, UploadFile):
            if name not in files:
                detail = {"got": name[:60], "expected": ", ".join(files) or "no file"}
                raise ServeError("unknown_field", "a file that nothing is done with", param=name[:60], detail=detail)
            given.files[name] = value
        else:
            outer, inner = _path(name)
            if inner:
                given.fields.setdefault(outer, {})
                if isinstance(given.fields[outer], dict):
                    given.fields[outer][inner] = value
            else:
                given.fields[outer] = _typed(kind, outer, value)
    return given


def _path(name: str) -> tuple[str, str]:
    """ "video[id]" as ("video", "id"), which is how clients write an object in a form."""
    outer, bracket, rest = name.partition("[")
    return (outer, rest[:-1]) if bracket and rest.endswith("]") else (name, "")


def _typed(kind: type[Body], name: str, text: str) -> Any:
    """A form's text as JSON would have it, by the type of the field."""
    found = kind.model_fields.get(name)
    if found is None:
        return text
    kinds = _kinds(found.annotation)
    if str in kinds:
        return text
    if dict in kinds or any(isinstance(each, type) and issubclass(each, Body) for each in kinds):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise ServeError("bad_request", f"{name} is no JSON", param=name, detail={"got": text[:60]}) from None
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    if bool in kinds:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    return text


def _kinds(hint: Any) -> set[Any]:
    """The plain types in a hint."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_kinds(each) for each in get_args(hint)))
    inner = getattr(hint, "__origin__", None) if hasattr(hint, "__metadata__") else None
    if inner is not None:
        return _kinds(inner)
    return {get_origin(hint) or hint}


async def upload(file: UploadFile, most: int, code: str) -> bytes:
    """An uploaded file. Raises ServeError if it is larger than `most` bytes."""
    data = await file.read(most + 1)
    if len(data) > most:
        raise ServeError(code, "the file is too large", status=413, detail={"expected": f"at most {most} bytes"})
    return data
