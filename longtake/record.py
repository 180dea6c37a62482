"""Frozen dataclasses from files: JSON that one stage writes and another reads, and mappings that people write.

In what people write an unknown key is an error that names the nearest known one, and 7.0 is the whole number 7.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from longtake.errors import IntegrityError, LongtakeError, nearest
from longtake.files import read_json, write_json

T = TypeVar("T")
MOST = 1e300  # of a number
SEAL = "digest"
# What comes of values of other types, lengths and sizes than are expected.
UNFIT = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Kind:
    """A kind of file. what: it is, such as "an engine bundle". writer: what writes it. remake: what to do for a new one.

    format: the newest format that this version reads, and writes. oldest: the oldest it still reads; a file without a
    number is of format 1. sealed: the file carries a digest of the rest of itself, which is compared when it is read.
    """

    what: str
    writer: str
    remake: str
    format: int = 1
    oldest: int = 1
    sealed: bool = False

    def require_format(self, found: object, path: Path) -> None:
        """Raise IntegrityError, saying what to do, unless this version reads format `found`."""
        expected = f"format {self.format}" if self.format == self.oldest else f"format {self.oldest} to {self.format}"
        if isinstance(found, bool) or not isinstance(found, int):
            raise IntegrityError(
                f"{path} has no format number", got=repr(found)[:80], expected=expected, fix=self.remake
            )
        if found > self.format:
            what, got = f"{path} was made by a newer version of longtake", f"format {found}"
            raise IntegrityError(what, got=got, expected=expected, fix=f"update longtake, or {self.remake}")
        if found < self.oldest:
            what = f"{path} was made by an older version of longtake"
            raise IntegrityError(what, got=f"format {found}", expected=expected, fix=self.remake)

    def read(self, cls: type[T], path: Path) -> T:
        """The record in a JSON file.

        Raises:
            LongtakeError: there is no such file.
            IntegrityError: it is no JSON, of another format, or lacks what `cls` holds.
        """
        return self.record(cls, self.content(path), path)

    def content(self, path: Path) -> dict[str, Any]:
        """What the JSON file holds, of a format that is read, its digest compared. Raises what `read` does."""
        try:
            given = read_json(path, finite=True)
        except IntegrityError as error:
            raise IntegrityError(error.what, got=error.got, expected=error.expected, fix=self.remake) from None
        return self.checked(given, path)

    def checked(self, given: object, path: Path) -> dict[str, Any]:
        """JSON value `given`, read from `path`, if it is an object of a format that is read and of the right digest."""
        if not isinstance(given, dict):
            raise self.broken(path, type(given).__name__)
        self.require_format(given.get("format", 1), path)
        if self.sealed and given.get(SEAL) != (digest := seal_of(given)):
            raise IntegrityError(
                f"{path} was altered after it was written, or is damaged",
                got=f"{SEAL} {given.get(SEAL, 'missing')!s:.80}",
                expected=f"{SEAL} {digest}",
                fix=self.remake,
            )
        return given

    def parse(self, cls: type[T], given: object, path: Path) -> T:
        """The record that JSON value `given`, read from `path`, holds; keys that `cls` doesn't know are left out."""
        return self.record(cls, self.checked(given, path), path)

    def record(self, cls: type[T], given: dict[str, Any], path: Path) -> T:
        """`parse` of what is checked already."""
        try:
            return record_from_json(cls, given)
        except LongtakeError as error:
            raise self.broken(path, f"{error.what}: {error.got}") from None
        except UNFIT as error:
            raise self.broken(
                path, f"{error!s:.300}" if isinstance(error, TypeError | ValueError) else repr(error)
            ) from None

    def broken(self, path: Path, got: str) -> IntegrityError:
        """What is raised for a file that holds no such record."""
        return IntegrityError(
            f"{path} is not {self.what}", got=got, expected=f"what {self.writer} writes", fix=self.remake
        )

    def write(self, record: Any, path: Path) -> None:
        """Write a record, or what stands for it in JSON, atomically."""
        told = {**(record if isinstance(record, dict) else asdict(record)), "format": self.format}
        told.pop(SEAL, None)
        write_json(path, {"format": self.format, **told, **({SEAL: seal_of(told)} if self.sealed else {})})


