"""The one reader of YAML files that people write: plain values only, each key once, of bounded size and depth.

What YAML allows beyond that is refused where it stands: it is a slip (a key twice, 010 for 8) or an attack (aliases that
expand without end, tags that make objects, numbers of thousands of digits).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from longtake.errors import LongtakeError

MOST_BYTES = 1 << 20
DEEPEST = 32  # levels of nesting
MOST_REPEATED = 1000  # values that aliases may add in all
LARGEST = 1 << 64  # of a whole number
MERGE = "tag:yaml.org,2002:merge"


class _Unfit(yaml.MarkedYAMLError):
    """YAML, but not ours."""

    def __init__(self, problem: str, node: Any) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


if yaml.__with_libyaml__:  # as every wheel is: its scanner is ten times as fast

    class _Plain(Composer, yaml.CSafeLoader):
        """SafeLoader, but that the text is scanned by libyaml. Nodes are composed in Python, where they can be checked."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)

else:
    _Plain = yaml.SafeLoader  # type: ignore[assignment, misc]


class _Loader(_Plain):
    """SafeLoader, strict. `depth`: how deep the value that is being composed lies."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.peek_event()
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Unfit(f"explicit tags, such as {tag!r}, are not taken", event)
        if self.depth == DEEPEST:
            raise _Unfit(f"nested deeper than {DEEPEST} levels", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[return-value]
        finally:
            self.depth -= 1

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _Unfit("a key must be a word", key)
            word = "<<" if key.tag == MERGE else self.construct_object(key)
            if word in seen:
                raise _Unfit(f"the key {word!r} is there twice, first in line {seen[word]}", key)
            seen[word] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """YAML 1.1 also reads 010 as 8 and 1:30 as 90, which nobody means."""
        text = node.value.lstrip("+-")
        if ":" in text or (text.startswith("0") and text[1:2].isdigit()):
            raise _Unfit(
                f"the number {node.value[:20]!r} can be read in two ways: put it in quotes, or write it plainly", node
            )
        if len(text) > 100 or abs(number := super().construct_yaml_int(node)) >= LARGEST:
            raise _Unfit(f"a number of {len(text)} digits is too large", node)
        return number

    def construct_yaml_float(self, node: ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        if not math.isfinite(number):
            raise _Unfit(f"{node.value[:20]!r} is no finite number", node)
        return number


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))


def read_yaml(path: Path, what: str, expected: str, fix: str) -> Any:
    """The value that a YAML file holds. what: the kind of file, for messages.

    Raises:
        LongtakeError: too large, not UTF-8, or not YAML as it is read here; says where.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise LongtakeError(
            f"{path} is too large for a {what}",
            got=f"{size} bytes",
            expected=f"at most {MOST_BYTES}",
            fix=f"pass a YAML {what} file",
        )
    text = ""
    try:
        text = path.read_bytes().decode("utf-8")
        return _value(text)
    except UnicodeDecodeError as error:
        raise LongtakeError(
            f"{what} {path} is not UTF-8 text, so it is not valid YAML",
            got=str(error),
            expected="UTF-8",
            fix="save the file as UTF-8",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        got = line + str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        if mark and got.endswith("found character that cannot start any token"):  # libyaml doesn't say which
            got = got.replace("character", f"character {text.splitlines()[mark.line][mark.column]!r}")
        raise LongtakeError(f"{what} {path} is not valid YAML", got=got, expected=expected, fix=fix) from None


def _value(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_repeats(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_repeats(root: Node) -> None:
    """Refuse aliases that lead back to themselves, or add more than MOST_REPEATED values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in open_nodes:
            raise _Unfit("an alias stands within what it repeats", node)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(map(size, _parts(node)))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if size(root) > len(sizes) + MOST_REPEATED:
        raise _Unfit(f"its aliases repeat more than {MOST_REPEATED} values: write them out, or leave them out", root)


def _parts(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []
