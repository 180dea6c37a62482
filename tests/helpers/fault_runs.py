"""Whole commands that are killed, ended, starved or raced, on the tiny model; and the soak, in this process."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fault_processes import Run, whole_process
from faults import Row, resident_mb

from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.runtime.generator import Generator
from longtake.training.models.checkpoint import load_checkpoint

RECIPE = "tiny_nvfp4_sm120"
STUDENT = REPOSITORY / "training" / "checkpoints" / "tiny-4step"
KILLS = {"train": 60, "export": 20, "engines": 20, "generate": 40}
MEMORY_GB = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0)


def done(words: Sequence[object], before: str = "") -> tuple[int, str]:
    """A command's exit code and what it said."""
    return Run(words, before).end()


def export_of(given: Path | None, place: Path) -> Path:
    """The folder of an exported tiny-4step."""
    folder = place if given is None else given
    name = recipe_named(RECIPE).onnx_name
    if not Export.is_in(folder / name):
        code, said = done(["export", "--recipe", RECIPE, "--checkpoints", STUDENT, "--no-parity", "--out", folder])
        assert code == 0, said
    return folder / name


def _times(folder: Path) -> dict[str, int]:
    """When each file below `folder` was written."""
    while True:
        try:
            return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.exists() else {}
        except FileNotFoundError:  # it went while we looked
            continue


def _newest(folder: Path) -> int:
    """The step of a training's newest resume point; 0 without one."""
    return max((int(path.stem.split("-")[1]) for path in folder.glob("resume-*.safetensors")), default=0)


def _is_beyond(folder: Path, step: int) -> bool:
    return _newest(folder) > step


def _says(process: Run, mark: str) -> bool:
    return mark in process.said()


def leftovers(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob(".*") if ".tmp" in path.name or "pending" in path.name
    )


# ---- the soak --------------------------------------------------------------------------------------------------------


