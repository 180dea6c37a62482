"""Run files: a command's options in a YAML file. What the command line says wins; what neither says is default.

Its keys are the options' names without the dashes in front. A switch is `true` or `false`, an option of several numbers
takes a list. `description` is free text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.checked_yaml import read_yaml
from longtake.commands.options import Parser, converted
from longtake.errors import LongtakeError, nearest
from longtake.options import Command, Option, options_of
from longtake.paths import REPOSITORY
from longtake.record import reject_unknown_keys
from longtake.training.resume import RUN_FILE, require_resume_point

RUNS = REPOSITORY / "training" / "run_files"  # a folder for each command
DESCRIPTION = "description"
PASSING = ("config", "resume", "out", "dry-run")  # said of one start of a run, not of the run
SEE = "see training/run_files"


def run_names(folder: Path) -> list[str]:
    """The shipped run files of a command."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def run_path(name: str, folder: Path) -> Path:
    """A run file by its path, or by the name of a shipped one. Raises LongtakeError if there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        names = run_names(folder)
        expected, fix = "a .yaml file, or one of " + ", ".join(names), nearest(name, names, "check --config")
        raise LongtakeError("unknown run file", got=name, expected=expected, fix=fix)
    return path


def values_of_file(path: Path, command: Command) -> dict[str, Any]:
    """The values of a run file by the options' keys.

    Raises:
        LongtakeError: it is no YAML mapping, or a key or value isn't known.
    """
    options = {one.names[-1].strip("-"): one for one in options_of(*command.options).values()}
    given = {str(key).replace("_", "-"): value for key, value in _mapping(path).items() if key != DESCRIPTION}
    reject_unknown_keys(given, sorted(options), f"run file {path.name}")
    return {options[key].key: _value(options[key], value, path) for key, value in given.items()}


def _value(one: Option, value: Any, path: Path) -> Any:
    try:
        return converted(one, value)
    except LongtakeError as error:
        what = f"run file {path.name}: {error.what.replace('--', '')}"
        raise LongtakeError(what, got=error.got, expected=error.expected, fix=SEE) from None


def _mapping(path: Path) -> dict[Any, Any]:
    given = read_yaml(path, "run file", "key: value lines in UTF-8", SEE)
    if not isinstance(given, dict):
        kind = type(given).__name__
        raise LongtakeError(f"run file {path} is not a mapping", got=kind, expected="key: value lines", fix=SEE)
    return given


def add_config(parser: Parser, runs: Path) -> None:
    """Add `--config`; `runs`: the command's shipped run files."""
    parser.add_argument(
        "--config",
        metavar="FILE|NAME",
        help="run file: options from a YAML file; what is given here wins (default: none). Shipped: "
        + (", ".join(run_names(runs)) or "none"),
    )
    parser.renamed["--recipe"] = "--config"


def run_of_folder(given: Mapping[str, Any]) -> Path | None:
    """What the run that is resumed was told, in its folder, if that is there."""
    path = Path(given["out"]) / RUN_FILE if given.get("resume") and "out" in given else None
    return path if path is not None and path.is_file() else None


def told(given: Mapping[str, Any], command: Command) -> dict[str, Any]:
    """All that a run is told, by the keys of a run file: by the run that is resumed, by `--config`, and by the words given."""
    config = [run_path(given["config"], command.runs)] if command.runs and "config" in given else []
    kept = [path] if (path := run_of_folder(given)) else []
    options = options_of(*command.options)
    files = {str(key).replace("_", "-"): value for path in (*kept, *config) for key, value in _mapping(path).items()}
    words = {options[key].names[-1].strip("-"): value for key, value in given.items() if key in options}
    return {key: value for key, value in {**files, **words}.items() if key not in (*PASSING, DESCRIPTION)}


def values_of_config(given: Mapping[str, Any], command: Command) -> dict[str, Any]:
    """What the run file says that was given with `--config`, over what the run that is resumed was told."""
    if given.get("resume") and "out" in given:  # said before what only its run file would say is missed
        require_resume_point(Path(given["out"]))
    kept = run_of_folder(given)
    values = values_of_file(kept, command) if kept else {}
    if command.runs is not None and "config" in given:
        values |= values_of_file(run_path(given["config"], command.runs), command)
    return values
