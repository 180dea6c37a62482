"""A run may die at any moment: what it leaves must be whole, its own, and enough to go on bit by bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.paths import REPOSITORY
from longtake.training.models.checkpoint import load_checkpoint, load_into, save_checkpoint
from longtake.training.models.presets import Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.vae import CausalVAE
from longtake.training.resume import newest_whole, resume_points
from longtake.training.stages.base import Stage
from longtake.training.stages.options import StageOptions
from longtake.training.stages.vae import VAEStage
from longtake.training.trainer import TrainConfig, Trainer

CPU = torch.device("cpu")
SIDE = SideFile("dit", "tiny")

# One import, then a process per death. A child either runs until a random moment or dies at its n-th change of a name.
SCRIPT = """
import os, random, signal, sys, threading, time
from pathlib import Path
import torch
from torch import nn
from longtake.training import trainer as module
from longtake.training.resume import newest_whole, resume_points
from longtake.training.stages.base import Stage
from longtake.training.trainer import TrainConfig, Trainer

class Square(Stage):
    name = "square"
    def __init__(self):
        torch.manual_seed(0)
        self.modules = {"square": nn.Linear(96, 96)}
        self.drawn = 0
    def prepare(self, device): pass
    def losses(self, step, generator):
        x = torch.randn(8, 96, generator=generator)
        self.drawn += 8
        yield (self.modules["square"](x) - x).square().mean(), {}
    def position(self): return {"taken": self.drawn}
    def seek(self, position): self.drawn = position["taken"]
    def evaluate(self): return {"loss": 0.0}
    def metadata(self): return {"square": {"drawn": self.drawn}}

class NoHistory:
    def __init__(self, out, step=0): pass
    def add(self, *a): pass
    add_samples = save = close = plot = add

module.History = NoHistory  # its pictures take seconds and are no part of what is saved
module.tqdm.set_lock(threading.RLock())  # its own is shared by processes: a killed one would keep it

def run(out, steps=None):
    config = TrainConfig(out=out, preset="small", steps=steps or STEPS, save_steps=1, log_steps=1, evaluate_steps=0,
                         resume=bool(resume_points(out)))
    Trainer(Square(), config, torch.device("cpu")).fit()

def dies_at_rename(n):
    count = 0
    def counted(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call
    for name in ("replace", "unlink", "rename", "fsync"):
        setattr(os, name, counted(getattr(os, name)))

def child(out, before=lambda: None, seconds=None):
    pid = os.fork()
    if pid == 0:
        before()
        run(out)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def step_of(out):
    if not resume_points(out):
        return 0
    path, tensors, side = newest_whole(out, kind="resume-square", preset="small")
    assert side.position["taken"] == 8 * side.step, side
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    return side.step

root, STEPS = Path(sys.argv[1]), int(sys.argv[2])
run(root / "straight")  # imports everything, too, so that a child starts at once
dice = random.Random(0)
for mode in ("moments", "renames"):
    out, deaths, last, status = root / mode, 0, 0, -9
    while status:
        if mode == "moments":
            status = child(out, seconds=dice.uniform(0.0, 0.1 + 0.01 * deaths))
        else:
            status = child(out, before=lambda: dies_at_rename(dice.randint(1, 100 + 10 * deaths)))
        now = step_of(out)
        assert now >= last and (status == 0 or os.WTERMSIG(status) == signal.SIGKILL), (now, last, status)
        last, deaths = now, deaths + (status != 0)
    print(mode, deaths, last, file=sys.stderr)
"""


def test_kill_9_at_any_moment_changes_nothing_in_the_end(tmp_path: Path) -> None:
    """Killed again and again, at random moments or at a random change of a name on disk, and resumed each time."""
    steps = 40
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in ("moments", "renames"):
        assert re.search(rf"^{mode} ([2-9]|\d\d) {steps}$", done.stderr, re.MULTILINE), done.stderr[-3000:]
    wanted = load_file(tmp_path / "straight" / "square.safetensors")
    for killed in (tmp_path / "moments", tmp_path / "renames"):
        found, side = load_checkpoint(killed / "square.safetensors", kind="square", preset="small")
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
        assert side.facts["drawn"] == 8 * steps and side.step == steps
        assert not [path.name for path in killed.iterdir() if path.name.startswith(".")]
        assert len(resume_points(killed)) == 2


def save(path: Path, value: float) -> None:
    save_checkpoint(path, {"weight": torch.full((2,), value)}, SIDE)


# A process of its own: one forked beside another thread may inherit a lock that nobody gives back
CRASHES = """
import os, signal, sys
from pathlib import Path
import torch
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.side_file import SideFile

def save(folder, value):
    save_checkpoint(folder / "dit.safetensors", {"weight": torch.full((2,), value)}, SideFile("dit", "tiny"))

def dies_at_change(n):
    count = 0
    def counted(original):
        def call(*args):
            nonlocal count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)
        return call
    for name in ("fsync", "chmod", "replace"):
        setattr(os, name, counted(getattr(os, name)))

