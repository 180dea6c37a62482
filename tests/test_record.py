"""JSON objects become dataclasses, or it is said which key is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, write_json
from longtake.record import Kind, record_from_json

KIND = Kind("a thing", "a test", "run the test again", format=2)


@dataclass(frozen=True)
class Part:
    shape: tuple[int | str, ...]
    way: Literal["up", "down"] = "up"


@dataclass(frozen=True)
class Thing:
    name: str
    share: float
    parts: dict[str, Part]
    folder: Path = Path()
    count: int | None = None
    whole: bool = False
    free: dict[str, Any] = field(default_factory=dict)


WHOLE = {"name": "a", "share": 1, "parts": {"x": {"shape": [2, "T"]}}, "folder": "f", "free": {"any": [1]}, "new": 0}


def test_objects_become_dataclasses_and_lists_tuples() -> None:
    thing = record_from_json(Thing, WHOLE)
    assert thing == Thing("a", 1.0, {"x": Part((2, "T"))}, Path("f"), free={"any": [1]})
    assert isinstance(thing.share, float)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": 5}, "name: 5"),
        ({"share": "much"}, "share: 'much'"),
        ({"share": True}, "share: True"),
        ({"count": True}, "count: True"),
        ({"whole": 1}, "whole: 1"),
        ({"parts": {"x": {"shape": [2.5]}}}, r"shape\[0\]: 2.5"),
        ({"parts": {"x": {"shape": [2], "way": "left"}}}, "way: 'left'"),
        ({"parts": {"x": {}}}, "no 'shape'"),
        ({"parts": []}, r"parts: \[\]"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=says):
        record_from_json(Thing, {**WHOLE, **changes})
    write_json(tmp_path / "t.json", {**WHOLE, **changes})
    with pytest.raises(
        IntegrityError, match=rf"t.json is not a thing[\s\S]*got: .*{says}[\s\S]*fix: run the test again"
    ):
        KIND.read(Thing, tmp_path / "t.json")


def test_a_record_comes_back_with_its_format(tmp_path: Path) -> None:
    thing = Thing("a", 0.5, {"x": Part((1,), "down")}, count=3, whole=True)
    KIND.write({**vars(thing), "parts": {"x": {"shape": (1,), "way": "down"}}, "folder": "."}, tmp_path / "t.json")
    assert read_json(tmp_path / "t.json")["format"] == 2
    assert KIND.read(Thing, tmp_path / "t.json") == thing
    with pytest.raises(IntegrityError, match="is not a thing"):
        KIND.parse(Thing, [], tmp_path / "t.json")
    with pytest.raises(LongtakeError, match="does not exist"):
        KIND.read(Thing, tmp_path / "none.json")
