"""`longtake generate --gpus 2 --device cpu` as a user runs it: a video, a session that one rank goes on with, a rank lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import children

from longtake.formats.exported import Export
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.training.models.load import read_side

pytestmark = pytest.mark.slow
RECIPE = recipe_named("tiny_w4a16_sm90")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export without networks: PyTorch runs the checkpoints that it was made of."""
    words = read_side(REPOSITORY / RECIPE.model.checkpoints / "text_encoder.safetensors", "text_encoder", RECIPE.model)
    (tmp_path / "onnx").mkdir()
    vocabulary = tuple(words.vocabulary or ())
    Export(RECIPE.onnx_name, "tiny", RECIPE.precision, RECIPE.cache, {}, vocabulary).write(tmp_path / "onnx")
    return tmp_path


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    how = ["--engines", "onnx", "--force", "--device", "cpu"]
    command = [sys.executable, "-m", "longtake", "generate", *how, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
    )


def test_a_video_on_two_ranks_goes_on_on_one(folder: Path) -> None:
    first = started(folder, "--prompt", "a red two", "--steps", "1", "--guidance", "1", "--gpus", "2", "--out", "two.mp4",
                    "--save-session", "two.safetensors")  # fmt: skip
    said, problems = first.communicate(timeout=300)
    assert first.returncode == 0, problems
    assert "backend: sharded (PyTorch in fp32 on 2 ranks over gloo, the VAE by rows)" in said
    assert json.loads((folder / "two.json").read_text())["frames"] == 29
    then = started(
        folder, "--load-session", "two.safetensors", "--chunks", "1", "--backend", "torch", "--out", "one.mp4"
    )
    said, problems = then.communicate(timeout=300)
    assert then.returncode == 0, problems
    assert json.loads((folder / "one.json").read_text())["frames"] == 32


def test_a_rank_that_is_killed_ends_the_command_with_its_name(folder: Path) -> None:
    running = started(folder, "--prompt", "a red two", "--chunks", "400", "--gpus", "2", "--out", "lost.mp4")
    try:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline().startswith("backend: sharded")
        (rank,) = children(running.pid)
        time.sleep(0.5)
        os.kill(rank, signal.SIGKILL)
        _, problems = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 2
    assert "the 2 ranks that share this video have lost each other" in problems
    assert "rank 1 has ended: exit code -9" in problems and "Traceback" not in problems


def test_the_others_end_with_the_first(folder: Path) -> None:
    running = started(folder, "--prompt", "a red two", "--chunks", "400", "--gpus", "2", "--out", "lost.mp4")
    try:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("backend: sharded")
        (rank,) = children(running.pid)
    finally:
        running.kill()
        running.communicate(timeout=60)
    end = time.monotonic() + 30
    while (state := _state(rank)) not in ("gone", "Z") and time.monotonic() < end:
        time.sleep(0.1)
    assert state in ("gone", "Z")


def _state(pid: int) -> str:
    """The letter that Linux has for what a process does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
