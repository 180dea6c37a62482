"""Options are fields of dataclasses: the docstring below a field makes it one, and is its help.

    batch: Annotated[int, Bounds(1, 65536)] = option(8, recorded=("dit",))
    \"\"\"clips a step\"\"\"

Its type and the notes in `Annotated` are its check (`check`, for `__post_init__`), its default is shown. What `option`
adds: other names on the command line, whether a resumed run may change it, and which checkpoints record it. The command
line is made from this by `longtake.commands.options`.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from longtake.errors import LongtakeError, nearest

FREE, DECISIVE = "free", "decisive"  # on resuming: may differ unsaid; must not differ. Else a difference is warned of


@dataclass(frozen=True)
class Bounds:
    """Numbers from `least` to `most`, of a tuple all. usual: what an error suggests. name: what it calls the option."""

    least: float
    most: float = math.inf
    usual: object = None
    name: str = ""


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: Sequence[str]


@dataclass(frozen=True)
class Text:
    """A value with a text of its own: `read` takes it, and raises LongtakeError; `write` gives it back."""

    read: Callable[[str], Any]
    write: Callable[[Any], str] = str


@dataclass(frozen=True)
class Command:
    """A subcommand: dataclasses whose options it has, and what takes one of each and returns the exit code.

    description, epilog: of its help. runs: folder of its shipped run files, where it has `--config`.
    """

    run: Callable[..., int]
    options: tuple[type, ...]
    description: str
    epilog: str = ""
    runs: Path | None = None


@dataclass(frozen=True)
class Option:
    """An option of a dataclass. kind: its type without None; notes: those of `Annotated`; facts: of `option`."""

    field: str
    kind: Any
    notes: tuple[Any, ...]
    default: Any
    help: str
    group: str
    facts: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """As typed, such as ("--no-graph",): a switch that is on by default has a name that turns it off."""
        off = "no_" if self.kind is bool and self.default is True else ""
        return self.facts.get("names") or ("--" + (off + self.field).replace("_", "-"),)

    @property
    def key(self) -> str:
        """What its value is called where those of several dataclasses are together, and in a resume point's settings."""
        return self.facts["names"][-1].strip("-").replace("-", "_") if "names" in self.facts else self.field

    def note(self, kind: type) -> Any:
        """The note of a kind, or None."""
        return next((note for note in self.notes if isinstance(note, kind)), None)

    def written(self, value: Any) -> Any:
        """JSON-ready, as it is typed."""
        if (text := self.note(Text)) and value is not None:
            return text.write(value)
        return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def option(default: Any = MISSING, **facts: Any) -> Any:
    """A field with facts about an option. No default: it must be given.

    names: on the command line, if others than the field's. metavar: what its value is called in help.
    positional: it has no dashes. alone: its value when none follows. repeated: given once for each value.
    hidden: it is not in the help. resume: FREE or DECISIVE. recorded: the training stages whose checkpoints record it.
    """
    return field(default=default, metadata=facts, kw_only=default is MISSING)


@cache
def own_options(kind: type) -> tuple[Option, ...]:
    """The options among a dataclass's fields: those with a docstring."""
    hints, options = get_type_hints(kind, include_extras=True), []
    bases = [base for base in reversed(kind.__mro__) if is_dataclass(base)]
    helps = {name: told for base in bases for name, told in _helps(base).items()}
    for one in fields(kind):
        if one.name in helps:
            declared = (base.__dataclass_fields__[one.name] for base in bases if one.name in base.__dataclass_fields__)
            facts = {key: value for each in declared for key, value in each.metadata.items()}
            group, text = helps[one.name]
            options.append(Option(one.name, *_parts(hints[one.name]), one.default, text, group, facts))
    return tuple(options)


@cache
def parts_of(kind: type) -> dict[str, type]:
    """Fields that are dataclasses with options of their own."""
    options, hints = {one.field for one in own_options(kind)}, get_type_hints(kind)
    hints = {one.name: _parts(hints[one.name])[0] for one in fields(kind) if one.name not in options}
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}


def options_of(*kinds: type) -> dict[str, Option]:
    """All options of dataclasses by key, with those of their parts. The first one of a key counts."""
    options: dict[str, Option] = {}
    for kind in kinds:
        for one in (*own_options(kind), *options_of(*parts_of(kind).values()).values()):
            options.setdefault(one.key, one)
    return options


def check(options: Any) -> None:
    """Raise LongtakeError for the first field that is out of its bounds, or not one of its words."""
    for one in own_options(options.__class__):
        if (value := getattr(options, one.field)) is not None:
            check_value(one, value)


def check_value(one: Option, value: Any) -> None:
    """Raise LongtakeError if an option cannot have this value."""
    name, bounds, choice = one.names[-1], one.note(Bounds), one.note(OneOf)
    values = value if isinstance(value, tuple) else (value,)
    if choice and (bad := [each for each in values if each not in choice.words]):
        fix = nearest(bad[0], choice.words, f"{name} {choice.words[0]}")
        raise LongtakeError(f"bad {name}", got=bad[0], expected=" | ".join(choice.words), fix=fix)
    if bounds and not all(bounds.least <= each <= bounds.most for each in values):
        usual = one.default if bounds.usual is None else bounds.usual
        most = "or more" if bounds.most == math.inf else f"to {bounds.most}"
        raise LongtakeError(
            f"bad {bounds.name or name}", got=value, expected=f"{bounds.least} {most}", fix=f"{name} {usual}"
        )


def build(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass and its parts from the values of their options, by key."""
    values_of_fields = {one.field: values[one.key] for one in own_options(kind)}
    return kind(**values_of_fields, **{name: build(part, values) for name, part in parts_of(kind).items()})


def settings_of(*given: Any) -> dict[str, Any]:
    """What makes a run the one it is, JSON-ready: all options but those that a resumed run may change."""
    settings: dict[str, Any] = {}
    for options in given:
        decisive = [one for one in own_options(options.__class__) if one.facts.get("resume") != FREE]
        settings |= {one.key: one.written(getattr(options, one.field)) for one in decisive}
        settings |= settings_of(*(getattr(options, name) for name in parts_of(options.__class__)))
    return settings


def recorded(options: Any, stage: str) -> dict[str, Any]:
    """What the checkpoints of a training stage record of its options."""
    names = [one.field for one in own_options(options.__class__) if stage in one.facts.get("recorded", ())]
    values = {name: getattr(options, name) for name in names}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated` and None, and the notes."""
    notes: tuple[Any, ...] = ()
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        notes = tuple(rest)
        hint, more = _parts(hint)
        notes += more
    return hint, notes


@cache
def _helps(kind: type) -> dict[str, tuple[str, str]]:
    """{field: (group, help)} of a dataclass itself: the group is the first line of the class's docstring."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    group = (kind.__doc__ or kind.__name__).split("\n")[0].rstrip(".")
    helps = {}
    for at, below in zip(body, body[1:]):
        if isinstance(at, ast.AnnAssign) and isinstance(at.target, ast.Name) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                helps[at.target.id] = group, " ".join(below.value.value.split())
    return helps
