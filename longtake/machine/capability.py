"""The one table that answers "does this run here?": flavour x version x compute capability x precision.

It drives the code path (`backend_for`), the tests' skip reasons and the error texts. Nothing here touches a device.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, Protocol

from longtake.errors import LongtakeError, UnavailableError

Status = Literal["runs", "built, not run", "not run", "no"]
# "runs": seen running. "built, not run": plans are built and checked, no such GPU was at hand.
# "not run": a thin adapter, neither built nor run. "no": cannot work, the reason says why.

BACKENDS = ("fused", "segmented", "reference")
RTX_TARGETS = ("8.0", "8.6", "8.9", "12.0", "12.1")
DATA_CENTRE_TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
FP8_TARGETS = ("8.9", "9.0", "10.0", "10.3", "12.0", "12.1")  # what has FP8 arithmetic
ANY: tuple[str, ...] = ()
HOPPER_FIX = "pip install tensorrt-rtx-cu13==1.6.1.120, and use a segmented recipe such as tiny_w4a16_sm90"
NO_GPU_FIX = "run on a machine with an NVIDIA GPU and its driver, or use --backend reference"
NVRTC_FIX = "pip install nvidia-cuda-nvrtc cuda-bindings cuda-core"
FLAVOUR_FIX = "pip install tensorrt-rtx-cu13==1.7.1.116 (on compute capability 9.0: 1.6.1.120)"


@dataclass(frozen=True)
class Row:
    """One line of the table. Empty `capabilities` or `precisions` match everything; the first matching row counts.

    since/below: version range [since, below) of the flavour; "" leaves that side open.
    """

    backend: str
    flavour: str
    since: str
    below: str
    capabilities: tuple[str, ...]
    precisions: tuple[str, ...]
    status: Status
    reason: str
    fix: str = ""


_AOT = "plans with plugins are built ahead of time on the CPU; no such GPU was at hand to run them"
_AOT_SEGMENTS = "segment plans are built ahead of time on the CPU; no such GPU was at hand to run them"
_ADAPTER = "kept as a thin adapter: its libraries are not on PyPI, so it was neither built nor run"
_REFUSES = "TensorRT-RTX 1.7 and later refuse compute capability 9.0"

TABLE: tuple[Row, ...] = (
    Row("fused", "tensorrt_rtx", "", "1.7", ANY, ANY, "no", "TensorRT-RTX before 1.7 cannot load plugins",
        "use a segmented recipe, or install TensorRT-RTX 1.7 (not on compute capability 9.0)"),
    Row("fused", "tensorrt_rtx", "1.7", "", ("9.0",), ANY, "no", _REFUSES, HOPPER_FIX),
    Row("fused", "tensorrt_rtx", "1.7", "", ("12.0", "12.1"), ("nvfp4",), "built, not run", _AOT),
    Row("fused", "tensorrt_rtx", "1.7", "", RTX_TARGETS, ("w4a16", "bf16"), "built, not run", _AOT),
    Row("fused", "tensorrt_rtx", "1.7", "", FP8_TARGETS, ("fp8",), "built, not run", _AOT),
    Row("fused", "tensorrt", "11.0", "", ("10.0", "10.3", "12.0", "12.1"), ("nvfp4",), "not run", _ADAPTER),
    Row("fused", "tensorrt", "10.13", "", DATA_CENTRE_TARGETS, ("w4a16", "bf16"), "not run", _ADAPTER),
    Row("fused", "tensorrt", "10.13", "", FP8_TARGETS, ("fp8",), "not run", _ADAPTER),
    Row("segmented", "tensorrt_rtx", "1.7", "", ("9.0",), ANY, "no", _REFUSES, HOPPER_FIX),
    Row("segmented", "tensorrt_rtx", "1.6", "1.7", ("9.0",), ("w4a16", "fp8", "bf16"), "runs",
        "engine segments with the plugin kernels launched between them, run on an H100"),
    Row("segmented", "tensorrt_rtx", "1.6", "", RTX_TARGETS, ("w4a16", "bf16"), "built, not run", _AOT_SEGMENTS),
    Row("segmented", "tensorrt_rtx", "1.6", "", FP8_TARGETS, ("fp8",), "built, not run", _AOT_SEGMENTS),
    Row("segmented", "tensorrt_rtx", "1.6", "", ("12.0", "12.1"), ("nvfp4",), "built, not run", _AOT_SEGMENTS),
    Row("segmented", "tensorrt", "11.0", "", ("10.0", "10.3", "12.0", "12.1"), ("nvfp4",), "not run", _ADAPTER),
    Row("segmented", "tensorrt", "10.13", "", DATA_CENTRE_TARGETS, ("w4a16", "bf16"), "not run", _ADAPTER),
    Row("segmented", "tensorrt", "10.13", "", FP8_TARGETS, ("fp8",), "not run", _ADAPTER),
    Row("reference", "onnxruntime", "", "", ANY, ANY, "runs", "ONNX Runtime runs a view of the ONNX files on the CPU"),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What matters about a machine. compute_capability such as "9.0", None without a GPU; flavour None if absent."""

    compute_capability: str | None = None
    flavour: str | None = None
    flavour_version: str = ""
    onnxruntime: bool = True
    nvrtc: bool = True


