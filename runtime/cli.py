"""The `longtake` command: every folder registers its own subcommands; errors become one clear message."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from longtake import __version__
from longtake.runtime.errors import LongtakeError

# Each module has `register(subparsers)`, which adds parsers and sets `run=function(args) -> int` as a default.
COMMAND_MODULES = (
    "longtake.training.cli",
    "longtake.export.cli",
    "longtake.engines.cli",
    "longtake.runtime.generate_cli",
    "longtake.engines.doctor_cli",
    "longtake.engines.inspect_cli",
    "longtake.engines.profile_cli",
    "longtake.export.check_cli",
)

EPILOG = """the usual way:
  longtake doctor                               what runs on this machine, and what is missing
  longtake train --stage dit --data digits      train (or fine-tune) under NVFP4
  longtake export --recipe tiny_nvfp4_sm120     PyTorch to ONNX
  longtake engines --recipe tiny_nvfp4_sm120    ONNX to TensorRT
  longtake generate docs/stories/demo.yaml      a story to an mp4
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="longtake",
        description="Train, export, compile and stream long multi-shot video generation in 4 bits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"longtake {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(name).register(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code; a LongtakeError or Ctrl-C never shows a traceback."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except LongtakeError as error:
        print(f"longtake: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longtake: interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
