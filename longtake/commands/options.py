"""The command line from dataclasses (`longtake.options`): argparse gathers words, every value is read and checked here."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from longtake.errors import LongtakeError
from longtake.options import Command, OneOf, Option, Text, build, check_value, options_of
from longtake.paths import REPOSITORY

KINDS = {int: "a whole number", float: "a number", Path: "a path"}


class Parser(argparse.ArgumentParser):
    """Errors are ours; an option that there is not is answered with its new name (`renamed`), or the nearest one."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.renamed: dict[str, str] = {}

    def error(self, message: str) -> NoReturn:
        """Raise LongtakeError."""
        raise LongtakeError(message, fix=f"see {self.prog} --help")

    def values(self, words: list[str]) -> dict[str, Any]:
        """What was given, as strings, lists of them and True.

        Raises:
            LongtakeError: a word is no option, or lacks its value.
        """
        given, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].split("=")[0]
            known = {name.strip("-"): name for name in self._option_string_actions}  # all begin alike: no likeness
            near = difflib.get_close_matches(word.strip("-"), known, n=1, cutoff=0.7)
            fix = f"did you mean {known[near[0]]}?" if near else f"see {self.prog} --help"
            if word == "--recipe" and "model" in known:
                fix = "pass --model NAME@RECIPE"
            if word in self.renamed:
                fix = f"it is called {self.renamed[word]} now"
            raise LongtakeError("unknown argument", got=" ".join(unknown), expected=f"options of {self.prog}", fix=fix)
        return vars(given)


def parser_of(name: str, command: Command) -> Parser:
    """The parser of a subcommand. It has no defaults: `instances` fills them in."""
    parser = Parser(
        prog=f"longtake {name}",
        description=command.description,
        epilog=command.epilog or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for one in options_of(*command.options).values():
        group = groups.get(one.group) or groups.setdefault(one.group, parser.add_argument_group(one.group.lower()))
        if one.facts.get("positional"):
            many = "+" if get_origin(one.kind) is tuple else "*" if one.default is MISSING else "?"
            group.add_argument(one.key, nargs=many, help=help_of(one), metavar=one.facts.get("metavar"))
        else:
            group.add_argument(
                *one.names,
                dest=one.key,
                help=argparse.SUPPRESS if one.facts.get("hidden") else help_of(one),
                **_shape(one),
            )
    return parser


def help_of(one: Option) -> str:
    """An option's help with its default, unless it says so in words."""
    if "default" in one.help or one.default is MISSING:
        shown = one.help + (" (required)" if one.default is MISSING else "")
    else:
        shown = f"{one.help} (default {'off' if one.kind is bool else _text(one.written(one.default))})"
    return shown.replace("%", "%%")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    if isinstance(value, float):
        return "no limit" if value == math.inf else f"{value:g}"
    return str(value).removeprefix(f"{REPOSITORY}/")


def _shape(one: Option) -> dict[str, Any]:
    """How argparse gathers an option's words."""
    if one.kind is bool:
        return {"action": "store_true"}
    number = "N" if one.kind in (int, float) else None
    shape: dict[str, Any] = {"metavar": one.facts.get("metavar", number)}
    if choice := one.note(OneOf):
        shape["metavar"] = "{" + ",".join(choice.words) + "}"
    if one.facts.get("repeated"):
        shape["action"] = "append"
    elif "alone" in one.facts:
        shape |= {"nargs": "?", "const": str(one.facts["alone"])}
    elif get_origin(one.kind) is tuple and not one.note(Text):
        sizes = get_args(one.kind)
        shape["nargs"] = "+" if Ellipsis in sizes else len(sizes)
    return shape


def instances(name: str, command: Command, given: Mapping[str, Any], file: Mapping[str, Any]) -> list[Any]:
    """The command's dataclasses: defaults, what a run file says over them, and what was given over both.

    Raises:
        LongtakeError: a value is not of its option's kind, out of bounds, or missing.
    """
    options = options_of(*command.options)
    values = {key: one.default for key, one in options.items()}
    values |= {**file, **{key: converted(options[key], raw) for key, raw in given.items() if key in options}}
    for key, value in values.items():
        if value is MISSING:
            flag = options[key].names[-1]
            fix = f"pass {flag}" + (", or a --config that says it" if command.runs else "")
            raise LongtakeError(f"longtake {name} lacks {flag}", expected=options[key].help, fix=fix)
    return [build(kind, values) for kind in command.options]


def converted(one: Option, raw: Any) -> Any:
    """A value as typed, or as a YAML file has it, to what the field holds.

    Raises:
        LongtakeError: it isn't of the option's kind, or not one of its words.
    """
    if one.kind is bool:
        if not isinstance(raw, bool):
            raise _bad(one, raw, "true or false")
        return raw is not (one.default is True)
    if get_origin(one.kind) is tuple and not one.note(Text):
        sizes = get_args(one.kind)
        if not isinstance(raw, list) or (Ellipsis not in sizes and len(raw) != len(sizes)):
            raise _bad(one, raw, "a list" if Ellipsis in sizes else f"a list of {len(sizes)}")
        return tuple(_one(one, item, sizes[0]) for item in raw)
    return _one(one, raw, one.kind)


def _one(one: Option, raw: Any, kind: Any) -> Any:
    expected = KINDS.get(kind, "a value")
    if raw is None or isinstance(raw, bool | list | dict):
        raise _bad(one, raw, expected)
    text = one.note(Text)
    try:
        value = text.read(str(raw)) if text else kind(str(raw))
    except (TypeError, ValueError):
        raise _bad(one, raw, expected) from None
    if one.note(OneOf):
        check_value(one, value)
    return value


def _bad(one: Option, raw: Any, expected: str) -> LongtakeError:
    name = one.key if one.facts.get("positional") else one.names[-1]
    return LongtakeError(f"bad {name}", got=repr(raw), expected=expected, fix=f"give {expected}")
