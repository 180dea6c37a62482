"""How runs end: full disks, closed streams, killed processes, cut archives, odd files; each stands for its kind."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_seeds import latents_from_file
from safetensors.torch import save_file

from longtake import chain
from longtake.commands.failures import explained
from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path
from longtake.formats.exported import PASSED, Checked
from longtake.formats.recipe import recipe_named
from longtake.leftovers import locked, sweep, temporary_name
from longtake.out_of_memory import is_out_of_memory
from longtake.paths import REPOSITORY
from longtake.runtime.snapshot import FORMAT, KIND, NOISE, _digest, snapshot_from_file
from longtake.training.experiment.pack import restore
from longtake.training.models.families import preset_named
from longtake.training.models.presets import TINY

FULL = """
import resource, signal, sys
import numpy as np
from longtake.errors import LongtakeError
from longtake.video import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer, frames = VideoWriter(sys.argv[1], 24), np.random.default_rng(0).integers(0, 255, (32, 128, 128, 3), dtype=np.uint8)
writer.write(frames)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
for call in [lambda: writer.write(frames)] * 9 + [writer.close] * 2:
    try: call()
    except LongtakeError as error: print(str(error).splitlines()[0])
"""


def python(code: str, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, words)], text=True, env=environment,
                          capture_output=True, timeout=120, **more)  # fmt: skip


@pytest.mark.parametrize("size", [0, 30, 60_000, 400_000])
def test_a_disk_that_fills_up_while_a_video_is_written(tmp_path: Path, size: int) -> None:
    """At the header, in it, at a packet, at the end; the muxer is not called again, and nothing is left."""
    (tmp_path / "v.mp4").write_bytes(b"an older one")
    done = python(FULL, tmp_path / "v.mp4", size)
    assert done.returncode == 0, done.stderr[-500:]
    assert f"cannot write {tmp_path / 'v.mp4'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"] and (
        tmp_path / "v.mp4"
    ).read_bytes() == b"an older one"


STREAMS = """
import os, sys
from longtake.commands.streams import open_standard_streams
{close}
open_standard_streams()
made = open(sys.argv[1], "w")
print("x" * 100_000, flush=True); print("y", file=sys.stderr); os.write(1, b"z"); os.write(2, b"z")
made.write(str(made.fileno())); made.close()
"""


@pytest.mark.parametrize(
    "close", ["os.close(2); sys.stderr = None", "os.close(1); sys.stdout = None", "os.close(0)",
              "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)", "r, w = os.pipe(); os.dup2(w, 2); os.close(r); os.close(w)"]
)  # fmt: skip
def test_a_closed_stream_ends_nothing(tmp_path: Path, close: str) -> None:
    done = python(STREAMS.format(close=close), tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "made").read_text()) > 2, "no file of ours gets a standard stream's number"


@pytest.mark.parametrize("setting", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_line_is_seen_in_a_pipe_when_it_is_printed(setting: dict[str, str]) -> None:
    code = """
