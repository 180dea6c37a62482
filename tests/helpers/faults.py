"""What is promised about faults and bad files, as rows of a table: each is measured, and compared with what it must show.

`make fuzz`, `make soak` and the tests in tests/faults call these with their own numbers of cases. All is seeded.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_folders import build, opened, reseal

from longtake.errors import LongtakeError
from longtake.files import read_json


@dataclass
class Row:
    """One line of the table. must: in words. wrong: what was not as it must be; the row holds if there is nothing."""

    what: str
    cases: int
    must: str
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what[:300])

    def line(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        held = "ok" if not self.wrong else f"WRONG {len(self.wrong)}: {self.wrong[0]}"
        return f"{self.what:46} {self.cases:6}  {self.seconds:7.1f} s  {held}  ({facts}; must: {self.must})"


def timed(row: Callable[..., Row], *words: Any, **more: Any) -> Row:
    begun = time.monotonic()
    made = row(*words, **more)
    made.seconds = round(time.monotonic() - begun, 1)
    print(made.line(), flush=True)
    return made


def resident_mb() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# ---- engines ---------------------------------------------------------------------------------------------------------


def flip(content: bytes, chance: random.Random) -> bytes:
    altered = bytearray(content)
    altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
    return bytes(altered)


def other_value(value: Any, chance: random.Random) -> Any:
    """A value of another type, or another one of its type."""
    others = [None, 7, -1, 1.5, "x", [], {}, [1], {"a": 1}, True, 10**30]
    return chance.choice([each for each in others if type(each) is not type(value) or each != value])


def altered_engines(count: int, seed: int, place: Path) -> Row:
    """Folders of engines altered at a random place, mixed of two builds, or of a field of another value."""
    row = Row("altered engine folders", count, "all refused with the command, 0.2 s each at most")
    one, other = build(place / "one", 1), build(place / "other", 2)
    chance, slowest, ways = random.Random(seed), 0.0, ("flip", "cut", "swap", "pair", "bundle", "missing", "field")
    names = sorted(path.name for path in one.iterdir())
    for number in range(count):
        folder = Path(shutil.copytree(one, place / "altered"))
        way = ways[number % len(ways)]
        name = chance.choice(names)
        target, what = folder / name, f"{number}: {way} {name}"
        if way == "flip":
            target.write_bytes(flip(target.read_bytes(), chance))
        elif way == "cut":
            target.write_bytes(target.read_bytes()[: chance.randrange(target.stat().st_size)])
        elif way == "swap":
            shutil.copy(other / name, target)
        elif way == "pair":
            plan = name.removesuffix(".json") if name != "bundle.json" else "dit.plan"
            for part in (plan, f"{plan}.json"):
                shutil.copy(other / part, folder / part)
        elif way == "bundle":
            told = read_json(folder / "bundle.json")
            key = chance.choice(
                ["flavour", "version", "recipe_fields", "vocabulary", "memory", "versions", "onnx", "files"]
            )
            what += f" {key}"
            value = other_value(told[key], chance) if key != "onnx" else chance.choice([7, None, [], {}])
            if key in ("memory", "files", "versions") and value in ([], {}) and key == "memory":
                value = 7  # none is allowed
            if key == "vocabulary" and value == []:
                value = 5
            reseal(folder, **{key: value})
        elif way == "missing":
            target.unlink()
        else:
            name = name if name.endswith(".plan.json") else "dit.plan.json"
            told = read_json(folder / name)
            key = chance.choice(["version", "flavour", "cuda", "longtake", "compute_capability", "spec", "plugins", "network",
                                 "plan", "size", "sha256", "format"])  # fmt: skip
            what, value = f"{what} {name} {key}", other_value(told[key], chance)
            if key == "plugins" and value == {}:
                value = 7
            (folder / name).write_text(json.dumps({**told, key: value}))
            reseal(folder)
        same = all(
            (folder / each).is_file() and (folder / each).read_bytes() == (one / each).read_bytes() for each in names
        )
        begun = time.process_time()  # not the clock: other processes share the machine
        try:
            opened(folder)
            row.check(same or _says_the_same(folder, one), f"{what}: opened")
        except LongtakeError as error:
            row.check("longtake engines" in str(error), f"{what}: without the command: {error}")
        except Exception as error:
            row.check(False, f"{what}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.process_time() - begun)
        shutil.rmtree(folder)
    row.facts["slowest_s"] = round(slowest, 3)
    row.check(slowest <= 0.2, f"slowest {slowest:.3f} s")
    return row


def _says_the_same(folder: Path, one: Path) -> bool:
    """A flipped bit in a line's end changes nothing that is said."""
    try:
        return all(read_json(path) == read_json(one / path.name) for path in folder.glob("*.json"))
    except LongtakeError:
        return False


