"""`longtake inspect`: describe files of the pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.commands.describe import describe
from longtake.options import Command, option

LONGEST = 24  # entries of a nested map or list that are shown


@dataclass(frozen=True)
class InspectOptions:
    """What"""

    files: tuple[Path, ...] = option(positional=True, metavar="FILE")
    """plans, manifests, ONNX files, checkpoints, sessions, exports, bundles or reports"""
    json: bool = option(False)
    """print JSON instead of text"""


def run(options: InspectOptions) -> int:
    """Print what each file is."""
    descriptions = [describe(path) for path in options.files]
    if options.json:
        print(json.dumps(descriptions, indent=2, ensure_ascii=False))
        return 0
    for description in descriptions:
        print("\n".join(lines(description)))
        print()
    return 0


def lines(value: Any, indent: int = 0) -> Iterator[str]:
    """Readable lines of nested maps and lists; what has no nesting stays on one line, long ones are cut short."""
    pad = "  " * indent
    entries = list(value.items()) if isinstance(value, dict) else [(None, item) for item in grouped(value)]
    shown = entries if not indent or len(entries) <= LONGEST else entries[: LONGEST - 2]
    for key, item in shown:
        label = f"{key}: " if key is not None else "- "
        if _flat(item):
            yield f"{pad}{label}{_inline(item)}"
        else:
            yield f"{pad}{label.rstrip()} ({len(item)})"
            yield from lines(item, indent + 1)
    if len(shown) < len(entries):
        yield f"{pad}... {len(entries) - len(shown)} more (--json shows all)"


def grouped(items: list[Any]) -> list[Any]:
    """Bindings that differ only in their number are one: values_0 ... values_5 is `values_N x 6`."""
    items = [_binding(item) for item in items]
    if not all(isinstance(item, dict) and set(item) == {"name", "type", "shape"} for item in items):
        return items
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for item in items:
        key = (re.sub(r"\d+", "N", item["name"]), item["type"], str(item["shape"]))
        kinds.setdefault(key, []).append(item)
    return [
        same[0] if len(same) == 1 else {**same[0], "name": f"{name} x {len(same)}"}
        for (name, *_), same in kinds.items()
    ]


def _binding(item: Any) -> Any:
    """The engine spec's JSON gives a binding as [name, dtype, shape]."""
    if isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and isinstance(item[2], list):
        return dict(zip(("name", "type", "shape"), item))
    return item


def _flat(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) <= 4 and all(not isinstance(item, dict | list) or _short(item) for item in value.values())
    return not isinstance(value, list) or _short(value)


def _short(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and not any(isinstance(item, dict | list) for item in value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value) if value not in (None, "") else "none"


COMMAND = Command(run, (InspectOptions,), "Describe a plan, manifest, ONNX file, checkpoint or snapshot.")
