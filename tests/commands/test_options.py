"""Options made from dataclasses: types, bounds, names, and what a mistake is answered with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from longtake.commands.main import main
from longtake.commands.options import Command, instances, parser_of
from longtake.errors import LongtakeError
from longtake.options import FREE, Bounds, OneOf, Text, check, option, recorded, settings_of


@dataclass(frozen=True)
class Inner:
    """Inner"""

    capacity: Annotated[int, Bounds(1)] = option(5, names=("--inner-capacity",))
    """how many"""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Base:
    """Shared"""

    size: Annotated[int, Bounds(1, 9)] = option(3, recorded=("dit",))
    """how large"""
    graph: bool = option(True, resume=FREE)
    """leave out the graph"""


@dataclass(frozen=True)
class Some(Base):
    """Own"""

    size: Annotated[int, Bounds(1, 9)] = 4
    kind: Annotated[str, OneOf(("plain", "fancy"))] = option("plain")
    """which"""
    pair: tuple[float, float] = option((0.5, 1.0))
    """two numbers"""
    parts: Annotated[tuple[str, ...], Text(lambda text: tuple(text.split("+")), "+".join)] = option(("a", "b"))
    """words with a plus between"""
    share: float = option(0.0, alone=1.0)
    """a number, or none (default 0)"""
    only: tuple[str, ...] = option((), repeated=True)
    """may be repeated"""
    out: Path | None = option(None)
    """where to (default: nowhere)"""
    inner: Inner = field(default_factory=Inner)
    internal: int = 7

    def __post_init__(self) -> None:
        check(self)


COMMAND = Command(run=lambda some: 0, options=(Some,), description="")


def some(*words: str) -> Some:
    (made,) = instances("some", COMMAND, parser_of("some", COMMAND).values(list(words)), {})
    assert isinstance(made, Some)
    return made


def test_defaults_and_what_is_given() -> None:
    assert some() == Some()
    words = "--size 2 --no-graph --kind fancy --pair 0 -1 --parts x+y+z --share --only a --only b --out f --inner-capacity 1"
    assert some(*words.split()) == Some(
        size=2, graph=False, kind="fancy", pair=(0.0, -1.0), parts=("x", "y", "z"), share=1.0, only=("a", "b"),
        out=Path("f"), inner=Inner(1),
    )  # fmt: skip
    assert some("--share", "0.5", "--siz", "5") == Some(share=0.5, size=5)  # shortened, as argparse allows


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--size 0", ["bad --size", "got: 0", "1 to 9", "fix: --size 4"]),
        ("--size many", ["bad --size", "a whole number", "'many'"]),
        ("--kind fency", ["bad --kind", "plain | fancy", "did you mean 'fancy'?"]),
        ("--pair 1", ["expected 2 arguments", "longtake some --help"]),
        ("--pair 1 x", ["bad --pair", "a number"]),
        ("--inner-capacity 0", ["bad --inner-capacity", "1 or more"]),
        ("--knid plain", ["unknown argument", "got: --knid plain", "did you mean --kind?"]),
        ("--internal 3", ["unknown argument"]),
        ("--kinds plain", ["did you mean --kind?"]),
        ("--share-all", ["unknown argument"]),
    ],
)
def test_a_mistake_is_one_message(words: str, says: list[str]) -> None:
    with pytest.raises(LongtakeError) as caught:
        some(*words.split())
    assert all(part in str(caught.value) for part in says) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("generate --recipe X", "pass --model NAME@RECIPE"),
        ("check --prompt x", "see longtake check --help"),  # as near to --report as any two that begin alike
        ("budget --model x", "see longtake budget --help"),
        ("generate --promts x", "did you mean --prompt?"),
        ("train --recipe x", "it is called --config now"),
    ],
)
def test_only_what_is_near_is_a_hint(words: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert "unknown argument" in said and said.endswith(f"fix: {fix}\n")


def test_help_shows_groups_and_defaults() -> None:
    text = " ".join(parser_of("some", COMMAND).format_help().split())
    for part in ("shared: ", "own: ", "inner: ", "how large (default 4)", "two numbers (default 0.5 1)",
                 "leave out the graph (default off)", "with a plus between (default a+b)", "(default: nowhere)",
                 "how many (default 5)"):  # fmt: skip
        assert part in text, part


def test_what_makes_a_run_and_what_a_checkpoint_records() -> None:
    expected: dict[str, Any] = {
        "size": 4, "kind": "plain", "pair": [0.5, 1.0], "parts": "a+b", "share": 0.0, "only": [], "out": "f",
        "inner_capacity": 5,
    }  # fmt: skip
    assert settings_of(some("--out", "f")) == expected
    assert recorded(Some(size=2), "dit") == {"size": 2} and recorded(Some(), "vae") == {}
