"""Whatever a file holds: it is read, or refused with our error. Hypothesis looks for what is neither, and makes it small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.checked_yaml import read_yaml
from longtake.errors import LongtakeError
from longtake.files import json_value, read_json
from longtake.formats import bundle, exported, plan, segmented_graph
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.plan import PlanManifest
from longtake.formats.recipe import recipe_from_file
from longtake.formats.segmented_graph import SegmentedGraph
from longtake.record import Kind, seal_of
from longtake.runtime.state import position_from_json
from longtake.runtime.story import story_from_file
from longtake.training.models import side_file
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.slots import slots_from_json

small = settings(max_examples=120, derandomize=True, database=None, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
numbers = st.one_of(st.integers(), st.floats(), st.integers(-3, 9))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
SYNTAX = "{}[]:,&*!-|>?'\"\n 0123456789abcexn.<~#%@`"
KINDS: dict[str, tuple[Kind, type]] = {
    "bundle": (bundle.KIND, Bundle), "export": (exported.KIND, Export), "manifest": (plan.KIND, PlanManifest),
    "segments": (segmented_graph.KIND, SegmentedGraph), "side file": (side_file.KIND, SideFile),
}  # fmt: skip


def keys_of(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    names = sorted(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=6)), values, max_size=len(names))


@pytest.mark.parametrize("name", KINDS)
@small
@given(data=st.data())
def test_records_of_any_content(name: str, data: st.DataObject) -> None:
    kind, cls = KINDS[name]
    told = {**data.draw(keys_of(cls)), "format": kind.format}
    told["digest"] = seal_of(told)
    try:
        made = kind.parse(cls, told, Path("a.json"))
    except LongtakeError as error:
        assert error.fix
    else:
        assert isinstance(made, cls)


@small
@given(
    position=st.fixed_dictionaries(
        {}, optional={key: values for key in ("chunk", "shot", "prompt", "script", "edits", "slots")}
    )
)
def test_positions_of_any_content(position: dict[str, Any]) -> None:
    """`snapshot_from_file` turns exactly these into its error."""
    try:
        position_from_json(position, slots_from_json)
    except (TypeError, ValueError, KeyError, LongtakeError):
        pass


@small
@given(content=st.one_of(st.text(max_size=200), st.text(SYNTAX, max_size=200)))
@pytest.mark.parametrize(
    "reader", [story_from_file, recipe_from_file, lambda path: read_yaml(path, "run file", "", "")]
)
def test_yaml_of_any_text(tmp_path: Path, reader: Callable[[Path], object], content: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        reader(path)
    except LongtakeError as error:
        assert str(path) in str(error) or "a.yaml" in str(error) or "recipe a" in str(error)


@small
@given(story=values)
def test_stories_of_any_shape(tmp_path: Path, story: Any) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(story))
    try:
        story_from_file(path)
    except LongtakeError:
        pass


@small
@given(content=st.binary(max_size=200))
def test_json_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    try:
        read_json(tmp_path / "a.json", finite=True)
    except LongtakeError:
        pass


@small
@given(value=values)
def test_a_seal_does_not_depend_on_the_layout(value: Any) -> None:
    content = {"a": value, "b": 1}
    assert seal_of(content) == seal_of(json.loads(json.dumps({"b": 1, "a": value}, indent=3)))
    assert seal_of(content) != seal_of({**content, "b": 2})


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"a": 1, "a": 2}', "the key 'a' is there twice"), ('{"a": NaN}', "NaN is no number"), ("[" * 100_000, "nested brackets"),
     ('{"a": -Infinity}', "-Infinity is no number"), ("9" * 5000, "digits")],
)  # fmt: skip
def test_json_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        json_value(text)


def test_a_json_file_of_hundreds_of_megabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 28)
    with pytest.raises(LongtakeError, match="too large for a JSON file"):
        read_json(tmp_path / "a.json")