for n in range(1, 7):
    folder = Path(sys.argv[1]) / str(n)
    folder.mkdir()
    save(folder, 1.0)
    if (pid := os.fork()) == 0:
        dies_at_change(n)
        save(folder, 2.0)
        os._exit(0)
    print(n, int(os.WIFSIGNALED(os.waitpid(pid, 0)[1])))
"""


def test_a_crash_inside_a_save_leaves_the_old_pair_or_the_new(tmp_path: Path) -> None:
    """Every system call of a save that changes the folder, cut off there."""
    words = [sys.executable, "-c", CRASHES, str(tmp_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    died = {int(n): bool(int(yes)) for n, yes in map(str.split, done.stdout.splitlines())}
    assert len(died) == 6 and died[1] and died[2]
    for n, was_killed in died.items():
        path = tmp_path / str(n) / "dit.safetensors"
        survived = load_checkpoint(path, kind="dit", preset="tiny")[0]["weight"][0].item()
        assert survived in (1.0, 2.0) and (was_killed or survived == 2.0)
        save(path, 3.0)
        assert load_checkpoint(path, kind="dit", preset="tiny")[0]["weight"][0] == 3.0
        assert not (path.parent / ".dit.json.pending").exists()


class Line(Stage):
    """y = x, whatever it is asked."""

    name = "line"

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {"line": nn.Linear(1, 1)}
        self.latest = ""

    def prepare(self, device: torch.device) -> None: ...

    def losses(self, step: int, generator: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        self.latest = f"stories {[step, step + 1]}"
        yield self.modules["line"](torch.ones(1)).square().mean() * (float("inf") if step == 90 else 1.0), {}

    def evaluate(self) -> dict[str, float]:
        return {"loss": 0.0}

    def samples(self) -> Tensor | None:
        return torch.zeros(2, 9, 3, 4, 6, dtype=torch.uint8)

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {"line": {}}

    def batch_name(self) -> object:
        return self.latest


def fit(out: Path, steps: int, **more: Any) -> Trainer:
    trainer = Trainer(Line(), TrainConfig(out=out, preset="small", steps=steps, evaluate_steps=0, **more), CPU)
    trainer.fit()
    return trainer


def test_a_damaged_resume_point_is_named_and_the_one_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, 6, save_steps=2)
    newest = resume_points(tmp_path)[-1]
    content = newest.read_bytes()
    newest.write_bytes(content[:-9])
    path, _, side = newest_whole(tmp_path, kind="resume-line", preset="small")
    assert side.step == 4 and path.stem == "resume-0000004" and str(newest) in caplog.text
    assert fit(tmp_path, 6, resume=True).step == 6
    for path in resume_points(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(LongtakeError, match="resume-0000006.*is not the file its side file describes"):
        fit(tmp_path, 6, resume=True)


def test_a_new_run_never_takes_an_earlier_runs_points_nor_loses_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference's trainer takes whatever it finds in the folder."""
    fit(tmp_path, 50, save_steps=40)
    begun = fit(tmp_path, 50, stop_at=3)
    assert begun.step == 3 and "an earlier run" in caplog.text
    assert [path.stem for path in resume_points(tmp_path)] == ["resume-0000003"]
    assert [path.stem for path in resume_points(tmp_path / "earlier" / "1")] == ["resume-0000040", "resume-0000050"]
    assert fit(tmp_path, 4, resume=True).step == 4
    newest_whole(tmp_path / "earlier" / "1", kind="resume-line", preset="small")


