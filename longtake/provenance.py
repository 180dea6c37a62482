"""Where figures come from: the commit, the versions of what they depend on, the processor, the memory of the process."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longtake.paths import REPOSITORY
from longtake.settings import cores
from longtake.version import __version__

PACKAGES = ("torch", "onnxruntime", "onnx", "nvidia-modelopt", "tensorrt", "tensorrt-rtx-cu13", "cuda-core", "av")


def commit() -> str | None:
    """Commit of the checkout this code runs from, "-dirty" if tracked files differ; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def origin() -> dict[str, Any]:
    """What every report says of where it comes from."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"command": command_line(), "rerun_with": rerun_with(), "commit": commit()}
    return {**told, "date": date, "cpu": cpu_name(), "versions": versions()}


def rerun_with() -> str:
    """The command that is running, if it is one of ours; "" in a program of somebody else's."""
    return command if (command := command_line()).startswith("longtake ") else ""


def command_line() -> str:
    """The command that is running, as one would type it."""
    program = Path(sys.argv[0]).name
    program = "longtake" if program in ("longtake", "__main__.py") else program
    return shlex.join([program, *sys.argv[1:]])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Our version, Python's, and those of `packages`; the absent ones are left out."""
    found = {"longtake": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Model name of the processor, and how many cores this process sees."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {cores()} cores"


def resident_bytes() -> int:
    """The most memory that this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, except on macOS
