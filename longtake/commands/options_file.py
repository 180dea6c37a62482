"""Training recipes: a command's options in a YAML file. What the command line says wins; what neither says is default.

A recipe's keys are the options' names without the dashes in front. A switch is `true` or `false`, an option of several
numbers takes a list. `description` is free text.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from longtake.checked_yaml import read_yaml
from longtake.config import reject_unknown_keys
from longtake.errors import LongtakeError
from longtake.paths import REPOSITORY

RECIPES = REPOSITORY / "training" / "recipes"
DESCRIPTION = "description"
OUTSIDE = ("recipe", "help")  # options that a recipe can't hold
SEE = "see training/recipes"


class RecipeOptions:
    """The options of a command that a recipe may set. Made once all of them were added to the parser.

    From then on parsing yields only what was given on the command line; `complete` adds the rest.
    """

    def __init__(self, parser: argparse.ArgumentParser, command: str, required: tuple[str, ...] = ()) -> None:
        self.command, self.required = command, required
        parser.add_argument(
            "--recipe",
            metavar="FILE|NAME",
            help=f"options from a YAML file; what is given here wins. Shipped: {', '.join(recipe_names(command))}",
        )
        self.actions = {
            action.option_strings[-1].lstrip("-"): action
            for action in parser._actions
            if action.option_strings and action.dest not in OUTSIDE
        }
        self.defaults = {action.dest: action.default for action in self.actions.values()}
        for action in self.actions.values():
            action.default = argparse.SUPPRESS

    def complete(self, given: argparse.Namespace) -> argparse.Namespace:
        """Defaults, the recipe's options over them, and what was given on the command line over both.

        Raises:
            LongtakeError: a bad recipe, or a required option that neither names.
        """
        recipe = getattr(given, "recipe", None)
        values = {**self.defaults, **(self.read(recipe) if recipe else {}), **vars(given)}
        for name in self.required:
            if values[self.actions[name].dest] is None:
                raise LongtakeError(
                    f"longtake {self.command} lacks --{name}",
                    expected=self.actions[name].help or f"--{name}",
                    fix=f"pass --{name}, or a --recipe that says it",
                )
        return argparse.Namespace(**values)

    def read(self, recipe: str) -> dict[str, Any]:
        """The values of a recipe, shipped (by name) or any file, by the options' destinations.

        Raises:
            LongtakeError: there is none, it is no YAML mapping, or a key or value isn't known.
        """
        path = recipe_path(recipe, self.command)
        given = _mapping(path)
        given.pop(DESCRIPTION, None)
        given = {str(key).replace("_", "-"): value for key, value in given.items()}
        reject_unknown_keys(given, sorted(self.actions), f"recipe {path.name}")
        return {self.actions[key].dest: _converted(self.actions[key], key, value, path) for key, value in given.items()}


def recipe_names(command: str) -> list[str]:
    """The shipped recipes of a command; they lie in a folder of its name."""
    return sorted(path.stem for path in (RECIPES / command).glob("*.yaml"))


def recipe_path(recipe: str, command: str) -> Path:
    """The file of a recipe given by path or by a shipped one's name."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / command / f"{recipe}.yaml"
    if not path.is_file():
        names = recipe_names(command)
        near = difflib.get_close_matches(recipe, names, n=1)
        raise LongtakeError(
            "unknown recipe",
            got=recipe,
            expected="a .yaml file, or one of " + ", ".join(names),
            fix=f"did you mean {near[0]!r}?" if near else "check --recipe",
        )
    return path


def _mapping(path: Path) -> dict[Any, Any]:
    given = read_yaml(path, "recipe", "key: value lines in UTF-8", SEE)
    if not isinstance(given, dict):
        raise LongtakeError(
            f"recipe {path} is not a mapping", got=type(given).__name__, expected="key: value lines", fix=SEE
        )
    return given


def _converted(action: argparse.Action, key: str, value: Any, path: Path) -> Any:
    """`value` as the command line would have it.

    Raises:
        LongtakeError: it isn't of the option's kind.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _bad(key, value, "true or false", path)
        return action.const if value else not action.const
    if isinstance(action.nargs, int):
        if not isinstance(value, list) or len(value) != action.nargs:
            raise _bad(key, value, f"a list of {action.nargs}", path)
        return [_one(action, key, item, path) for item in value]
    return _one(action, key, value, path)


def _one(action: argparse.Action, key: str, value: Any, path: Path) -> Any:
    if value is None or isinstance(value, bool | list | dict):
        raise _bad(key, value, "a value" if action.type is None else f"a {_kind(action.type)}", path)
    try:
        converted = str(value) if action.type is None else action.type(str(value))  # type: ignore[operator]
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise _bad(key, value, f"a {_kind(action.type)}", path) from None
    if action.choices is not None and converted not in action.choices:
        raise _bad(key, value, " | ".join(map(str, action.choices)), path)
    return converted


def _kind(kind: Any) -> str:
    return {int: "whole number", float: "number", Path: "path"}.get(kind, "value of its kind")


def _bad(key: str, value: Any, expected: str, path: Path) -> LongtakeError:
    return LongtakeError(f"recipe {path.name}: bad {key}", got=repr(value), expected=expected, fix=SEE)
