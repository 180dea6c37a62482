"""One part of a benchmark in a process of its own: `python -m longtake.runtime.bench.worker PART OPTIONS.json OUT.json`.

Its memory is what the driver counts for this process, a crash or a hang costs this part only, and whatever was
measured before is in OUT.json, which is written again after every stage.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from longtake.files import read_json, write_json
from longtake.runtime.bench.gpu import device_from_name, gpu_state, machine
from longtake.runtime.bench.options import BenchOptions, options_from_json
from longtake.settings import configure_logging


def measure_part(part: str, options: BenchOptions, out: Path) -> dict[str, Any]:
    """Run one part; an error is recorded beside what was measured until then, not raised."""
    started = time.perf_counter()
    device = device_from_name(options.device)
    where = machine(device)
    if options.decode_device and part == "engine":
        where["decode_gpu"] = machine(device_from_name(options.decode_device)).get("gpu")
    kept: dict[str, Any] = {"part": part, "machine": where, "gpu_state_before": gpu_state(device)}

    def save(figures: dict[str, Any]) -> None:
        kept.update(figures)
        kept["seconds"] = round(time.perf_counter() - started, 1)
        write_json(out, kept)

    try:
        if part == "engine":
            from longtake.runtime.bench.engine_side import measure_engine

            save(measure_engine(options, save))
        elif part == "ranks":
            from longtake.runtime.bench.ranks_side import measure_ranks

            save(measure_ranks(options, save))
        else:
            from longtake.runtime.bench.torch_side import measure_torch

            save(measure_torch(part, options, save))
    except Exception as error:  # noqa: BLE001  (the other parts go on; the report says what failed)
        traceback.print_exc()
        save({"error": f"{type(error).__name__}: {error}"})
    return kept


def main(words: list[str]) -> int:
    """Run from the command line; 1 if the part failed."""
    part, options, out = words
    configure_logging()
    logging.getLogger("longtake").setLevel(logging.INFO)  # the part's log file says what was chosen and why
    return int("error" in measure_part(part, options_from_json(read_json(Path(options))), Path(out)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
