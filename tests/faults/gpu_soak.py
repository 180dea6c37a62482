"""The soak on a GPU, segmented engines, in calls of minutes: each goes on from the session that the one before it saved.

    PYTHONPATH=. python tests/faults/gpu_soak.py --engines FOLDER --state build/soak --minutes 9     (seven times: an hour)

Each call adds a line to STATE/soak.json: chunks, growth of memory, whether any latent was NaN, whether a tensor's address
moved, and whether its first chunk is, bit by bit, the one that the call before made after it had saved. It fails above
100 MB of growth, on a NaN, on a moved address, and on another chunk.

Device memory is counted three ways: what the driver says of this process, where it can tell it; what torch's allocator
holds, with the scratch that the engines run in; and the whole device, where other processes count too. The first is
judged, else the last.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from longtake.files import read_json, write_json
from longtake.machine.nvml import nvml
from longtake.provenance import commit, origin
from longtake.runtime.bench.gpu import gpu_state, machine
from longtake.runtime.generator import Generator
from longtake.runtime.session import Session

PROMPTS = ("a green seven drifts left over a dark blue background, soft light", "a red two circles over a sea background",
           "a yellow six over a dark blue background")  # fmt: skip
MOST_GROWTH_MB = 100
SETTLED = 20  # chunks of a call after which memory is compared


def addresses(session: Session) -> list[int]:
    """Of every tensor that lives as long as the session."""
    decoder = session._decoding.decoder.state() if session._decoding else []
    return [tensor.data_ptr() for tensor in session._state.tensors().values()] + sorted(t.data_ptr() for t in decoder)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes by who counts them."""
    told = {"host": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if device.type != "cuda":
        return told
    free, total = torch.cuda.mem_get_info(device)
    told |= {"torch": torch.cuda.memory_reserved(device), "device": total - free}
    try:
        with nvml() as pynvml:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            there = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # NVML raises its own types, and may be missing
        return told
    own = [each.usedGpuMemory for each in there if each.pid == os.getpid() and each.usedGpuMemory]
    return told | ({"process": own[0]} if own else {}) | {"processes": len(there)}


def next_chunk(session: Session) -> tuple[str, bool]:
    """The next chunk after the change that its number asks for: the digest of its latents and frames; whether all is finite."""
    index = session.next_index
    if index is not None and index % 7 == 6:
        session.cut(PROMPTS[index % 3])
    elif index is not None and index % 5 == 4:
        session.change_prompt(PROMPTS[index % 3])
    chunk = next(session)
    latents, frames = chunk.latents.float().cpu(), chunk.frames
    return hashlib.sha256(latents.numpy().tobytes() + frames.tobytes()).hexdigest(), bool(latents.isfinite().all())


def soak(engines: Path, state: Path, minutes: float, backend: str = "segmented", settled: int = SETTLED,
         steps: int | None = None, of: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Generate for so long; what was measured. of: the commit, where the code lies in no checkout."""
    saved, log = state / "session.safetensors", state / "soak.json"
    calls: list[dict[str, Any]] = read_json(log)["calls"] if log.is_file() else []
    begun, chunks, finite, moved, first = time.monotonic(), 0, True, False, ""
    settled_at: dict[str, int] | None = None
    places: list[int] = []
    with Generator.from_engines(engines, backend=backend) as generator:
        device = generator.backend.device
        before = gpu_state(device)
        session = (generator.load_session(saved, endless=True) if calls
                   else generator.session(PROMPTS[0], seed=0, endless=True, steps=steps))  # fmt: skip
        with session:
            start = session.next_index
            while not chunks or time.monotonic() - begun < 60 * minutes:
                digest, all_finite = next_chunk(session)
                first, finite, chunks = first or digest, finite and all_finite, chunks + 1
                if chunks == settled:
                    settled_at, places = memory(device), addresses(session)
                moved = moved or (chunks > settled and addresses(session) != places)
            after = memory(device)
            session.save(saved)
            after_saving = next_chunk(session)[0]
        conditions = {
            **machine(device),
            "before": before,
            "after": gpu_state(device),
            "processes": after.pop("processes", None),
        }
    growth = {f"{who}_growth_mb": round((size - settled_at[who]) / 1e6, 1) for who, size in after.items() if who in settled_at} \
        if settled_at else {}  # fmt: skip
    row = {"minutes": round((time.monotonic() - begun) / 60, 2), "first": start, "chunks": chunks, "nan": not finite,
           "moved": moved, "same": not calls or calls[-1]["after_saving"] == first, "after_saving": after_saving,
           **growth, "conditions": conditions, "commit": of or commit()}  # fmt: skip
    why = "a program of tests/faults, not a command: see command"
    told = {**origin(), "not_rerun_because": why, "commit": row["commit"], "engines": str(engines), "backend": backend}
    rows = [*calls, row]
    write_json(
        log, {**told, "minutes": sum(each["minutes"] for each in rows), "held": all(map(held, rows)), "calls": rows}
    )
    return row


def held(row: dict[str, Any]) -> bool:
    """Whether a line is as it must be. Without a figure of growth, of too few chunks, it is not."""
    on_device = row.get("process_growth_mb", row.get("device_growth_mb", 0))
    grown = max(on_device, row.get("host_growth_mb", float("inf")))
    return not row["nan"] and not row["moved"] and row["same"] and grown <= MOST_GROWTH_MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/soak"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument(
        "--backend", default="segmented", help='"reference" runs an export on the CPU, to try this program'
    )
    parser.add_argument("--settled", type=int, default=SETTLED, help="chunks before memory is compared")
    parser.add_argument("--steps", type=int, help="denoise steps (default: the model's)")
    parser.add_argument("--commit", help="of the code, where it lies in no checkout")
    asked = parser.parse_args()
    row = soak(asked.engines, asked.state, asked.minutes, asked.backend, asked.settled, asked.steps, asked.commit)
    print(row)
    return 0 if held(row) else 1


if __name__ == "__main__":
    sys.exit(main())
