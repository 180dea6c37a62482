"""A folder that all processes of one test run share: what takes seconds to make is made by whichever comes first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def run_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """The folder `name` of this run. Who writes into it does so atomically."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder
