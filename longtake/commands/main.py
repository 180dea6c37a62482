"""The `longtake` command: every file beside this one registers its subcommand; errors become one clear message."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from longtake import __version__
from longtake.commands.failures import explained
from longtake.errors import LongtakeError
from longtake.settings import configure_logging
from longtake.signals import ended_by_signals

# Command -> module with `register(subparsers)`, which adds the parser and sets `run=function(args) -> int`.
COMMANDS = {
    "doctor": "longtake.commands.doctor",
    "train": "longtake.commands.train",
    "distill": "longtake.commands.distill",
    "random-weights": "longtake.commands.random_weights",
    "convert": "longtake.commands.convert",
    "export": "longtake.commands.export",
    "engines": "longtake.commands.engines",
    "generate": "longtake.commands.generate",
    "check": "longtake.commands.check",
    "profile": "longtake.commands.profile",
    "inspect": "longtake.commands.inspect",
    "budget": "longtake.commands.budget",
    "bench": "longtake.commands.bench",
}

EPILOG = """the usual way:
  longtake doctor                               what runs on this machine, and what is missing
  longtake train --stage dit --data digits      train (or fine-tune) under NVFP4
  longtake distill --teacher runs/train --out runs/four    4 denoise steps a chunk instead of 16
  longtake export --recipe tiny_nvfp4_sm120     PyTorch to ONNX
  longtake engines --recipe tiny_nvfp4_sm120    ONNX to TensorRT
  longtake generate docs/stories/demo.yaml      a story to an mp4
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line: of one command, or of all of them (which imports everything, and takes seconds)."""
    parser = argparse.ArgumentParser(
        prog="longtake",
        description="Train, export, compile and stream long multi-shot video generation in 4 bits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"longtake {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (COMMANDS[command],) if command in COMMANDS else COMMANDS.values():
        importlib.import_module(name).register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code. What a user or the system did never shows a traceback; a defect does."""
    with ended_by_signals() as ended:
        return ended.code(_run(sys.argv[1:] if argv is None else argv))


def _run(words: list[str]) -> int:
    try:
        _print_any_text()
        configure_logging()
        with _interrupts_kept():
            args = build_parser(words[0] if words else None).parse_args(words)
            return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("longtake: interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = error if isinstance(error, LongtakeError) else explained(error)
        if known is None:
            raise
        print(f"longtake: error: {known}", file=sys.stderr)
        return known.exit_code


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Send a Ctrl-C again that fell into a finalizer: Python prints what is raised there, and drops it."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _print_any_text() -> None:
    """Show what the terminal's encoding lacks (in a path, in a prompt) as escapes: printing must not fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
