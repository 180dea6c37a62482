"""Processes of one host started as ranks, without torchrun: the first one that fails ends the others at once.

A rank that ran out of memory leaves the others in a collective that never ends, so nothing here waits for them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longtake.training.parallel.ranks import launcher_variables

POLL_S = 0.2
# One host only: the loopback is always there. Multicast over NVLink stays off: on shared hosts it can wedge the switch.
SETTINGS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "1",
}


def run_ranks(
    words: Sequence[str], ranks: int, logs: Path, deadline: float, seen: Callable[[], None] = lambda: None
) -> str | None:
    """Run `python words` as `ranks` ranks; None, or why it failed in a few words. Nothing runs on afterwards.

    Args:
        logs: folder for `<rank>.log`, what a rank writes to stdout and stderr.
        deadline: of time.monotonic(), when to give up.
        seen: called while waiting.
    """
    env = {name: value for name, value in os.environ.items() if name not in launcher_variables()}
    env = {**SETTINGS, **env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    running = []
    try:
        for rank in range(ranks):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(logs / f"{rank}.log", "wb") as log:
                running.append(
                    subprocess.Popen([sys.executable, *words], env=own, stdout=log, stderr=log, start_new_session=True)
                )
        while True:
            codes = [process.poll() for process in running]
            if any(codes):
                time.sleep(POLL_S)  # the reason may stand in another rank's log
                return reason(logs, [code for code in codes if code])
            if all(code == 0 for code in codes):
                return None
            seen()
            if time.monotonic() > deadline:
                return "not done in the time it was given"
            time.sleep(POLL_S)
    finally:
        for process in running:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def reason(logs: Path, codes: list[int]) -> str:
    """Why ranks failed, from what they wrote."""
    texts = [path.read_text(errors="replace") for path in sorted(logs.glob("*.log"))]
    if any("OutOfMemoryError" in text or "out of memory" in text for text in texts):
        return "out of memory"
    lines = [line for text in texts for line in text.splitlines() if "Error" in line]
    return (lines[-1] if lines else f"exit code {codes[0]}")[:300]
