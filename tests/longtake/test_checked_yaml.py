"""YAML that people write: what is ambiguous, doubled, unbounded or makes objects is refused, by every reader, with its line."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.checked_yaml import MOST_REPEATED, read_yaml
from longtake.commands.run_files import _mapping
from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.formats.recipe import recipe_from_file
from longtake.runtime.story import story_from_file


def read(folder: Path, text: str) -> Any:
    (folder / "a.yaml").write_text(text)
    return read_yaml(folder / "a.yaml", "story", "a mapping", "mend it")


def nested(levels: int, width: int) -> str:
    rows = ["&a0 [" + ",".join("x" * width) + "]"]
    rows += [f"&a{i} [" + ",".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "[" + ", ".join(rows) + "]"


GOOD = "a: &x [1, 2.5, yes, null, é, '010']\nb: {<<: {c: 1}, d: *x}\n"
BAD = {
    "a key twice": ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: the key 'c' is there twice, first in line 3"),
    "a key twice, written otherwise": ("1: a\n0x1: b\n", "line 2, column 1: the key 1 is there twice"),
    "a bomb": (f"a: {nested(10, 10)}\n", f"repeat more than {MOST_REPEATED} values"),
    "a wide one": ("a: [&s [" + "x, " * 500 + "x]" + ", *s" * 500 + "]", f"repeat more than {MOST_REPEATED} values"),
    "an alias of itself": ("a: &a [*a]", "stands within what it repeats"),
    "a tag": ("a: !!int ''", "line 1, column 4: explicit tags, such as 'tag:yaml.org,2002:int', are not taken"),
    "a tag of ours": ("a: !longtake x", "explicit tags, such as '!longtake'"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "explicit tags"),
    "brackets": ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
    "digits": ("a: " + "9" * 5000, "a number of 5000 digits is too large"),
    "hexadecimal digits": ("a: -0x" + "f" * 5000, "digits is too large"),
    "beyond 64 bits": ("a: 18446744073709551616", "a number of 20 digits is too large"),
    "octal by a zero": ("a: 010", "'010' can be read in two ways"),
    "sixties": ("a: 1:30", "'1:30' can be read in two ways"),
    "infinity": ("a: .inf", "'.inf' is no finite number"),
    "no number": ("a: .nan", "no finite number"),
    "a key that is a list": ("? [a]\n: 1\n", "a key must be a word"),
    "a tab": ("a:\n\t- b\n", "line 2, column 1: found character '\\t' that cannot start any token"),
    "two documents": ("a: 1\n---\nb: 2\n", "another document"),
}


def test_it_reads_the_same_without_libyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake import checked_yaml

    monkeypatch.setattr("yaml.__with_libyaml__", False)
    spec = importlib.util.spec_from_file_location("in_python", checked_yaml.__file__)
    assert spec is not None and spec.loader is not None
    in_python = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(in_python)
    for text in (text for text, _ in BAD.values()):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(LongtakeError, match="a.yaml is not valid YAML"):
            in_python.read_yaml(tmp_path / "a.yaml", "story", "a mapping", "mend it")
    (tmp_path / "a.yaml").write_text(GOOD)
    assert in_python.read_yaml(tmp_path / "a.yaml", "story", "", "") == read(tmp_path, GOOD)


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_what_is_refused(tmp_path: Path, text: str, says: str) -> None:
    begun = time.monotonic()
    with pytest.raises(LongtakeError, match="a.yaml is not valid YAML\n  got: line ") as caught:
        read(tmp_path, text)
    assert says in str(caught.value) and "expected: a mapping\n  fix: mend it" in str(caught.value)
    assert time.monotonic() - begun < 2


def test_what_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, "") is None and read(tmp_path, "a: 0\nb: -7\nc: 0x1f\nd: 7.0\ne: 18446744073709551615") == {
        "a": 0, "b": -7, "c": 31, "d": 7.0, "e": (1 << 64) - 1}  # fmt: skip
    assert read(tmp_path, "a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    many = "shots:\n" + "  - {prompt: a, chunks: 1}\n" * 10_000  # what is written out may be long
    assert len(read(tmp_path, many)["shots"]) == 10_000


READERS: dict[str, Callable[[Path], Any]] = {"story": story_from_file, "recipe": recipe_from_file, "run file": _mapping}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["a key twice", "a bomb", "a tag", "hexadecimal digits"])
def test_every_reader_reads_so(tmp_path: Path, reader: str, kind: str) -> None:
    (tmp_path / "a.yaml").write_text(BAD[kind][0])
    with pytest.raises(LongtakeError, match="is not valid YAML"):
        READERS[reader](tmp_path / "a.yaml")


def test_json_numbers_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"size": ' + "9" * 5000 + "}")
    with pytest.raises(LongtakeError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
