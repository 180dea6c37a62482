"""What `longtake doctor` looks at, one probe each. Nothing here raises for what is missing: that is the finding."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import LongtakeError, UnavailableError
from longtake.machine.nvml import nvml
from longtake.settings import settings_from_environment

LOW_DISK_GB = 5.0
SERVE_NEEDS = ("fastapi", "uvicorn", "websockets", "multipart", "prometheus_client")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `found` says what is there; `fix` (a command or an action) is set when it is missing."""

    name: str
    found: str
    ok: bool = True
    fix: str = ""
    needed_for: str = ""


def attempt(name: str, needed_for: str, fix: str, probe: Callable[[], str]) -> Finding:
    """Run `probe`, which returns what it found or raises; any failure becomes a finding with the fix."""
    try:
        return Finding(name, probe(), needed_for=needed_for)
    except Exception as error:  # whatever a broken installation raises is the finding
        found = f"not usable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Finding(name, found, ok=False, fix=fix, needed_for=needed_for)


def package(name: str, needed_for: str, fix: str) -> Finding:
    """Whether a distribution is installed, by its metadata: importing some of them takes seconds."""
    try:
        return Finding(name, importlib.metadata.version(name), needed_for=needed_for)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", ok=False, fix=fix, needed_for=needed_for)


def gpu_findings() -> list[Finding]:
    """One finding a GPU, by NVML; a machine without one gets a finding that says so."""
    try:
        gpus = [Finding("GPU", text) for text in _nvml_gpus()]
    except Exception as error:  # no driver, no library, no permission: all of them mean "no GPU to use"
        return [Finding("GPU", f"none ({error})", needed_for="engines (the reference backend needs none)")]
    return gpus or [Finding("GPU", "none", needed_for="engines (the reference backend needs none)")]


def _nvml_gpus() -> Iterator[str]:
    with nvml() as pynvml:
        driver = pynvml.nvmlSystemGetDriverVersion()
        for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())):
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9, pynvml.nvmlDeviceGetName(handle)
            yield f"{name}, compute capability {major}.{minor}, {memory:.1f} GB, driver {driver}"


def torch_finding() -> Finding:
    """PyTorch and whether it sees CUDA."""

    def probe() -> str:
        import torch

        return f"{torch.__version__}, " + ("sees a GPU" if torch.cuda.is_available() else "CPU only")

    return attempt("PyTorch", "everything", "pip install torch", probe)


def flavour_finding() -> Finding:
    """The TensorRT flavour chosen here, and why."""
    from longtake.machine.flavour import choose, gpu_compute_capability, installed_flavours

    try:
        chosen = choose(gpu_compute_capability(), installed_flavours())
    except UnavailableError as error:
        found = f"{error.what} ({error.got})"
        return Finding("TensorRT", found, ok=False, fix=error.fix or "", needed_for="building and running engines")
    return Finding("TensorRT", f"{chosen.name} {chosen.version}: {chosen.reason}")


def onnxruntime_works() -> str:
    """Run a one-node model; return the version."""
    import onnxruntime
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [value], [out])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": [-2.0]})[0]
    if float(result[0]) != 2.0:
        raise LongtakeError("ONNX Runtime computed -(-2) wrongly", got=float(result[0]), expected=2.0)
    return f"{onnxruntime.__version__}, runs a model on the CPU"


def nvrtc_compiles() -> str:
    """Compile an empty kernel for sm_80; return the NVRTC version."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    Program('extern "C" __global__ void probe() {}', "c++", ProgramOptions(arch="sm_80")).compile("cubin")
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}, compiles"


def pyav_works() -> str:
    """Look for the H.264 or MPEG-4 encoder that mp4 files are written with."""
    import av

    encoder = next((name for name in ("libx264", "h264", "mpeg4") if name in av.codecs_available), None)
    if encoder is None:
        raise LongtakeError("PyAV has no video encoder", expected="libx264 or mpeg4")
    return f"{av.__version__}, writes mp4 by {encoder}"


def trtexec_path() -> Path | None:
    """trtexec from LONGTAKE_TRTEXEC or PATH, in either flavour's spelling; None if there is none."""
    given = settings_from_environment().trtexec
    if given is not None:
        return given if given.is_file() else None
    found = shutil.which("trtexec") or shutil.which("tensorrt_rtx")
    return Path(found) if found else None


def trtexec_finding() -> Finding:
    """trtexec is optional: without it, TensorRT's profiler is used from Python."""
    path = trtexec_path()
    return Finding("trtexec", str(path) if path else "not installed (optional: profiling uses TensorRT from Python)")


def serve_finding() -> Finding:
    """Whether the packages of the extra "serve" are installed."""
    if lacking := [name for name in SERVE_NEEDS if importlib.util.find_spec(name) is None]:
        return Finding("serve", f"no {', '.join(lacking)}", False, "pip install 'longtake[serve]'", "longtake serve")
    return Finding("serve", f"{', '.join(SERVE_NEEDS)} are installed", needed_for="longtake serve")


def disk_finding(folder: Path) -> Finding:
    """Free space where builds go, and whether they may; `folder` need not be there yet."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        fix = "set LONGTAKE_HOME to a folder that you can write to"
        return Finding("disk", f"{folder} cannot be written to: {error.strerror}", False, fix, "builds")
    ok = free >= LOW_DISK_GB
    fix = "" if ok else f"free some space, such as models in {folder}"
    return Finding("disk", f"{free:.1f} GB free in {folder}", ok, fix, "builds")
