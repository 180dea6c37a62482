"""Commands as the tests of worlds call them."""

from __future__ import annotations

from pathlib import Path

from longtake.commands.main import main


def train(preset_file: Path, out: Path, *words: str, command: str = "train") -> int:
    """`longtake train` or `distill` on the CPU."""
    shared = ["--preset", str(preset_file), "--data", "rooms", "--device", "cpu", "--out", str(out)]
    return main([command, *words, *shared])
