"""One TensorRT engine, checked, loaded and run on torch tensors: what the fused and the segmented backend share.

Contexts borrow their scratch memory (`Scratch`): engines that run one after another share it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.dtypes import BY_TRT
from longtake.errors import LongtakeError, UnavailableError
from longtake.files import atomic_path, read_json, write_json
from longtake.formats.bundle import Bundle
from longtake.formats.plan import PlanManifest, read_plan
from longtake.machine.flavour import Flavour
from longtake.machine.nvml import nvml
from longtake.machine.trt_log import Messages

log = logging.getLogger(__name__)


class Scratch:
    """Device memory that holds nothing between two uses, so whatever shares it must run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.size = device, 256
        self._memory: Tensor | None = None

    def reserve(self, size: int) -> None:
        """Ask for at least `size` bytes; only before the first use, because addresses never move after it."""
        if self._memory is not None and size > self._memory.nbytes:
            raise LongtakeError("scratch memory is in use and cannot grow", got=size, expected=self._memory.nbytes)
        self.size = max(self.size, size)

    @property
    def memory(self) -> Tensor:
        """uint8 [size], allocated by the first use."""
        if self._memory is None:
            self._memory = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        return self._memory

    @property
    def address(self) -> int:
        return self.memory.data_ptr()


class RuntimeCaches:
    """TensorRT-RTX's compiled kernels, kept beside the plans: contexts then start in milliseconds, not seconds.

    They hold code, so a file is used only if its digest is the recorded one and it was made from this very plan, by
    this TensorRT, on this GPU and driver.
    """

    def __init__(self, folder: Path, flavour: Flavour, device: torch.device) -> None:
        self.folder = folder / "runtime_cache"
        self.identity = [flavour.name, flavour.version, torch.cuda.get_device_name(device), driver_version()]

    def read(self, plan: Path, plan_sha256: str) -> bytes | None:
        """The kernels kept for `plan`, or None if there are none that fit."""
        path = self.folder / f"{plan.stem}.cache"
        try:
            content, record = path.read_bytes(), read_json(path.with_suffix(".json"))
            wanted = {"plan": plan_sha256, "identity": self.identity, "sha256": hashlib.sha256(content).hexdigest()}
        except (OSError, LongtakeError):
            return None
        if record != wanted:
            log.info("%s does not fit this plan or machine; kernels are compiled again", path)
            return None
        return content

    def write(self, plan: Path, plan_sha256: str, content: bytes) -> None:
        """Keep the kernels of `plan` for the next start."""
        path = self.folder / f"{plan.stem}.cache"
        record = {"plan": plan_sha256, "identity": self.identity, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            with atomic_path(path) as partial:
                partial.write_bytes(content)
            write_json(path.with_suffix(".json"), record)
        except OSError as error:  # a read-only folder costs start-up time, nothing else
            log.warning("cannot keep compiled kernels in %s: %s", self.folder, error)


def driver_version() -> str:
    """Version of the NVIDIA driver, "" if it cannot be asked."""
    try:
        with nvml() as pynvml:
            return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML raises its own types, and may be missing
        return ""


def device_bytes_used(device: torch.device) -> int:
    """Device memory of this process as the driver counts it: torch does not see TensorRT's own."""
    try:
        with nvml() as pynvml:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        if mine and mine[0].usedGpuMemory:
            return int(mine[0].usedGpuMemory)
    except Exception:  # in a container process ids may not match; the whole device is then an upper bound
        log.debug("NVML does not tell this process's memory", exc_info=True)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


ReadPlan = tuple[bytes, PlanManifest]


def compute_capability_of(device: torch.device) -> str:
    """Such as "9.0"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def plan_of(
    folder: Path,
    name: str,
    flavour: Flavour,
    compute_capability: str,
    spec: dict[str, Any] | None = None,
    bundle: Bundle | None = None,
) -> ReadPlan:
    """The bytes of `<name>.plan`, which may be deserialised: see `read_plan` and `Bundle.check_plan`."""
    plan = folder / f"{name}.plan"
    content, manifest = read_plan(plan, flavour, compute_capability, network=name, spec=spec)
    if bundle is not None:
        bundle.check_plan(plan, manifest.sha256)
    return content, manifest


class EngineHost:
    """Loads plans of one folder for one GPU. plans: by name, what `plan_of` has read already; each is used up once."""

    def __init__(
        self, folder: Path, flavour: Flavour, device: torch.device, plans: dict[str, ReadPlan] | None = None
    ) -> None:
        self.folder, self.flavour, self.device, self.plans = folder, flavour, device, {} if plans is None else plans
        self.compute_capability = compute_capability_of(device)
        trt = flavour.module
        self.messages = Messages(trt)
        self.runtime = trt.Runtime(self.messages.logger)
        self.caches = RuntimeCaches(folder, flavour, device)

    def load(self, name: str, spec: dict[str, Any] | None = None, bundle: Bundle | None = None) -> TrtEngine:
        """Verify and deserialise `<name>.plan`. Raises what `read_plan` does, and `Bundle.check_plan` where one is given."""
        plan = self.folder / f"{name}.plan"
        read = self.plans.pop(name, None)
        content, manifest = read or plan_of(self.folder, name, self.flavour, self.compute_capability, spec, bundle)
        with torch.cuda.device(self.device):
            engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UnavailableError(
                f"{self.flavour.label} cannot load {plan}",
                got=self.messages.last_errors(),
                expected="a plan that this TensorRT and GPU can run",
                fix=f"build it again on this machine: longtake engines --recipe {manifest.recipe}",
            )
        return TrtEngine(self, plan, manifest.sha256, engine)


class TrtEngine:
    """A deserialised plan."""

    def __init__(self, host: EngineHost, plan: Path, sha256: str, engine: Any) -> None:
        self.host, self.plan, self.sha256, self.engine = host, plan, sha256, engine
        trt = host.flavour.module
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.dtypes = {n: BY_TRT[engine.get_tensor_dtype(n).name].torch for n in names}
        self.dynamic = {n for n in self.inputs if -1 in tuple(engine.get_tensor_shape(n))}
        self._cache: Any = None

    @property
    def scratch_bytes(self) -> int:
        return int(self.engine.device_memory_size_v2)

    def context(self, scratch: Scratch) -> TrtContext:
        """A new execution context on `scratch`, which must have reserved `scratch_bytes`."""
        trt = self.host.flavour.module
        with torch.cuda.device(self.host.device):
            if self.host.flavour.name == "tensorrt_rtx":
                context = self.engine.create_execution_context(self._runtime_config(trt))
            else:
                context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise UnavailableError(
                f"{self.host.flavour.label} cannot create a context for {self.plan}",
                got=self.host.messages.last_errors(),
            )
        return TrtContext(self, context, scratch)

    def _runtime_config(self, trt: Any) -> Any:
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.dynamic:  # the lazy default may capture fallback kernels into a CUDA graph
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            kept = self.host.caches.read(self.plan, self.sha256)
            if kept is not None:
                self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)
        return config

    def keep_compiled_kernels(self) -> None:
        """Save the runtime cache for the next start, if it has changed."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if content != self.host.caches.read(self.plan, self.sha256):
            self.host.caches.write(self.plan, self.sha256, content)


class TrtContext:
    """An execution context. Calls on it, and on others of the same scratch, must run one after another."""

    def __init__(self, engine: TrtEngine, context: Any, scratch: Scratch) -> None:
        self.engine, self.context, self.scratch = engine, context, scratch
        self._memory: tuple[int, int] | None = None

    def run(self, tensors: Mapping[str, Tensor], memory: tuple[int, int] | None = None) -> None:
        """Enqueue on torch's current stream. `tensors` holds every binding, contiguous, in the plan's dtype.

        memory: address and bytes of what it may use as scratch in this run; by default all of its Scratch.
        """
        for name in (*self.engine.inputs, *self.engine.outputs):
            tensor = tensors[name]
            if tensor.dtype != self.engine.dtypes[name] or not tensor.is_contiguous():
                raise LongtakeError(
                    f"{self.engine.plan.stem}: tensor {name} does not fit its binding",
                    got=f"{tensor.dtype}, {'' if tensor.is_contiguous() else 'not '}contiguous",
                    expected=f"{self.engine.dtypes[name]}, contiguous",
                )
            if name in self.engine.dynamic:
                self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        memory = memory or (self.scratch.address, self.scratch.size)  # by the first run all have said what they need
        if memory != self._memory:
            self.context.set_device_memory(*memory)
            self._memory = memory
        stream = torch.cuda.current_stream(self.engine.host.device).cuda_stream
        if not self.context.execute_async_v3(stream):
            raise LongtakeError(f"{self.engine.plan.stem} failed to run", got=self.engine.host.messages.last_errors())