def has_module(name: str) -> bool:
    """Whether `name` can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Verdict:
    """The table's answer for one backend; `usable` is anything but "no"."""

    status: Status
    reason: str
    fix: str = ""

    @property
    def usable(self) -> bool:
        return self.status != "no"


@dataclass(frozen=True)
class Choice:
    """The backend to use, and one sentence why."""

    backend: str
    reason: str


class Target(Protocol):
    """The part of engines.recipe.Recipe that the table reads."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compute_capability(self) -> str: ...
    @property
    def mode(self) -> str: ...


def version_key(text: str) -> tuple[int, ...]:
    """ "1.7.1.116" -> (1, 7, 1, 116); anything after the digits is dropped."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _matches(row: Row, backend: str, flavour: str, version: str, capability: str, precision: str) -> bool:
    return (
        (row.backend, row.flavour) == (backend, flavour)
        and (not row.since or version_key(version) >= version_key(row.since))
        and (not row.below or version_key(version) < version_key(row.below))
        and (not row.capabilities or capability in row.capabilities)
        and (not row.precisions or precision in row.precisions)
    )


def lookup(backend: str, flavour: str, version: str, capability: str, precision: str) -> Verdict:
    """The first matching row of TABLE, or "no" with the reason that fits best."""
    for row in TABLE:
        if _matches(row, backend, flavour, version, capability, precision):
            return Verdict(row.status, row.reason, row.fix)
    here = f"compute capability {capability}"
    lacks = {
        "nvfp4": f"{flavour} {version} has no FP4 arithmetic on {here}",
        "fp8": f"{here} has no FP8 arithmetic",
    }
    if precision in lacks and _fits_without_precision(backend, flavour, version, capability):
        return Verdict("no", lacks[precision], "use a w4a16 recipe (4-bit weights, bf16 arithmetic)")
    reason = f"{flavour} {version} does not run {backend} plans on {here}"
    return Verdict("no", reason, "longtake doctor shows what fits this machine")


def _fits_without_precision(backend: str, flavour: str, version: str, capability: str) -> bool:
    verdicts = (lookup(backend, flavour, version, capability, other) for other in ("w4a16", "bf16"))
    return any(verdict.usable for verdict in verdicts)


def verdict_for(machine: Machine, recipe: Target, backend: str) -> Verdict:
    """Whether `backend` runs `recipe` on `machine`, with the reason and, for "no", the fix."""
    if backend == "reference":
        return _reference_verdict(machine)
    if backend != recipe.mode:
        reason = f"recipe {recipe.name} is built {recipe.mode}, not {backend}"
        return Verdict("no", reason, f"use --backend {recipe.mode}, or a {backend} recipe")
    if machine.compute_capability is None:
        return Verdict("no", "there is no NVIDIA GPU here", NO_GPU_FIX)
    if machine.flavour is None:
        return Verdict("no", "no TensorRT flavour is installed", FLAVOUR_FIX)
    here = lookup(backend, machine.flavour, machine.flavour_version, machine.compute_capability, recipe.precision)
    if here.usable and machine.compute_capability != recipe.compute_capability:
        wanted, has = recipe.compute_capability, machine.compute_capability
        reason = f"recipe {recipe.name} is for compute capability {wanted}, this GPU has {has}"
        return Verdict("no", reason, "build a recipe for this GPU (longtake doctor lists them)")
    if here.usable and not machine.nvrtc:
        return Verdict("no", "NVRTC, which compiles the plugin kernels, cannot be loaded", NVRTC_FIX)
    return here


def _reference_verdict(machine: Machine) -> Verdict:
    if not machine.onnxruntime:
        return Verdict("no", "ONNX Runtime is not installed", "pip install onnxruntime")
    row = next(row for row in TABLE if row.backend == "reference")
    return Verdict(row.status, row.reason)


def backend_for(machine: Machine, recipe: Target, asked: str | None = None) -> Choice:
    """Choose the backend: the recipe's own mode where it works, else the reference; `asked` is never replaced.

    Raises:
        UnavailableError: `asked` (or, without it, even the reference) cannot run here; says why and what helps.
        LongtakeError: `asked` is no backend.
    """
    if asked is not None and asked not in BACKENDS:
        raise LongtakeError("unknown backend", got=asked, expected=" | ".join(BACKENDS), fix="pass one of these")
    if asked is not None:
        return Choice(asked, f"asked for; {_require(machine, recipe, asked).reason}")
    native = verdict_for(machine, recipe, recipe.mode)
    if native.usable:
        return Choice(recipe.mode, _describe(machine, native))
    _require(machine, recipe, "reference")
    return Choice("reference", f"ONNX Runtime on the CPU, because {recipe.mode} cannot run here: {native.reason}")


