"""The soak on a GPU, segmented engines, in calls of minutes: each goes on from the session that the one before it saved.

    PYTHONPATH=. python tests/faults/gpu_soak.py --engines FOLDER --state runs/soak --minutes 9     (seven times: an hour)

Each call adds a line to STATE/soak.json: chunks, growth of device and host memory, whether any latent was NaN, and whether
a tensor's address moved. It fails below 100 MB of growth, on a NaN, and on a moved address. Not run yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from longtake.files import read_json, write_json
from longtake.runtime.backends.trt.engine import device_bytes_used
from longtake.runtime.generator import Generator
from longtake.runtime.session import Session

PROMPTS = ("a green seven drifts left over a dark blue background, soft light", "a red two circles over a sea background",
           "a yellow six over a dark blue background")  # fmt: skip
MOST_GROWTH = 100e6
SETTLED = 20  # chunks of a call after which memory is compared


def addresses(session: Session) -> list[int]:
    """Of every tensor that lives as long as the session."""
    decoder = session._decoding.decoder.state() if session._decoding else []
    return [tensor.data_ptr() for tensor in session._state.tensors().values()] + sorted(t.data_ptr() for t in decoder)


def soak(engines: Path, state: Path, minutes: float) -> dict[str, Any]:
    """Generate for so long; what was measured."""
    saved = state / "session.safetensors"
    log: list[dict[str, Any]] = read_json(state / "soak.json") if (state / "soak.json").is_file() else []
    begun, chunks, nan, moved = time.monotonic(), 0, False, False
    with Generator.from_engines(engines, backend="segmented") as generator:
        session = (
            generator.load_session(saved) if saved.is_file() else generator.session(PROMPTS[0], seed=0, endless=True)
        )
        before: tuple[int, int] | None = None
        places: list[int] = []
        with session:
            while time.monotonic() - begun < 60 * minutes:
                index = session.next_index
                if index % 7 == 6:
                    session.cut(PROMPTS[index % 3])
                elif index % 5 == 4:
                    session.change_prompt(PROMPTS[index % 3])
                chunk = next(session)
                nan = nan or not bool(chunk.latents.isfinite().all())
                chunk.frames  # noqa: B018
                chunks += 1
                if chunks == SETTLED:
                    before, places = _memory(generator), addresses(session)
                moved = moved or (chunks > SETTLED and addresses(session) != places)
            after = _memory(generator)
            session.save(saved)
            first = index + 1 - chunks
    growth = [0, 0] if before is None else [now - then for now, then in zip(after, before)]
    row = {"gpu": torch.cuda.get_device_name(0), "minutes": minutes, "first": first, "chunks": chunks, "nan": nan, "moved": moved,
           "device_growth_mb": round(growth[0] / 1e6, 1), "host_growth_mb": round(growth[1] / 1e6, 1)}  # fmt: skip
    write_json(state / "soak.json", [*log, row])
    return row


def _memory(generator: Generator) -> tuple[int, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return device_bytes_used(generator.backend.device), pages * os.sysconf("SC_PAGE_SIZE")


def held(row: dict[str, Any]) -> bool:
    """Whether a line is as it must be."""
    return (
        not row["nan"] and not row["moved"] and max(row["device_growth_mb"], row["host_growth_mb"]) * 1e6 <= MOST_GROWTH
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("runs/soak"))
    parser.add_argument("--minutes", type=float, default=9)
    asked = parser.parse_args()
    row = soak(asked.engines, asked.state, asked.minutes)
    print(row)
    return 0 if held(row) else 1


if __name__ == "__main__":
    sys.exit(main())