def seal_of(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out and without its own seal."""
    rest = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def record_from_json(cls: type[T], given: dict[str, Any]) -> T:
    """A dataclass from a JSON object; fields that have a default may be missing. Raises TypeError naming the key."""
    values, hints = {}, _hints(cls)  # type: ignore[arg-type]
    for one in fields(cls):  # type: ignore[arg-type]
        if one.name in given:
            values[one.name] = _value(hints[one.name], given[one.name], one.name)
        elif one.default is one.default_factory is MISSING:
            raise TypeError(f"no {one.name!r}")
    return cls(**values)


def record_from_mapping(cls: type[T], given: Any, where: str, see: str, part: str = "", **more: Any) -> T:
    """A dataclass from a mapping that a person wrote: nothing unknown, nothing missing, nothing of another type.

    Args:
        where: the file, in errors, whose fix is `see`. part: the key in it that holds `given`; all of it if "".
        more: fields that are not read from the mapping.

    Raises:
        LongtakeError: names the file and the key, and for an unknown one the nearest that is known.
    """
    named = f"{part} of {where}" if part else where
    if not isinstance(given, dict):
        kind = type(given).__name__
        raise LongtakeError(f"{named} is not a mapping", got=kind, expected="key: value lines", fix=see)
    own = {one.name: one for one in fields(cls) if one.name not in more}  # type: ignore[arg-type]
    reject_unknown_keys(given, list(own), named)
    needed = [name for name, one in own.items() if one.default is one.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise LongtakeError(f"{named} lacks keys", got=sorted(given), expected=f"also {missing}", fix=see)
    values = {name: _written(_hints(cls)[name], value, name, where, see, part) for name, value in given.items()}  # type: ignore[arg-type]
    try:
        return cls(**values, **more)
    except LongtakeError as error:
        if not part:
            raise
        raise LongtakeError(f"{named}: {error.what}", got=error.got, expected=error.expected, fix=error.fix) from None


def _written(hint: Any, value: Any, key: str, where: str, see: str, part: str) -> Any:
    if is_dataclass(hint):
        return record_from_mapping(hint, value, where, see, key)  # type: ignore[arg-type]
    try:
        return _value(hint, value, key)
    except TypeError:
        inner = [WORDS.get(each, str(each)) for each in get_args(hint)[:1]]
        expected = f"a list, of each {inner[0]}" if inner else WORDS.get(hint, str(hint))
        what = f"{where}: bad {part} {key}".replace("  ", " ")
        raise LongtakeError(what, got=repr(value)[:80], expected=expected, fix=see) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as a field of type `hint` holds it: objects as dataclasses, lists as tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _first_that_fits(inner, value, where)
    if origin is Literal and value in inner:
        return value
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(inner[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if is_dataclass(hint) and isinstance(value, dict):
        return record_from_json(hint, value)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str):
        return Path(value)
    plain = {float: (int, float), NoneType: NoneType}.get(hint, hint)
    if origin is None and isinstance(value, plain) and (hint is bool or not isinstance(value, bool)):  # type: ignore[arg-type]
        if hint is not float and not (hint is int and abs(value) >= 1 << 64):
            return value
        if hint is float and abs(value) <= MOST and math.isfinite(value):
            return float(value)
    raise TypeError(f"{where}: {value!r:.60}")


def _first_that_fits(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    for hint in hints:
        try:
            return _value(hint, value, where)
        except TypeError:
            continue
    raise TypeError(f"{where}: {value!r:.60}")


def reject_unknown_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Raise LongtakeError naming the nearest known key for the first unknown one."""
    for key in given:
        if key not in known:
            fix = nearest(key, known, f"remove {key!r}")
            expected = "one of " + ", ".join(known)
            raise LongtakeError(f"unknown key in {where}", got=repr(key), expected=expected, fix=fix)


def whole_number(value: Any, what: str, fix: str) -> int:
    """`value` as an int: 7, 7.0 or an integer of another library. Raises LongtakeError for 7.5, True, "7" and the rest."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise LongtakeError(f"bad {what}", got=repr(value), expected="a whole number", fix=fix)
