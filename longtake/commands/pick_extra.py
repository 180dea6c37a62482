"""Which TensorRT extra fits this machine. Runs before anything is installed: standard library only.

Prints the extra's name on stdout and the reason on stderr; `make setup` installs `longtake[<extra>]`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

HOPPER = "9.0"


def compute_capability() -> str | None:
    """Compute capability of the first GPU as nvidia-smi tells it, such as "9.0"; None without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def extra_for(capability: str | None, tensorrt_installed: bool) -> tuple[str, str]:
    """The extra and the reason for it."""
    if tensorrt_installed:
        return "dev", "TensorRT is installed already and is used as it is"
    if capability == HOPPER:
        return "rtx-hopper", "TensorRT-RTX 1.6.1, the newest release that runs on compute capability 9.0"
    where = f"compute capability {capability}" if capability else "no GPU (it builds engines without one)"
    return "rtx", f"TensorRT-RTX 1.7 for {where}"


if __name__ == "__main__":
    extra, reason = extra_for(compute_capability(), importlib.util.find_spec("tensorrt") is not None)
    print(f"TensorRT flavour: {reason}", file=sys.stderr)
    print(extra)
