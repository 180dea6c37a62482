"""Order, places, failures, deadline and resumption of units that run as processes (stand-ins that sleep or fail)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from longtake.training.experiment.scheduler import Scheduler, Slot
from longtake.training.experiment.units import Unit, present, wanted

WORKER = """
import pathlib, sys, time
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(out / "ran", "a") as log: log.write(name + " ")
if name.startswith("long"):
    try: time.sleep(60)
    except KeyboardInterrupt: (out / "asked").write_text(name); sys.exit(130)
if name.startswith("dies"): sys.exit(9)
if name.startswith("bad"): sys.exit("it is bad")
if name.startswith("slow"): time.sleep(0.5)
(out / "units").mkdir(exist_ok=True)
(out / "units" / (name + ".json")).write_text('{"x": 1}')
(out / name).write_text("product")
"""


def stand_in(out: Path, name: str, device: str) -> list[str]:
    """A process that doesn't compute anything."""
    return [sys.executable, "-c", WORKER, str(out), name]


def unit(name: str, *needs: str, **more: Any) -> Unit:
    return Unit(name, 0.1, lambda bench: {}, needs, product=name, **more)


def scheduler_of(out: Path, every: list[Unit], devices: int = 1, jobs: int = 1, seconds: float = 20.0) -> Scheduler:
    slots = [Slot(f"cpu{d}", n, jobs > 1) for d in range(devices) for n in range(jobs)]
    quiet = lambda line: None  # noqa: E731
    return Scheduler(every, out, slots, time.monotonic() + seconds, 0.0, toy=True, say=quiet, command=stand_in)


def test_needs_come_first_and_the_rest_is_resumed(tmp_path: Path) -> None:
    every = [unit("c", "b"), unit("b", "a"), unit("a"), unit("d")]
    made = scheduler_of(tmp_path, every)
    assert made.run() and (tmp_path / "ran").read_text().split() == ["a", "b", "c", "d"]
    again = scheduler_of(tmp_path, [*every, unit("e", "c")])
    assert again.run() and (tmp_path / "ran").read_text().split()[4:] == ["e"]


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    every = [unit("bad"), unit("child", "bad"), unit("dies"), unit("a"), unit("end", "a", after=("bad", "dies"))]
    made = scheduler_of(tmp_path, every, devices=2)
    assert not made.run()
    assert (tmp_path / "ran").read_text().split().count("dies") == 2  # each gets a second try
    missing = made.missing()
    assert missing["bad"] == "it is bad" and missing["child"] == "bad failed" and "code 9" in missing["dies"]
    assert {"a", "end"} == set(made.results) and "child" not in (tmp_path / "ran").read_text()


def test_the_deadline_asks_and_reports(tmp_path: Path) -> None:
    made = scheduler_of(tmp_path, [unit("long"), unit("a")], devices=2, seconds=5)
    began = time.monotonic()
    assert not made.run() and time.monotonic() - began < 20
    assert made.missing() == {"long": "the time was over"} and (tmp_path / "asked").read_text() == "long"
    assert json.loads((tmp_path / "progress.json").read_text())["left"] == ["long"]


def test_heavy_units_have_a_device_each(tmp_path: Path) -> None:
    heavy = [unit(f"slow-{n}", heavy=True) for n in range(3)]
    made = scheduler_of(tmp_path, [*heavy, unit("slow-light"), unit("a")], devices=2, jobs=2)
    made.start_what_can()
    at = {slot.unit: (slot.device, slot.number) for slot in made.slots if slot.unit}
    assert at["slow-0"][1] == at["slow-1"][1] == 0 and at["slow-0"][0] != at["slow-1"][0]
    assert at["slow-light"][1] == at["a"][1] == 1 and "slow-2" not in at
    assert made.run()


def test_lost_products_are_made_again_only_for_who_needs_them(tmp_path: Path) -> None:
    every = [unit("a", step=True), unit("b", "a"), unit("c", "b"), unit("d", "a")]
    results = {name: {"x": 1} for name in "abc"}
    (tmp_path / "b").write_text("product")
    assert [u.name for u in wanted(every, results, tmp_path)] == ["a", "d"]
    assert present(every[1], results, tmp_path) and not present(every[0], results, tmp_path)
    results["d"] = {"x": 1}
    assert not wanted(every, results, tmp_path)
