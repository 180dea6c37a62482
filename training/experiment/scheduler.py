"""Runs the experiment's units, a process each, on several devices: what others need first, until all is done or time is over.

A unit is done when its result, <out>/units/<name>.json, is there, and what it leaves for others.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longtake.files import write_json
from longtake.training.experiment.summary import results_in
from longtake.training.experiment.units import Unit, wanted
from longtake.training.parallel.launch import end

logger = logging.getLogger(__name__)
POLL = 0.1
GRACE = 10.0  # seconds between "stop" and the end of a process: a resume point takes one or two
ATTEMPTS = 2
SHORTEST = 45.0  # seconds that a unit which can be resumed is begun for


@dataclass
class Slot:
    """A place for a process. Slot 0 of every device is for heavy units as long as there are any: they need a whole one."""

    device: str
    number: int = 0
    beside: bool = False  # whether its device has other slots
    unit: str | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """It sees no GPU but its own, so that "the present device" is never another one."""
        if not self.device.startswith("cuda"):
            return {}
        visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), int(self.device.partition(":")[2] or 0)
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def command_of(out: Path, unit: str, device: str) -> list[str]:
    """What runs a unit."""
    own = "cuda:0" if device.startswith("cuda") else device
    return [sys.executable, "-m", "longtake.training.experiment.worker", str(out.absolute()), unit, own]


@dataclass
class Scheduler:
    """What has been done, what runs where, and what failed."""

    every: Sequence[Unit]
    out: Path
    slots: Sequence[Slot]
    deadline: float
    reserve: float = 20.0
    toy: bool = False
    say: Callable[[str], None] = logger.info
    command: Callable[[Path, str, str], list[str]] = command_of
    failures: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    ran: bool = False

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        """See what is done and what is left."""
        self.results = results_in(self.out)
        self.left = {unit.name: unit for unit in wanted(self.every, self.results, self.out)}

    def run(self) -> bool:
        """Work; returns whether nothing is left. Processes are gone when it returns, however that comes about."""
        try:
            while self.left:
                self.start_what_can()
                running = [slot for slot in self.slots if slot.unit]
                if not running or (self.seconds() <= 0 and self.ran):
                    break
                time.sleep(POLL)
                for slot in running:
                    self.settle(slot)
        finally:
            self.stop()
        return not self.left

    def seconds(self) -> float:
        """What is left for units: the report needs a little, too."""
        return self.deadline - self.reserve - time.monotonic()

    def ready(self) -> list[Unit]:
        """Units that could start now, the most urgent first."""
        running = {slot.unit for slot in self.slots}
        return [
            unit
            for unit in self.left.values()
            if unit.name not in running | self.failures.keys()
            and not any(name in self.left for name in unit.needs)
            and all(name not in self.left or name in self.failures for name in unit.after)
        ]

    def start_what_can(self) -> None:
        """Give every free slot something to do, if the time is enough for it."""
        for unit in self.ready():
            needed = 1.0 if self.toy else min(unit.seconds, SHORTEST) if unit.divisible else unit.seconds
            if self.seconds() <= 0 or (self.ran and self.seconds() < needed):
                continue
            free = [slot for slot in self.slots if not slot.unit and self.allowed(unit, slot)]
            if free:
                # Spread over the devices; among its slots, leave the heavy one free if possible.
                self.start(unit, min(free, key=lambda slot: (self.load(slot.device), -slot.number)))

    def start(self, unit: Unit, slot: Slot) -> None:
        """Begin a unit; what it says goes to logs/<name>.log."""
        threads = max(1, (os.cpu_count() or 1) // len(self.slots))
        environment = {**os.environ, **slot.environment, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "5"}
        command = self.command(self.out, unit.name, slot.device)
        with open(self.log(unit.name), "ab") as log:
            # A session of its own: Ctrl-C reaches the scheduler only, which then asks. When it dies, its pipe says so.
            slot.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        slot.unit, self.ran = unit.name, True
        self.note(unit.name, "starts", f"on {slot.device}")

    def log(self, name: str) -> Path:
        folder = self.out / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def allowed(self, unit: Unit, slot: Slot) -> bool:
        """Whether this slot takes this unit at present."""
        if unit.heavy or not slot.beside:
            return slot.number == 0
        heavy = {one.name for one in self.left.values() if one.heavy} - self.failures.keys()
        waiting = any(one.heavy for one in self.ready())
        return slot.number > 0 or not heavy or (unit.step and not waiting)

    def load(self, device: str) -> int:
        return sum(bool(slot.unit) for slot in self.slots if slot.device == device)

    def settle(self, slot: Slot) -> None:
        """See what became of a slot's unit, if its process has ended."""
        assert slot.process is not None and slot.unit is not None
        code, name = slot.process.poll(), slot.unit
        if code is None:
            return
        slot.unit = None
        self.look()
        if name not in self.left:
            self.note(name, "done", f"{self.results[name].get('seconds', '')} s")
            return
        why = self.reason(name, code)
        self.attempts[name] = self.attempts.get(name, 0) + 1
        if self.attempts[name] >= ATTEMPTS:
            self.failures[name] = why
        self.note(name, "failed", why)

    def reason(self, name: str, code: int) -> str:
        """Why a unit failed: the last line that it wrote."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        product = next(unit.product for unit in self.every if unit.name == name)
        return said if code == 1 else f"its process ended with code {code}" if code else f"{product} is missing"

    def stop(self) -> None:
        """End every process: first they are asked, so that trainings save where they stand."""
        running = [slot.process for slot in self.slots if slot.process is not None and slot.process.poll() is None]
        for process in running:
            os.killpg(process.pid, signal.SIGINT)
        until = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            end(process)
        self.look()

    def missing(self) -> dict[str, str]:
        """Units that have no result, and why."""
        return {
            name: self.failures.get(name)
            or next((f"{need} failed" for need in unit.needs if need in self.failures), "the time was over")
            for name, unit in self.left.items()
            if name not in self.results
        }

    def note(self, name: str, state: str, why: str) -> None:
        """A line of progress, on the screen and in progress.json."""
        done = sum(unit.name in self.results for unit in self.every)
        self.say(f"[{time.monotonic() - self.began:6.1f} s, {done}/{len(self.every)}] {name}: {state} {why}".rstrip())
        running = {f"{slot.device} slot {slot.number}": slot.unit for slot in self.slots if slot.unit}
        found = {"done": sorted(self.results), "running": running, "failures": self.failures, "left": sorted(self.left)}
        write_json(self.out / "progress.json", found)
