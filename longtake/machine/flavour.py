"""The TensorRT flavour that fits this machine: `tensorrt`, or TensorRT-RTX 1.7, or 1.6.1 on Hopper. Says which, why.

`choose` is the whole decision, pure; the rest looks at the machine and imports what was chosen.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from longtake.errors import UnavailableError
from longtake.machine.capability import version_key
from longtake.settings import settings_from_environment

log = logging.getLogger(__name__)

HOPPER = "9.0"
HOPPER_VERSION = "1.6.1.120"
DEFAULT_VERSION = "1.7.1.116"
DISTRIBUTIONS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
CUDA_MAJORS = ("13", "12", "14")
RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")


@dataclass(frozen=True)
class Installed:
    """A flavour found on this machine. `complete` is False for bindings whose libraries are missing."""

    name: str
    version: str
    complete: bool = True


@dataclass(frozen=True)
class Choice:
    """The flavour to use, and one sentence why."""

    name: str
    version: str
    reason: str


@dataclass(frozen=True)
class Flavour:
    """A loaded flavour: `module` is `tensorrt` or `tensorrt_rtx` (the API is the same). cuda: major version it is for."""

    name: str
    version: str
    module: Any
    reason: str
    cuda: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"


def choose(compute_capability: str | None, installed: Sequence[Installed]) -> Choice:
    """Pick the flavour for a GPU of `compute_capability` (None: no GPU, only building ahead of time).

    Raises:
        UnavailableError: nothing installed fits; the message holds the pip command that helps.
    """
    found = {flavour.name: flavour for flavour in installed}
    full, rtx = found.get("tensorrt"), found.get("tensorrt_rtx")
    if full and full.complete and compute_capability is not None:
        return Choice("tensorrt", full.version, "the data-centre flavour is installed and runs on every GPU")
    if rtx and rtx.complete:
        return _choose_rtx(compute_capability, rtx)
    if full and full.complete:
        raise UnavailableError(
            "TensorRT cannot build engines without a GPU",
            got=f"tensorrt {full.version}, no GPU",
            expected="TensorRT-RTX, which builds ahead of time",
            fix=f"pip install tensorrt-rtx-cu13=={DEFAULT_VERSION}",
        )
    wanted = HOPPER_VERSION if compute_capability == HOPPER else DEFAULT_VERSION
    raise UnavailableError(
        "no usable TensorRT flavour is installed",
        got="; ".join(f"{f.name} {f.version} without its libraries" for f in installed) or "none",
        expected="tensorrt, or tensorrt_rtx",
        fix=f"pip install tensorrt-rtx-cu13=={wanted}",
    )


def _choose_rtx(compute_capability: str | None, rtx: Installed) -> Choice:
    if compute_capability != HOPPER:
        where = f"compute capability {compute_capability}" if compute_capability else "no GPU here"
        return Choice(rtx.name, rtx.version, f"{where}: TensorRT-RTX builds for it, ahead of time too")
    if version_key(rtx.version) < version_key("1.7"):
        return Choice(rtx.name, rtx.version, "compute capability 9.0: TensorRT-RTX before 1.7 still runs on it")
    raise UnavailableError(
        "TensorRT-RTX 1.7 and later refuse compute capability 9.0",
        got=f"tensorrt_rtx {rtx.version} on compute capability 9.0",
        expected=f"tensorrt_rtx {HOPPER_VERSION}, or the tensorrt flavour",
        fix=f"pip install tensorrt-rtx-cu13=={HOPPER_VERSION}",
    )


def gpu_compute_capability() -> str | None:
    """Compute capability of GPU 0 such as "9.0", or None without a usable GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def installed_flavours() -> list[Installed]:
    """The flavours importable here, without importing them (an import fixes which libraries are loaded)."""
    found = []
    if importlib.util.find_spec("tensorrt") is not None:
        found.append(Installed("tensorrt", _version("tensorrt"), _has_library("tensorrt_libs", "libnvinfer.so*")))
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        complete = _has_library("tensorrt_rtx_libs", RTX_LIBRARIES[0])
        found.append(Installed("tensorrt_rtx", _version("tensorrt_rtx"), complete))
    return found


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _has_library(package: str, pattern: str) -> bool:
    """Whether the wheel that should carry the library does; a system-wide library counts too."""
    folder = _package_folder(package)
    if folder and any(folder.glob(pattern)):
        return True
    try:
        ctypes.CDLL(pattern.replace("*", ""))
    except OSError:
        return False
    return True


