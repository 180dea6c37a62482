"""The environment variables, all of them: nothing else in the project reads the environment.

| variable            | meaning                                                           | default                       |
|---------------------|-------------------------------------------------------------------|-------------------------------|
| LONGTAKE_HOME       | where exports, engines, compiled kernels and timing caches lie    | ~/.cache/longtake (no home: temporary files) |
| LONGTAKE_LOG        | log level: debug, info, warning, error                            | warning                       |
| LONGTAKE_THREADS    | CPU threads of the reference backend                              | all cores this process may use |
| LONGTAKE_FLAVOUR    | TensorRT flavour: auto, tensorrt, tensorrt_rtx                    | auto                          |
| LONGTAKE_TRTEXEC    | path of trtexec, if it is not on PATH                             | (searched on PATH)            |

LONGTAKE_CACHE_DIR, which LONGTAKE_HOME replaces, is still read in this version where LONGTAKE_HOME isn't set.
HF_HUB_CACHE and HF_HOME are Hugging Face's: they say where models that were downloaded lie.
RAY_AUTH_MODE is Ray's own: `longtake serve --ray` asks whether a cluster of several machines has it.
So is RAY_ADDRESS, the cluster to join: one that does not answer is refused at once.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from longtake.errors import LongtakeError

log = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error")
FLAVOURS = ("auto", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Settings:
    """The settings of this process. home: where exports and engines lie; cache_dir: kernels and timing caches."""

    home: Path
    cache_dir: Path
    log_level: str
    threads: int
    flavour: str
    trtexec: Path | None


def _bad(name: str, got: str, expected: str) -> LongtakeError:
    return LongtakeError(f"bad environment variable {name}", got=repr(got), expected=expected, fix=f"unset {name}")


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = environ.get(name, default).lower()
    if value not in allowed:
        raise _bad(name, value, " | ".join(allowed))
    return value


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _threads(environ: Mapping[str, str]) -> int:
    given = environ.get("LONGTAKE_THREADS", "")
    if not given:
        return cores()
    if not given.isdigit() or int(given) < 1:
        raise _bad("LONGTAKE_THREADS", given, "a whole number from 1 up")
    return int(given)


def _home_cache() -> Path:
    """~/.cache/longtake; without a home (services, containers under any user id) a private folder for temporary files."""
    try:
        return Path.home() / ".cache" / "longtake"
    except RuntimeError:  # no HOME, and no entry in the system's list of users
        return _private_folder(Path(tempfile.gettempdir()) / f"longtake-{os.getuid()}")


@cache
def _private_folder(folder: Path) -> Path:
    """`folder`, made for this user alone; a new one if another user could write into it, as compiled code lies there."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="longtake-"))


@cache
def _say_old(value: str) -> None:
    log.warning(
        "LONGTAKE_CACHE_DIR is called LONGTAKE_HOME now (exports and engines lie there, too); the old name is "
        "read in this version only: set LONGTAKE_HOME=%s",
        value,
    )


def settings_from_environment(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and check the settings. Raises LongtakeError naming the variable that is wrong."""
    environ = os.environ if environ is None else environ
    trtexec = environ.get("LONGTAKE_TRTEXEC")
    home = environ.get("LONGTAKE_HOME")
    if old := "" if home else environ.get("LONGTAKE_CACHE_DIR"):
        _say_old(old)
    folder = Path(home or old or _home_cache()).expanduser()
    return Settings(
        home=folder,
        cache_dir=folder,
        log_level=_choice(environ, "LONGTAKE_LOG", LOG_LEVELS, "warning"),
        threads=_threads(environ),
        flavour=_choice(environ, "LONGTAKE_FLAVOUR", FLAVOURS, "auto"),
        trtexec=Path(trtexec) if trtexec else None,
    )


def configure_logging() -> None:
    """Send the project's log to stderr at the level of LONGTAKE_LOG; libraries stay at warning."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("longtake").setLevel(settings_from_environment().log_level.upper())


def ray_address() -> str:
    """The Ray cluster to join; "" where none is named."""
    return os.environ.get("RAY_ADDRESS", "")


def ray_cluster_file() -> Path:
    """Where Ray keeps the address of the last `ray start`, also of one that was killed."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")


def ray_auth_mode() -> str:
    """How a Ray cluster lets people in; "" where that is not said."""
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def hub_cache() -> Path:
    """Where Hugging Face's tools keep what they downloaded."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