import time
from longtake.commands.streams import open_standard_streams
open_standard_streams()
print("dit: PyTorch to ONNX"); time.sleep(120)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **setting}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout and select.select([process.stdout], [], [], 60)[0], "nothing before the process ended"
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    code = """
import os, sys, time
from longtake.files import atomic_path
with atomic_path(sys.argv[1]) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert python(code, tmp_path / "v.mp4").returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".v.") and left.name.endswith(".tmp.mp4")
    (tmp_path / ".notes.tmp").write_text("a user's own")
    with atomic_path(tmp_path / "other.json") as partial:
        sweep(tmp_path)  # its own, in use, stays
        partial.write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "other.json"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    alive = tmp_path / temporary_name(tmp_path / "a.bin").replace(f".{os.getpid()}-", f".{os.getppid()}-")
    alive.write_bytes(b"half")
    sweep(tmp_path)
    assert alive.exists()


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from longtake.leftovers import locked
with locked(Path(sys.argv[1]), reads=len(sys.argv) > 2): print("in", flush=True); sys.stdin.readline()
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    more: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    first = subprocess.Popen(words, env=environment, **more)
    assert first.stdout and first.stdout.readline() == "in\n"
    second = subprocess.Popen([*words, "reads"], env=environment, **more)
    assert second.stderr and "another process is at work" in second.stderr.readline()
    first.communicate("go\n", timeout=30)
    assert second.stdout and second.stdout.readline() == "in\n"
    with locked(tmp_path, reads=True):  # readers share it
        second.communicate("go\n", timeout=30)
    assert first.returncode == second.returncode == 0


def test_a_whole_export_of_another_user_s_is_found_and_any_other_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = recipe_named("tiny_bf16_sm90"), SimpleNamespace(checked=Checked(PASSED, ""), model="")
    whole.recipe = recipe.whole
    monkeypatch.setattr(os, "access", lambda path, how: False)
    monkeypatch.setattr(chain, "up_to_date", lambda folder, inputs: whole)
    said: list[str] = []
    assert chain.export(recipe, None, tmp_path, chain.HowToExport(say=said.append)) is whole
    assert "up to date, passed" in said[0]
    with pytest.raises(PermissionError) as refused:
        chain.export(recipe, None, tmp_path, chain.HowToExport(force=True, say=said.append))
    assert f"no permission for {tmp_path}" in str(explained(refused.value)) and len(said) == 1


def archive(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "state.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"{}  "))
    return folder / "state.tar"


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = archive(tmp_path / "a", "settings.json", "b", "c")
    whole = path.read_bytes()
    for content in (whole[:1024], whole[:1200], whole[:2048], whole[:3072], b"no tar", b""):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="state.tar is not a whole archive of an experiment"):
            restore(tmp_path / "a", out)
    archive(tmp_path / "a", "settings.json", "../outside")
    with pytest.raises(IntegrityError, match="not a whole archive"):
        restore(tmp_path / "a", out)
    assert not out.exists() and not (tmp_path / "outside").exists() and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(whole)
    restore(tmp_path / "a", out)
    assert sorted(each.name for each in out.iterdir()) == ["b", "c", "settings.json"]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_latents_in_few_bits_are_taken(tmp_path: Path, kind: torch.dtype) -> None:
    save_file({"latents": torch.ones(1, 8, TINY.vae.z_channels, *TINY.latent_hw).to(kind)}, tmp_path / "a.safetensors")
    latents = latents_from_file(tmp_path / "a.safetensors")
    assert latents.dtype == torch.float32 and float(latents.mean()) == 1


def test_latents_of_no_number_are_refused(tmp_path: Path) -> None:
    for kind, says in ((torch.complex64, "no readable file of latents"), (torch.int32, "do not fit")):
        save_file(
            {"latents": torch.zeros(1, 8, TINY.vae.z_channels, *TINY.latent_hw).to(kind)}, tmp_path / "a.safetensors"
        )
        with pytest.raises(LongtakeError, match=says):
            latents_from_file(tmp_path / "a.safetensors")


GOOD: dict[str, Any] = {
    "version": KIND.format, "noise": NOISE,
    "identity": {"preset": "tiny", "model": "tiny_nvfp4", "cache": "nvfp4", "seed": 0, "steps": 1, "guidance": 1.0,
                 "negative_prompt": "", "shift": 5.0},
    "position": {"chunk": 1, "shot": 0, "prompt": "a", "script": [["a", 1, False]], "edits": [],
                 "slots": {"capacity": 4, "blocks": [0], "slots": [0], "shot": None, "count": 1}},
}  # fmt: skip
ODD: list[tuple[str, Any]] = [
    ("identity", {}), ("identity", 7), ("identity.steps", "x"), ("identity.steps", -3), ("identity.guidance", None), ("position", None),
    ("position.script", [[1, 2, 3, 4, 5]]), ("position.script", 1.5), ("position.script", [["a", "x", False]]), ("position.edits", [7]),
    ("position.slots", {}), ("position.slots.blocks", 7), ("position.slots.slots", ["x"]), ("position.slots.slots", [3]),
    ("position.slots.blocks", [1]), ("position.slots.capacity", 0), ("position.slots.count", -1), ("position.chunk", None),
    ("position.chunk", -1), ("position.shot", 10**30), ("position.script", [["a", 10**30, False]]),
]  # fmt: skip


def saved(path: Path, about: dict[str, Any], *names: str) -> Path:
    tensors, text = {name: torch.zeros(4) for name in ("positive.0.0", *names)}, json.dumps(about)
    save_file(tensors, path, {"format": FORMAT, "session": text, "sha256": _digest(text, tensors)})
    return path


def test_a_session_of_other_json_with_the_right_digest(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    assert snapshot_from_file(saved(path, GOOD, "decoder.0")).position.chunk == 1
    for place, value in ODD:
        about = json.loads(json.dumps(GOOD))
        *front, last = place.split(".")
        box = about
        for key in front:
            box = box[key]
        box[last] = value
        with pytest.raises(LongtakeError) as caught:
            snapshot_from_file(saved(path, about))
        assert "s.safetensors is no readable saved session" in str(caught.value), (place, value, caught.value)
    with pytest.raises(IntegrityError, match="no readable saved session"):
        snapshot_from_file(saved(path, GOOD, "decoder.0", "decoder.2"))


def test_want_of_memory_by_any_name() -> None:
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), OSError(12, "Cannot allocate memory"),
                  ImportError("libx.so: failed to map segment from shared object"), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("[ONNXRuntimeError] : 1 : FAIL : bad allocation")):  # fmt: skip
        assert is_out_of_memory(error), error
    for other in (ValueError("3"), OSError(28, "No space left on device"), RuntimeError("shapes differ")):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize("base", ["x" * 5000, "a\0b", "../" * 40 + "etc/passwd", "x" * 5000 + ".yaml"])
def test_a_preset_of_a_base_that_is_no_name(tmp_path: Path, base: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {json.dumps(base)}\n")
    with pytest.raises(LongtakeError, match="mine.yaml"):
        preset_named("mine.yaml", tmp_path)
    with pytest.raises(LongtakeError, match="unknown preset"):
        preset_named(base + ".yaml", tmp_path)
