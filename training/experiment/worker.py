"""The process of one unit: it runs it on a device and leaves the result in <out>/units."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from longtake.devices import device_named
from longtake.files import read_json, write_json
from longtake.record import record_from_json
from longtake.training.experiment.bench import Bench
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.units import units


def main() -> int:
    """argv: the folder of the experiment, the unit, the device."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    threading.Thread(target=end_with_the_scheduler, daemon=True).start()
    out, name, began = Path(sys.argv[1]), sys.argv[2], time.monotonic()
    settings = record_from_json(Settings, read_json(out / "settings.json"))
    (unit,) = (one for one in units(settings) if one.name == name)
    try:
        result = unit.run(Bench(settings, out, device_named(sys.argv[3])))
    except KeyboardInterrupt:
        os._exit(130)  # at once: other threads (TensorBoard's) wait for nothing
    except Exception as error:  # noqa: BLE001  (the others go on, and the report says what is missing and why)
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}".splitlines()[0][:300] + "\n")
        return 1
    write_json(out / "units" / f"{name}.json", {**result, "seconds": round(time.monotonic() - began, 1)})
    return 0


def end_with_the_scheduler() -> None:
    """Wait for the end of its pipe, which is the end of the scheduler; then end this process and its children."""
    os.read(0, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
