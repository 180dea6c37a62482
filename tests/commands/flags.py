"""The flags of every command, as text: `python tests/commands/flags.py > tests/commands/flags.txt` after a change."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from longtake.commands.main import COMMANDS  # noqa: E402
from longtake.commands.options import help_of, parser_of  # noqa: E402
from longtake.commands.run_files import add_config  # noqa: E402
from longtake.options import Option, options_of  # noqa: E402


def lines() -> Iterator[str]:
    """A line a flag: command, names, what it takes, default."""
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(module).COMMAND
        options = options_of(*command.options)
        parser = parser_of(name, command)
        if command.runs:
            add_config(parser, command.runs)
        for action in parser._actions[1:]:
            names = " ".join(action.option_strings) or action.dest
            takes = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            many = f" x {action.nargs}" if action.nargs not in (None, 0) else ""
            yield f"{name}: {names}{takes}{many}{default(options.get(action.dest))}"


def default(one: Option | None) -> str:
    """The default as its help shows it."""
    text = "" if one is None else help_of(one)
    return " (" + text.rsplit("(", 1)[1] if text.endswith(")") and "default" in text.rsplit("(", 1)[1] else ""


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