def _describe(machine: Machine, verdict: Verdict) -> str:
    where = f"{machine.flavour} {machine.flavour_version} on compute capability {machine.compute_capability}"
    return f"{where} ({verdict.status}): {verdict.reason}"


def _require(machine: Machine, recipe: Target, backend: str) -> Verdict:
    verdict = verdict_for(machine, recipe, backend)
    if verdict.usable:
        return verdict
    what = f"backend {backend} cannot run recipe {recipe.name} here"
    expected = f"a machine that fits {recipe.name} ({recipe.precision}, compute capability {recipe.compute_capability})"
    raise UnavailableError(what, got=verdict.reason, expected=expected, fix=verdict.fix or None)


@dataclass(frozen=True)
class AttentionRow:
    """A way to compute sink attention: through `method`, with the two products in `kind`. Faster ones come first."""

    method: str
    kind: str
    capabilities: tuple[str, ...]
    head_dims: tuple[int, ...]
    status: Status
    reason: str


_CUDNN_HEADS = (64, 128)
_UNTRIED = tuple(target for target in DATA_CENTRE_TARGETS if target != "9.0")
_LIBRARY = "our kernel lays the window out, a library attends"

ATTENTION_TABLE: tuple[AttentionRow, ...] = (
    AttentionRow("wgmma", "fp8", ("9.0",), (64, 128), "runs", "our own kernels in E4M3, sums in fp32, any window"),
    AttentionRow("cudnn", "bf16", ("9.0",), _CUDNN_HEADS, "runs", f"{_LIBRARY}: cuDNN"),
    AttentionRow("torch", "bf16", ("9.0",), _CUDNN_HEADS, "runs", f"{_LIBRARY}: torch's SDPA"),
    AttentionRow("cudnn", "bf16", _UNTRIED, _CUDNN_HEADS, "not run", f"{_LIBRARY}: cuDNN"),
    AttentionRow("torch", "bf16", _UNTRIED, _CUDNN_HEADS, "not run", f"{_LIBRARY}: torch's SDPA"),
    AttentionRow("portable", "bf16", ANY, (), "runs", "our own kernel, for any GPU and size"),
)


@dataclass(frozen=True)
class LinearRow:
    """A library that runs the linear ops of `kind` ("bf16" or "fp8"), or the convolutions ("conv", of 8-bit codes "conv8"), between
    segments."""

    method: str
    kind: str
    capabilities: tuple[str, ...]
    status: Status
    reason: str


_CUBLASLT = "torch calls cuBLASLt between the segments"

LINEAR_TABLE: tuple[LinearRow, ...] = (
    LinearRow("cublaslt", "fp8", FP8_TARGETS, "not run", f"{_CUBLASLT}, in E4M3"),
    LinearRow("cublaslt", "bf16", DATA_CENTRE_TARGETS, "not run", _CUBLASLT),
    LinearRow("cudnn", "conv", DATA_CENTRE_TARGETS, "not run", "cuDNN's graphs, the fastest plan of several tried"),
    LinearRow("torch", "conv", DATA_CENTRE_TARGETS, "not run", "torch calls cuDNN, which benchmarks its algorithms"),
    LinearRow("wgmma", "conv8", ("9.0",), "not run", "our kernel; a shift is another first row of the same memory"),
    LinearRow("wgmma_rows", "conv8", ("9.0",), "not run", "our kernel; only shifts of whole rows are, the fallback"),
    LinearRow("torch", "conv8", DATA_CENTRE_TARGETS, "not run", "codes widened to fp32, torch calls cuDNN: slow"),
)


def conv_methods(capability: str) -> list[str]:
    """The libraries to try for the VAE's convolutions on this GPU, in this order."""
    return [row.method for row in LINEAR_TABLE if row.kind == "conv" and capability in row.capabilities]


def conv8_methods(capability: str) -> list[str]:
    """What to try for the VAE's convolutions of 8-bit codes on this GPU, in this order."""
    return [row.method for row in LINEAR_TABLE if row.kind == "conv8" and capability in row.capabilities]


def linear_method(capability: str, kind: str) -> str | None:
    """The library that runs linears of `kind` on this GPU, or None."""
    return next((r.method for r in LINEAR_TABLE if r.kind == kind and capability in r.capabilities), None)


def attention_methods(capability: str, attention: str, head_dim: int) -> list[tuple[str, str]]:
    """(method, kind) to try in this order for a recipe's `attention` ("bf16" or "fp8"); the last one always works."""
    kinds = ("fp8", "bf16") if attention == "fp8" else ("bf16",)
    return [
        (row.method, row.kind)
        for row in ATTENTION_TABLE
        if row.kind in kinds
        and (not row.capabilities or capability in row.capabilities)
        and (not row.head_dims or head_dim in row.head_dims)
    ]
