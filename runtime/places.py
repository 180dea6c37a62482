"""Where the project's own files lie: in a checkout, or in the installed package."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXPORTS = REPOSITORY / "export" / "build"
ENGINES = REPOSITORY / "engines" / "build"
