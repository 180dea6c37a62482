"""Kernels compiled by NVRTC to cubins, on machines with or without a GPU, and cached on disk.

The kernels include nothing but this package's own .cuh files, so neither a CUDA toolkit nor header wheels are needed.
Cubins, not PTX: a cubin also loads with a driver older than the compiler.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError, UnavailableError
from longtake.files import atomic_path
from longtake.machine.capability import NVRTC_FIX
from longtake.settings import settings_from_environment

log = logging.getLogger(__name__)

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
INCLUDE = Path(__file__).resolve().parent / "nvfp4"

_DIGEST_BYTES = 32
_lock = threading.Lock()


def arch_for(major: int, minor: int) -> str:
    """The NVRTC target of a compute capability; from 9.0 on the architecture-specific one ("sm_90a")."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def source_digest(source: Path) -> str:
    """Hex SHA-256 of a kernel file and every shared header, names included."""
    digest = hashlib.sha256()
    for path in (source, *sorted(INCLUDE.glob("*.cuh"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_cubin(source: Path, macros: Mapping[str, str | int | float], arch: str) -> bytes:
    """The cubin of `source` for `arch`, from the cache if it is there and whole.

    Raises:
        LongtakeError: the source does not compile; the message holds the compiler's log.
        UnavailableError: there is no NVRTC.
    """
    defines = tuple(sorted((name, str(value)) for name, value in macros.items()))
    key = repr((source_digest(source), defines, arch, _nvrtc_version()))
    folder = settings_from_environment().cache_dir / "kernels"
    entry = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    with _lock:
        cubin = _cached(entry)
        if cubin is None:
            log.info("compiling %s for %s %s", source, arch, dict(defines))
            cubin = _compile(source, defines, arch)
            _store(entry, cubin)
    return cubin


def _cached(entry: Path) -> bytes | None:
    """The cubin stored under `entry`, or None if there is none or its digest does not fit."""
    try:
        stored = entry.read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(cubin).digest() == digest:
        return cubin
    log.warning("%s is damaged and will be compiled again", entry)
    return None


def _store(entry: Path, cubin: bytes) -> None:
    """Keep the cubin, preceded by its digest. A cache that cannot be written costs time, nothing else."""
    try:
        with atomic_path(entry) as partial:
            partial.write_bytes(hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        log.warning("cannot keep compiled kernels in %s: %s", entry.parent, error)


@lru_cache(maxsize=1)
def _nvrtc_version() -> tuple[int, int]:
    """The version of NVRTC, which the bindings find in the nvidia-cuda-nvrtc wheel or a toolkit."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loaders raise ImportError, RuntimeError or their own types
        raise UnavailableError(
            "NVRTC, which compiles the CUDA kernels, cannot be loaded",
            got=f"{type(error).__name__}: {error}",
            fix=NVRTC_FIX,
        ) from None
    return int(major), int(minor)


def _compile(source: Path, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    core = _cuda_core()
    options = core.ProgramOptions(
        name=source.name, arch=arch, std="c++17", include_path=[str(INCLUDE)], define_macro=list(defines)
    )
    try:
        program = core.Program(source.read_text(encoding="utf-8"), "c++", options)
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda-core's own error types moved between versions
        raise LongtakeError(
            f"{source.name} does not compile for {arch}",
            got=str(error).strip(),
            expected=f"a kernel that NVRTC {'.'.join(map(str, _nvrtc_version()))} accepts, with {dict(defines)}",
            fix="see the compiler's log above",
        ) from None


def _cuda_core() -> Any:
    """cuda.core, which older releases kept under `experimental`."""
    import cuda.core as core

    if hasattr(core, "Program"):
        return core
    import cuda.core.experimental as experimental

    return experimental
