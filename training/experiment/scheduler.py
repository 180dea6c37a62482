"""Runs the experiment's units as processes on several devices, what they need first, until all is done or time is over."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from longtake.files import read_json, write_json
from longtake.training.experiment.slots import Slot
from longtake.training.experiment.units import Unit, present, wanted

logger = logging.getLogger(__name__)
GRACE = 10.0  # seconds between "stop" and the end of a process: a resume point takes one or two
ATTEMPTS = 2


@dataclass
class Scheduler:
    """What has been done, what runs where, and what failed.

    Slot 0 of every device is for heavy units as long as there are any; they need a whole device.
    """

    every: Sequence[Unit]
    out: Path
    slots: Sequence[Slot]
    deadline: float
    reserve: float = 20.0
    toy: bool = False
    say: Callable[[str], None] = logger.info
    failures: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}
        for file in sorted((self.out / "units").glob("*.json")):
            self.results[file.stem] = read_json(file)
        self.left = {unit.name: unit for unit in wanted(self.every, self.results, self.out)}
        self.ran = False

    def run(self) -> bool:
        """Work; returns whether nothing is left. Processes are gone when it returns, however that comes about."""
        try:
            while self.left:
                self.start_what_can()
                running = [slot for slot in self.slots if slot.unit]
                seconds = self.seconds()
                if not running or (seconds <= 0 and self.ran):
                    break
                wait([slot.sentinel for slot in running], timeout=max(0.1, min(5.0, seconds)))
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
        settled = lambda name: name not in self.left or name in self.failures  # noqa: E731
        return [
            unit
            for unit in self.left.values()
            if unit.name not in running
            and unit.name not in self.failures
            and not any(name in self.left for name in unit.needs)
            and all(settled(name) for name in unit.after)
        ]

    def start_what_can(self) -> None:
        """Give every free slot something to do, if the time is enough for it."""
        for unit in self.ready():
            needed = min(unit.seconds, 45.0) if unit.divisible else unit.seconds
            if self.seconds() < (1.0 if self.toy else needed) and (self.ran or self.seconds() <= 0):
                continue
            free = [slot for slot in self.slots if not slot.unit and self.allowed(unit, slot)]
            if free:
                # Spread over the devices; among its slots, leave the heavy one free if possible.
                slot = min(free, key=lambda s: (self.load(s.device), -s.number))
                ending = 0.0 if self.toy or not unit.divisible else 10.0  # its last evaluation and checkpoints
                slot.start(unit.name, max(1.0, self.seconds() - ending))
                self.ran = True
                self.note(unit.name, "starts", f"on {slot.name}")

    def allowed(self, unit: Unit, slot: Slot) -> bool:
        """Whether this slot takes this unit at present."""
        if not slot.beside:
            return True  # the device has one slot
        if unit.heavy:
            return slot.number == 0
        if slot.number:
            return True
        heavy = [other for other in self.left.values() if other.heavy and other.name not in self.failures]
        waiting = any(other in heavy for other in self.ready())
        return not heavy or (not unit.divisible and not waiting and unit.step)

    def load(self, device: str) -> int:
        return sum(bool(slot.unit) for slot in self.slots if slot.device == device)

    def settle(self, slot: Slot) -> None:
        """Take what a slot answers, if it does."""
        answer = slot.answer()
        if answer is None:
            return
        name, state, why = answer
        if state == "done":
            self.results[name] = read_json(self.out / "units" / f"{name}.json")
            if present(self.left[name], self.results, self.out):
                del self.left[name]
            else:
                state, why = "failed", f"{self.left[name].product} is missing"
        if state in ("failed", "skipped"):
            self.attempts[name] = self.attempts.get(name, 0) + 1
            if state == "skipped" or self.attempts[name] >= ATTEMPTS:
                self.failures[name] = why
        self.note(name, state, why)  # "out of time" comes with the deadline; the next call goes on

    def stop(self) -> None:
        """End every process: first they are asked, so that trainings save where they stand."""
        for slot in self.slots:
            slot.ask_to_stop()
        until = time.monotonic() + GRACE
        for slot in self.slots:
            slot.end(max(0.0, until - time.monotonic()))

    def missing(self) -> dict[str, str]:
        """Units that have no result, and why."""
        return {
            name: self.failures.get(name) or self.blocked(unit) or "the time was over"
            for name, unit in self.left.items()
            if name not in self.results
        }

    def blocked(self, unit: Unit) -> str:
        failed = [name for name in unit.needs if name in self.failures]
        return f"{failed[0]} failed" if failed else ""

    def note(self, name: str, state: str, why: str) -> None:
        """A line of progress, on the screen and in progress.json."""
        done = sum(unit.name in self.results for unit in self.every)
        self.say(f"[{time.monotonic() - self.began:6.1f} s, {done}/{len(self.every)}] {name}: {state} {why}".rstrip())
        write_json(
            self.out / "progress.json",
            {
                "done": sorted(self.results),
                "running": {slot.name: slot.unit for slot in self.slots if slot.unit},
                "failures": self.failures,
                "left": sorted(self.left),
            },
        )


def slots_for(out: Path, devices: Sequence[str], jobs: int) -> list[Slot]:
    """`jobs` slots of each device."""
    threads = max(1, (os.cpu_count() or 1) // (len(devices) * jobs))
    return [Slot(out, device, place, number, jobs, threads) for place, device in enumerate(devices) for number in range(jobs)]  # fmt: skip