def test_resuming_another_run_is_refused_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, 3, settings={"data": "digits", "lr": 0.1})
    with pytest.raises(LongtakeError, match="belongs to another run: its --data differs") as caught:
        fit(tmp_path, 5, settings={"data": "my_clips", "lr": 0.1}, resume=True)
    assert "--data digits" in str(caught.value)
    fit(tmp_path, 5, settings={"data": "digits", "lr": 0.2}, resume=True)
    assert "--lr 0.2, saved with 0.1" in caplog.text


def test_the_step_of_an_initial_checkpoint_is_not_taken_over(tmp_path: Path, small_preset: Preset) -> None:
    """The reference starts distillation at step 600 of 5,000 when its weights come from a run of 600 steps."""
    start = tmp_path / "start"
    save_checkpoint(
        start / "vae.safetensors",
        CausalVAE(small_preset.vae).state_dict(),
        SideFile("vae", "small", step=600),
    )
    stage = VAEStage(StageOptions(small_preset, init=start))
    trainer = Trainer(stage, TrainConfig(out=tmp_path / "run", preset="small", steps=700), CPU)
    assert trainer.step == 0
    load_into(CausalVAE(small_preset.vae), start / "vae.safetensors", kind="vae", preset="small")


def test_divergence_names_the_batch(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"step 91 is not finite\n.*the batch of stories \[90, 91\]"):
        fit(tmp_path, 200)


def test_a_defect_in_a_step_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(Line):
        def on_step(self, step: int) -> None:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        Trainer(Broken(), TrainConfig(out=tmp_path, preset="small", steps=2), CPU).fit()
    assert not (tmp_path / "line.safetensors").exists()


def test_sample_videos_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, 6, sample_steps=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    clips = events.Images("sample_video")
    assert [clip.step for clip in clips] == [2, 4] and (clips[0].width, clips[0].height) == (6, 8)
    assert clips[0].encoded_image_string.startswith(b"GIF89a")


def test_a_full_disk_in_the_middle_of_a_save_costs_no_earlier_checkpoint(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the system refuses the write in the middle."""
    script = f"""
import resource, torch
from pathlib import Path
from longtake.commands.failures import explained
from longtake.training.models.checkpoint import load_checkpoint, save_checkpoint
from longtake.training.models.side_file import SideFile
path, side = Path({str(tmp_path)!r}) / "dit.safetensors", {SIDE!r}
save_checkpoint(path, {{"weight": torch.ones(1000)}}, side)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, {{"weight": torch.zeros(1_000_000)}}, side)
except Exception as error:
    print(explained(error))
print(load_checkpoint(path, kind="dit", preset="tiny")[0]["weight"].sum().item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no space left" in done.stdout and done.stdout.endswith("1000.0\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.json", "dit.safetensors"]


def test_nothing_is_unpickled_but_weights() -> None:
    found = []
    for folder in ("training", "export", "plugins", "engines", "runtime"):
        for source in (REPOSITORY / folder).rglob("*.py"):
            for call in re.findall(r"(?:torch\.load|pickle\.loads?|np\.load)\([^\n]*", source.read_text()):
                if "weights_only=True" not in call and "allow_pickle=False" not in call:
                    found.append(f"{source}: {call}")
    assert not [line for line in found if "np.load" not in line], found


def test_resume_points_say_where_the_run_stood(tmp_path: Path) -> None:
    fit(tmp_path, 2, settings={"data": "digits"})
    side = read_json(tmp_path / "resume-0000002.json")
    assert side["position"] == {} and side["settings"] == {"data": "digits"} and side["kind"] == "resume-line"
    json.dumps(side)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_told_once(tmp_path: Path) -> None:
    """Its thread fails first; the error is the next write's, and no traceback is printed between."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    from longtake.training.history import History

    def full(self: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    history = History(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            for step in range(1000):
                history.add("train", step, {"loss": 1.0})
                history.save()
