"""Where the project's own files lie: in a checkout, or in the installed package."""

from __future__ import annotations

from pathlib import Path

# The folder that holds training, export, plugins, engines and runtime: a checkout's root, to which the links in this
# package lead, or the installed package itself.
REPOSITORY = (Path(__file__).resolve().parent / "runtime").resolve().parent