def soak(export: Path, chunks: int, seed: int, again: int = 20) -> Row:
    """One session with live changes and cuts; memory, times, and its first chunks once more in another session."""
    row = Row(
        "soak: tiny-4step, 2 steps, ONNX Runtime", chunks, "growth <= 20 MB, p99/p50 <= 1.5, first 20 the same again"
    )
    first = list(_chunks(export, min(again, chunks), seed))
    times, worked, digests, sizes, loads = [], [], [], [], []
    for digest, spent, work in _chunks(export, chunks, seed):
        times.append(spent)
        worked.append(work)
        digests.append(digest)
        gc.collect()
        sizes.append(resident_mb())
        loads.append(os.getloadavg()[0])
    settled = sizes[min(20, len(sizes) // 3) :]
    tail, own = (_tail(each[min(5, len(each) // 3) :]) for each in (times, worked))
    growth = max(settled) - settled[0]
    quiet = max(loads) < (os.cpu_count() or 1)
    row.facts |= {"growth_mb": round(growth, 1), "p50_s": round(statistics.median(times), 3), "p99_to_p50": round(tail, 2),
                  "of processor time": round(own, 2), "largest load": round(max(loads), 1), "ratio counts": quiet}  # fmt: skip
    row.check([digest for digest, *_ in first] == digests[: len(first)], "the first chunks are others the second time")
    row.check(growth <= 20, f"grew by {growth:.1f} MB")
    row.check(tail <= 1.5 or not quiet, f"p99/p50 is {tail:.2f}")
    return row


def _tail(times: list[float]) -> float:
    steady = sorted(times)
    return steady[min(len(steady) - 1, round(0.99 * len(steady)))] / statistics.median(steady)


def _chunks(export: Path, count: int, seed: int):  # type: ignore[no-untyped-def]
    chance = random.Random(seed)
    prompts = ["a green seven drifts left over a dark blue background, soft light", "a red two circles over a sea background",
               "a yellow six over a dark blue background"]  # fmt: skip
    with Generator.from_engines(export, backend="reference") as generator:
        with generator.session(prompts[0], seed=seed, steps=2, guidance=1.0, endless=True) as session:
            for number in range(count):
                if number % 5 == 4:
                    session.cut(chance.choice(prompts)) if number % 10 == 9 else session.change_prompt(
                        chance.choice(prompts)
                    )
                begun, before = time.perf_counter(), time.process_time()
                chunk = next(session)
                frames = chunk.frames
                state = hashlib.sha256(chunk.latents.numpy().tobytes() + frames.tobytes()).hexdigest()
                yield state, time.perf_counter() - begun, time.process_time() - before


# ---- commands --------------------------------------------------------------------------------------------------------


class Runs:
    """place: an empty folder."""

    def __init__(self, export: Path, place: Path, seed: int) -> None:
        self.export, self.place, self.chance = export, place, random.Random(seed)
        (place / "checkpoints").symlink_to(STUDENT)

    def words(self, command: str, out: Path) -> list[object]:
        """A short run of a command into folder `out`."""
        if command == "generate":
            return ["generate", "--prompt", "a green seven", "--chunks", 4, "--steps", 1, "--engines", self.export, "--out",
                    out / "v.mp4"]  # fmt: skip
        if command == "train":
            return ["train", "--stage", "vae", "--steps", 200, "--batch", 1, "--evaluate-steps", 0, "--save-steps", 1, "--device", "cpu",
                    "--out", out]  # fmt: skip
        if command == "export":
            return ["export", "--recipe", RECIPE, "--skeleton", "--out", out]
        return ["engines", "--recipe", RECIPE, "--onnx", self.export.parent, "--out", out]

    def kills(self, command: str, count: int) -> Row:
        """kill -9 at random moments of a command; then what is left is whole, and the next run sweeps and succeeds.

        Training goes on each time from what the kill before left; every other kill waits for a new resume point.
        """
        row = Row(f"kill -9: {command}", count, "nothing lost, nothing left after the next run")
        out, hit = self.place / f"kill-{command}", 0
        for number in range(count):
            step = _newest(out)
            process = Run([*self.words(command, out), *(["--resume"] if step else [])])
            began = self._wait_for(process, out, 300)
            if command == "train" and number % 2:
                self._until(process, partial(_is_beyond, out, step))
            time.sleep(self.chance.random() * (1.5 if command in ("train", "engines") else 4))
            hit += (running := process.poll() is None)
            process.kill()
            process.end()
            row.check(_newest(out) >= step, f"{command} {number}: step {step} is lost")
            if began:
                self._check_whole(row, command, out, f"{command} {number}")
            if command == "engines" and not running:
                shutil.rmtree(out)  # what is built already is not built again, so there would be nothing to hit
        code, said = done([*self.words(command, out), *self._again(command, out)])
        row.check(code == 0, f"{command}: the next run fails: {said[-200:]}")
        row.check(not leftovers(out), f"{command}: left over: {leftovers(out)[:3]}")
        if command == "train":
            row.facts["steps in the curve"] = self._check_curve(row, out, "the next run")
        row.facts["hit"] = hit
        return row

    @staticmethod
    def _check_curve(row: Row, out: Path, what: str) -> int:
        """The curve has every step up to the newest resume point; how many."""
        curve = [point["step"] for point in json.loads((out / "loss.json").read_text())["train"]]
        row.check(curve == list(range(1, len(curve) + 1)), f"{what}: the loss curve lacks steps: {curve}")
        row.check(len(curve) >= _newest(out), f"{what}: the loss curve ends at {len(curve)}, before {_newest(out)}")
        return len(curve)

    def _again(self, command: str, out: Path) -> list[object]:
        if command != "train":
            return []
        step = _newest(out)
        return [*(["--resume"] if step else []), *(["--stop-at", step + 2] if step + 2 < 200 else [])]

    def _wait_for(self, process: Run, out: Path, seconds: float) -> bool:
        """Until it writes its first file, or ends."""
        known = _times(out)
        return self._until(process, lambda: _times(out) != known, seconds)

    @staticmethod
    def _until(process: Run, there: Callable[[], bool], seconds: float = 300) -> bool:
        """Wait for something while the process runs; whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            if there():
                return True
            time.sleep(0.05)
        return False

    def _check_whole(self, row: Row, command: str, out: Path, what: str) -> None:
        """Whatever has a final name is whole."""
        try:
            if command == "train":
                points = sorted(out.glob("resume-*.safetensors"))
                if points:
                    kind = json.loads(points[-1].with_suffix(".json").read_text())["kind"]
                    load_checkpoint(points[-1], kind=kind, preset="tiny")
                    self._check_curve(row, out, what)
            elif command == "generate" and (out / "v.mp4").exists():
                from films import frames_from_video

                frames_from_video(out / "v.mp4")
            elif command == "export" and Export.is_in(out / recipe_named(RECIPE).onnx_name):
                Export.read(out / recipe_named(RECIPE).onnx_name)
            elif command == "engines" and (out / RECIPE / "bundle.json").exists():
                from longtake.formats.bundle import Bundle

                bundle = Bundle.read(out / RECIPE)
                [bundle.check_file(out / RECIPE / name) for name in bundle.files]
        except (LongtakeError, OSError, KeyError) as error:
            row.check(False, f"{what}: {error}")

    def endings(self) -> Row:
        """SIGTERM and SIGHUP in each command: what was finished is kept, and the exit code says what ended it."""
        kinds = [
            (command, sign)
            for command in ("generate", "train", "export", "engines")
            for sign in (signal.SIGTERM, signal.SIGHUP)
        ]
        row = Row("SIGTERM, SIGHUP", len(kinds), "finished work kept, exit code 128 + signal, nothing half-written")
        for command, sign in kinds:
            out = self.place / f"end-{command}-{sign.name}"
            words = self.words(command, out)
            # A finished chunk, or a finished step that only the signal makes it save; else in the midst of it.
            more, mark = {"generate": (["--chunks", 40], "| 1/40"), "train": (["--save-steps", 0], "loss=")}.get(
                command, ([], "")
            )
            process = Run([*words, *more])
            self._wait_for(process, out, 300)
            self._until(process, partial(_says, process, mark))
            time.sleep(1)
            process.send_signal(sign)
            code, said = process.end()
            row.check(code == 128 + sign, f"{command} {sign.name}: exit code {code}: {said[-150:]}")
            row.check(not leftovers(out), f"{command} {sign.name}: left over {leftovers(out)[:3]}")
            self._check_whole(row, command, out, f"{command} {sign.name}")
            kept = {"generate": "v.mp4", "train": "resume-*.safetensors"}.get(command)
            row.check(kept is None or bool(list(out.glob(kept))), f"{command} {sign.name}: no {kept}")
        return row

    def address_space(self, count: int) -> Row:
        """`longtake generate` under limits: success, or the right reason."""
        limits = [MEMORY_GB[round(i * (len(MEMORY_GB) - 1) / (count - 1))] for i in range(count)]
        row = Row("address-space limits", count, '"out of memory" with exit code 2, or success')
        good = 0
        for gigabytes in limits:
            size = int(gigabytes * 1e9)
            words = [*self.words("generate", self.place / "memory"), "--chunks", 1]
            code, said = whole_process(words, f"resource.setrlimit(resource.RLIMIT_AS, ({size}, {size}))")
            right = code == 0 or (code == 2 and "out of memory" in said and "Traceback" not in said)
            row.check(right, f"{gigabytes} GB: exit code {code}: {said[-200:]}")
            good += code == 0
        row.facts["succeeded"] = good
        return row

    def full_disk(self, count: int) -> Row:
        """No file may grow beyond a size: a clear error, what was there before stays, and nothing is left half-written."""
        commands = ("generate", "export", "engines", "train")
        row = Row("no space left at a write", count * len(commands), "a clear error, earlier files whole, no crash")
        for command in commands:
            out = self.place / f"disk-{command}"
            sizes = [int(10 ** (2 + 5 * i / max(1, count - 1))) for i in range(count)]
            failed = 0
            for size in sizes:
                before = {
                    path: path.read_bytes()
                    for path in sorted(out.rglob("*"))
                    if path.is_file() and path.name != ".lock"
                }
                limit = f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
                words = self.words(command, out) if command != "train" else [*self.words(command, out), "--stop-at", 2]
                code, said = done(words, limit)
                failed += code != 0
                row.check(code in (0, 2), f"{command}, {size} bytes: exit code {code}: {said[-200:]}")
                row.check("Traceback" not in said, f"{command}, {size} bytes: {said[-300:]}")
                row.check(not leftovers(out), f"{command}, {size} bytes: left over {leftovers(out)[:3]}")
                if (
                    command in ("generate", "train") and code
                ):  # training puts an earlier run aside; a video's report is replaced
                    now = {(path.name, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
                    gone = {path: content for path, content in before.items() if (path.name, content) not in now}
                    lost = [path.name for path in gone if command == "train" or not path.exists()]
                    row.check(not lost, f"{command}, {size} bytes: {lost[:3]} is gone")
            row.facts[command] = f"{failed} of {count} refused"
        return row

    def races(self, count: int) -> Row:
        """Two processes that make the same folder, and a reader meanwhile: both end well, and what is there is whole."""
        row = Row(
            "two processes in one folder, and a reader", 2 * count, "both succeed, the reader reads all or is refused"
        )
        for number in range(count):
            for command in ("export", "engines"):
                out = self.place / f"race-{command}-{number}"
                pair = [Run(self.words(command, out)) for _ in range(2)]
                reads = 0
                while any(process.poll() is None for process in pair):
                    self._read(row, command, out, number)
                    reads += 1
                    time.sleep(0.05)
                for process in pair:
                    code, said = process.end()
                    row.check(code == 0, f"{command} {number}: exit code {code}: {said[-200:]}")
                self._check_whole(row, command, out, f"{command} {number}")
                row.check(not leftovers(out), f"{command} {number}: left over {leftovers(out)[:3]}")
                row.facts[f"reads of {command}"] = reads
        return row

    @staticmethod
    def _read(row: Row, command: str, out: Path, number: int) -> None:
        read: Callable[[], object]
        if command == "export":
            read = lambda: Export.read(out / recipe_named(RECIPE).onnx_name)  # noqa: E731
        else:
            from longtake.formats.bundle import Bundle

            read = lambda: Bundle.read(out / RECIPE)  # noqa: E731
        try:
            read()
        except LongtakeError:
            pass
        except Exception as error:
            row.check(False, f"{command} {number}: a reader meanwhile: {type(error).__name__}: {error}")