def _version(package: str) -> str:
    """`__version__` as the bindings' source states it: two versions may lie on the path, the first one counts."""
    folder = _package_folder(f"{package}_bindings") or _package_folder(package)
    text = (folder / "__init__.py").read_text(encoding="utf-8") if folder else ""
    for line in text.splitlines():
        if line.startswith("__version__"):
            return line.split("=", 1)[1].strip().strip("\"'")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@cache
def _preload_rtx_parser() -> None:
    """Make TensorRT-RTX 1.7's ONNX parser find its library under the name it asks for, `libtensorrt_rtx.so`.

    The wheel has only `.so.1`; without the other name the process aborts when a plugin node is parsed. The links lie
    in the cache, one folder for each place of the libraries: a process that is killed leaves nothing; site-packages stays
    untouched.
    """
    libraries = _package_folder("tensorrt_rtx_libs")
    if libraries is None or (libraries / "libtensorrt_rtx.so").exists():
        return
    links = {
        name: libraries / (name if name.endswith(".1") else f"{name}.1")
        for name in (*RTX_LIBRARIES, "libtensorrt_rtx.so")
    }
    place = settings_from_environment().cache_dir / "trt" / hashlib.sha256(str(libraries).encode()).hexdigest()[:16]
    folder = _linked(place, links) or _linked(Path(tempfile.mkdtemp(prefix="longtake-trt-")), links, for_now=True)
    assert folder is not None
    for name in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so.1"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def _linked(folder: Path, links: Mapping[str, Path], for_now: bool = False) -> Path | None:
    """`folder`, with these links in it; None if they cannot be. for_now: until this process ends."""
    if for_now:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in links.items():
            with suppress(FileExistsError):  # of an earlier process, or of one that does the same now
                (folder / name).symlink_to(target)
        return folder if all((folder / name).readlink() == target for name, target in links.items()) else None
    except OSError:
        return None


def load(choice: Choice) -> Flavour:
    """Import the chosen flavour."""
    if choice.name == "tensorrt_rtx" and version_key(choice.version) >= version_key("1.7"):
        _preload_rtx_parser()
    try:
        module = importlib.import_module(choice.name)
    except (ImportError, OSError) as error:
        raise UnavailableError(
            f"{choice.name} {choice.version} does not load",
            got=str(error),
            fix=f"pip install --force-reinstall {DISTRIBUTIONS[choice.name]}=={choice.version}",
        ) from None
    return Flavour(choice.name, choice.version, module, choice.reason, _cuda_of(choice.name))


def _cuda_of(name: str) -> str:
    """The major version of CUDA that an installed flavour's wheel is for, such as "13"; "" if nothing tells."""
    for major in CUDA_MAJORS:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{name.replace('_', '-')}-cu{major}")
            return major
    return ""


@cache
def flavour_for(compute_capability: str | None) -> Flavour:
    """Choose and load the flavour for a GPU of `compute_capability` (None: build only); LONGTAKE_FLAVOUR narrows it."""
    wanted = settings_from_environment().flavour
    installed = [flavour for flavour in installed_flavours() if wanted in ("auto", flavour.name)]
    chosen = load(choose(compute_capability, installed))
    log.info("TensorRT flavour: %s (%s)", chosen.label, chosen.reason)
    return chosen


def flavour_here() -> Flavour:
    """The flavour for this machine's GPU, or for building ahead of time where there is none."""
    return flavour_for(gpu_compute_capability())
