"""The tiny model, exported once for all files and processes of a run."""

from __future__ import annotations

from pathlib import Path

import fault_runs
import pytest
from run_folder import run_folder

from longtake.leftovers import locked


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory, "tiny_export")
    with locked(folder):
        return fault_runs.export_of(folder, folder)
