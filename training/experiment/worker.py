"""A process that runs units on one device, one after the other, as the scheduler tells it.

It reads one JSON object a line from its standard input, {"unit": name, "seconds": left}, and answers each on its standard
output, {"unit", "state", "why"}; a result is in <out>/units by then. When its input ends, or Ctrl-C reaches it, so does it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> int:
    """argv: the folder of the experiment, the device."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read, args=(orders,), daemon=True).start()
    try:
        return work(Path(sys.argv[1]), sys.argv[2], orders, answers)
    except KeyboardInterrupt:
        os._exit(130)  # at once: the reading thread may hold its file, and others (TensorBoard's) wait for nothing


def read(orders: queue.Queue[str]) -> None:
    """Hand on each line; at the end, which is the end of the scheduler, too, end this process and its children."""
    for line in sys.stdin:
        orders.put(line)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def work(out: Path, device: str, orders: queue.Queue[str], answers: Any) -> int:
    """Run what is ordered."""
    from longtake.files import read_json
    from longtake.record import record_from_json
    from longtake.training.devices import device_named
    from longtake.training.experiment.bench import Bench
    from longtake.training.experiment.settings import Settings
    from longtake.training.experiment.units import units

    settings = record_from_json(Settings, read_json(out / "settings.json"))
    bench, known = Bench(settings, out, device_named(device)), {unit.name: unit for unit in units(settings)}
    while True:
        order = json.loads(orders.get())
        sys.stderr.write(f"== {order['unit']}\n")
        state, why = attempt(known[order["unit"]], bench, float(order["seconds"]))
        answers.write(json.dumps({"unit": order["unit"], "state": state, "why": why}) + "\n")


def attempt(unit: Any, bench: Any, seconds: float) -> tuple[str, str]:
    """Run a unit and keep its result. Returns its state and why: "done", "skipped", "out of time" or "failed"."""
    from longtake.files import write_json
    from longtake.training.experiment.arms import OutOfTime

    began = time.monotonic()
    try:
        bench.read_results()
        result = unit.run(bench, seconds)
    except OutOfTime as stop:
        return "out of time", str(stop)
    except Exception as error:  # noqa: BLE001  (the others go on, and the report says what is missing and why)
        traceback.print_exc()
        bench.forget_models()
        return "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if result.get("skipped"):
        return "skipped", result["skipped"]
    took = round(time.monotonic() - began, 1)
    write_json(bench.out / "units" / f"{unit.name}.json", {**result, "seconds": took})
    return "done", f"{took} s"


if __name__ == "__main__":
    sys.exit(main())