# ---- files -----------------------------------------------------------------------------------------------------------


def mutations(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four changes: bits, cuts, doubled and exchanged parts, other files' parts, and words that mean something."""
    words = [b"null", b"-1", b"1e999", b"NaN", b"{", b"[", b'"', b"]" * 50, b"[" * 5000, b"9" * 5000, b"\xff\xfe", b"\0" * 8,
             b"!!python/object", b"*a", b"&a [*a]", b"<<: *a", b"- " * 400, b"../../etc/passwd", b"true", b"0x" + b"f" * 900,
             b"\n", b"0.0", b"18446744073709551616", b"\xe2\x80\xae", b": ", b"# "]  # fmt: skip
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(content) + 1)
        to = min(len(content), at + chance.randrange(1, 64))
        way = chance.randrange(7)
        if way == 0 and content:
            content = flip(content, chance)
        elif way == 1:
            content = content[:at]
        elif way == 2:
            content = content[:at] + chance.choice(words) + content[at:]
        elif way == 3:
            content = content[:at] + chance.choice(words) + content[to:]
        elif way == 4:
            content = content[:at] + content[at:to] * chance.randrange(2, 30) + content[to:]
        elif way == 5:
            other = chance.choice(others)
            begin = chance.randrange(len(other) + 1)
            content = content[:at] + other[begin : begin + 256] + content[to:]
        else:
            content = content[:at] + content[to:]
    return content


def altered_value(value: Any, chance: random.Random) -> Any:
    """A JSON value in which one part, anywhere, is another."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {each: inner for each, inner in value.items() if each != key}
        return {**value, key: altered_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], altered_value(value[place], chance), *value[place + 1 :]]
    return other_value(value, chance)


def fuzzed_files(count: int, seed: int, seeds: dict[str, tuple[Path, Callable[[Path], object]]], place: Path) -> Row:
    """Files of every kind, altered: read, or refused in our words, within 2 s."""
    row = Row("fuzzed files", count, "only our errors, none over 2 s, growth below 100 MB")
    chance, kinds = random.Random(seed), sorted(seeds)
    contents = [path.read_bytes() for path, _ in seeds.values()]
    small = [content[:20_000] for content in contents]
    taken = dict.fromkeys(kinds, 0)
    slowest, before = (0.0, ""), 0.0
    for number in range(count):
        if number == min(200, count // 4):
            before = resident_mb()
        kind = kinds[number % len(kinds)]
        path, load = seeds[kind]
        content = path.read_bytes()
        value = _value(path) if number // len(kinds) % 2 else None
        if value is not None:
            content = json.dumps(altered_value(value, chance)).encode()
        else:
            content = _head_or_all(content, small, chance)
        altered = place / f"altered{path.suffix}"
        for stale in place.glob("altered*"):
            stale.unlink()
        for beside in path.parent.glob(f"{path.name}.data"):
            (place / f"{altered.name}.data").symlink_to(beside)
        altered.write_bytes(content)
        begun = time.process_time()
        try:
            load(altered)
            taken[kind] += 1
        except LongtakeError:
            pass
        except Exception as error:
            import traceback

            last = traceback.extract_tb(error.__traceback__)[-1]
            row.check(
                False, f"{kind} {number}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            )
            if len(row.wrong) < 20:
                shutil.copy(altered, place.parent / f"wrong-{kind}-{number}{path.suffix}")
        spent = time.process_time() - begun
        if spent > 2:
            row.check(False, f"{kind} {number}: {spent:.1f} s")
        slowest = max(slowest, (spent, kind))
    growth = resident_mb() - before
    row.check(growth < 100, f"grew by {growth:.0f} MB")
    row.facts |= {
        "kinds": len(kinds),
        "taken": sum(taken.values()),
        "slowest_s": round(slowest[0], 2),
        "slowest": slowest[1],
        "growth_mb": round(growth, 1),
    }
    return row


def _head_or_all(content: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Large files are altered in their heads, where what is read stands."""
    if len(content) > 100_000 and chance.random() < 0.7:
        return mutations(content[:4096], others, chance) + content[4096:]
    return mutations(content, others, chance)


def _value(path: Path) -> Any:
    if path.suffix != ".json":
        return None
    return json.loads(path.read_text())
