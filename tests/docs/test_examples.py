"""docs/examples: each script and the notebook run, quickly on the toy, and in the slow tests on the shipped student."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from films import frames_from_video
from PIL import Image
from toy_backend import ToyBackend, toy_tokenize

import longtake
from longtake.paths import REPOSITORY
from longtake.runtime.generator import Generator

FOLDER = REPOSITORY / "docs" / "examples"
NOTEBOOK = FOLDER / "first_steps.ipynb"
FRAMES = {  # of every video that they write
    "prompt.py": {"prompt.mp4": 61},
    "live.py": {"live.mp4": 125},
    "resume.py": {"resume.mp4": 61},
    "retake.py": {f"retake_{name}.mp4": 61 for name in ("as_it_was", "other_prompt", "other_seed")},
    "picture.py": {"picture.mp4": 32},
    "stream.py": {},
    "compare.py": {"compare.mp4": 29},
    NOTEBOOK.name: {"first_steps.mp4": 93},
}
TOLD = {
    "prompt.py": "frames a second on",
    "live.py": "cut from chunk 2 on",
    "resume.py": "the same to the bit: True",
    "retake.py": "chunk 1 is 'a red two circles",
    "picture.py": "chunk 1 saw chunks (0, 1)",
    "compare.py": "4 steps:",
}


class FlatEncoder:
    """A latent is the mean colour of its frames."""

    def encode(self, frames_CTHW: Any) -> Any:
        return frames_CTHW.mean() * frames_CTHW.new_ones(1, 16, 8, 8)


def toy(*_: Any, **__: Any) -> Generator:
    backend = ToyBackend()
    backend.new_encoder = FlatEncoder
    return Generator(backend, toy_tokenize)


class Out(io.StringIO):
    """Standard output with bytes below it, as a script has it."""

    buffer = io.BytesIO()  # type: ignore[assignment]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Out]:
    """Runs a script, or the notebook's cells, in an empty folder; gives what it wrote to standard output."""

    def run(name: str, *words: str) -> Out:
        out = Out()
        out.buffer = io.BytesIO()  # type: ignore[misc]
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words])
            patch.setattr(sys, "stdout", out)
            if name.endswith(".ipynb"):
                scope: dict[str, Any] = {}
                for cell in cells():
                    exec(compile(cell, name, "exec", dont_inherit=True), scope)  # noqa: S102
                assert scope["same"] is True and not np.array_equal(scope["again"].frames, scope["chunks"][1].frames)
            else:
                runpy.run_path(str(FOLDER / name), run_name="__main__")
        return out

    return run


def cells() -> list[str]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def check(name: str, out: Out, folder: Path) -> None:
    for file, count in FRAMES[name].items():
        frames, rate = frames_from_video(folder / file)
        assert len(frames) == count and rate == 24, file
    assert {path.name for path in folder.glob("*.mp4")} == set(FRAMES[name])
    assert TOLD.get(name, "") in out.getvalue()
    if name == "stream.py":
        with av.open(io.BytesIO(out.buffer.getvalue())) as film:  # type: ignore[attr-defined]
            assert "matroska" in film.format.name
            shown = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(shown) == 61 and shown[0].shape == (128, 128, 3)


@pytest.mark.parametrize("name", FRAMES)
def test_it_runs(name: str, started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longtake.Generator, "from_pretrained", staticmethod(toy))
    check(name, started(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FRAMES)
def test_it_runs_on_the_shipped_student(name: str, started: Any, tmp_path: Path) -> None:
    check(name, started(name), tmp_path)
    if name == "picture.py":
        first = np.asarray(Image.open(tmp_path / "picture_first_frame.png")).astype(int)
        assert np.abs(first[4:20, 4:20] - (20, 30, 90)).mean() < 25  # the picture's own ground
    if name == "compare.py":
        frames, _ = frames_from_video(tmp_path / "compare.mp4")
        assert frames.shape == (29, 128, 384, 3)


@pytest.mark.slow
def test_own_clips_lead_to_a_video(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    out = started("own_clips.py", "my_clips", "2")
    assert "own_clips.mp4: a red square falls" in out.getvalue()
    assert "4 clips" in "".join(capfd.readouterr())
    frames, _ = frames_from_video(tmp_path / "own_clips.mp4")
    assert frames.shape == (29, 128, 128, 3)
    assert (tmp_path / "runs" / "own" / "text_encoder.safetensors").is_file()


@pytest.mark.slow
def test_the_scripts_pass_mypy_strict() -> None:
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file", "/dev/null", "--follow-imports", "silent"]
    scripts = sorted(str(path) for path in FOLDER.glob("*.py"))
    done = subprocess.run(
        [*words, "--scripts-are-modules", *scripts], capture_output=True, text=True, cwd=REPOSITORY, timeout=500
    )
    assert done.returncode == 0, done.stdout


def test_every_script_is_tried_and_told_of() -> None:
    page = (REPOSITORY / "docs" / "examples.md").read_text(encoding="utf-8")
    there = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    assert there == {*FRAMES, "own_clips.py"} == set(re.findall(r"\]\(examples/([^)]+)\)", page))
    assert len(there) == 9
    for path in FOLDER.glob("*.py"):
        assert path.name in path.read_text(encoding="utf-8").split('"""')[1]  # how it is started
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50


def test_the_notebook_carries_no_outputs() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
