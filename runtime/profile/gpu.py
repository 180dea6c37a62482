"""Per-layer times of a TensorRT backend's networks: whole plans through IProfiler, cut ones step by step by events."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.trt.backend import ENCODER, TrtBackend
from longtake.runtime.backends.trt.networks import WholeNetwork
from longtake.runtime.clock import StageClock
from longtake.runtime.profile.profile import WARM_UP, LayerTimes, timing_feed
from longtake.training.models.network_spec import NetworkSpec


def backend_profile(backend: TrtBackend, name: str, runs: int) -> list[dict[str, Any]]:
    """Times of network `name` of an open backend, in trtexec's format."""
    tensors = network_tensors(backend, backend.specs[name])
    network = (backend.encoder_networks() if name in ENCODER else backend.networks)[name]
    torch.cuda.synchronize(backend.device)  # the inputs were written on another stream
    with torch.cuda.device(backend.device), torch.cuda.stream(torch.cuda.Stream(backend.device)):
        if isinstance(network, SegmentedNetwork):
            return steps_profile(network, tensors, runs)
        if isinstance(network, WholeNetwork):
            return engine_profile(network, tensors, runs)
    raise TypeError(f"network {name} is neither whole nor cut: {type(network).__name__}")


def pass_ms(backend: Any) -> dict[str, float]:
    """Milliseconds of a clean pass by kind of step ("segments" are linears and pointwise work), launched one by one; {} if
    uncut."""
    network = backend.networks["dit"]
    if not isinstance(network, SegmentedNetwork):
        return {}
    tensors = network_tensors(backend, backend.specs["dit"])
    network.window_version.fill_(-1)  # of no pass
    torch.cuda.synchronize(backend.device)  # the inputs were written on another stream
    with torch.no_grad(), torch.cuda.device(backend.device), torch.cuda.stream(torch.cuda.Stream(backend.device)):
        rows = steps_profile(network, tensors, runs=3)[1:]
    spent: dict[str, float] = {}
    for row in rows:
        _, kind, name = row["name"].split(maxsplit=2)
        label = "segments" if kind == "segment" else name
        spent[label] = spent.get(label, 0.0) + row["averageMs"]
    return {label: round(ms, 3) for label, ms in spent.items()} | {"sum": round(sum(spent.values()), 3)}


def network_tensors(backend: TrtBackend, spec: NetworkSpec) -> dict[str, Tensor]:
    """Every binding of a network on the device; an output written over an input is that input's tensor."""
    tensors = {b.name: backend.allocate(b) for b in (*spec.inputs, *spec.outputs)}
    for name, value in timing_feed(spec).items():
        tensors[name].copy_(torch.from_numpy(value))
    return tensors | {output: tensors[source] for output, source in spec.aliases}


def engine_profile(network: WholeNetwork, tensors: dict[str, Tensor], runs: int) -> list[dict[str, Any]]:
    """Per-layer times of a whole plan, as TensorRT reports them to an IProfiler."""
    times = LayerTimes()
    context = network.context.context
    context.profiler = profiler_for(network.engine.host.flavour.module, times)
    context.enqueue_emits_profile = True
    for _ in range(runs + WARM_UP):
        network.run(tensors)
        torch.cuda.current_stream().synchronize()
    return times.drop_first(WARM_UP).as_json()


def profiler_for(trt: Any, times: LayerTimes) -> Any:
    """A TensorRT IProfiler that adds what an execution context reports to `times`."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.add(layer_name, ms)

    return Profiler()


def steps_profile(network: SegmentedNetwork, tensors: dict[str, Tensor], runs: int) -> list[dict[str, Any]]:
    """Times of each segment and each kernel between them, by CUDA events."""
    clock, times = StageClock(torch.device("cuda", torch.cuda.current_device())), LayerTimes()
    for _ in range(runs + WARM_UP):
        values = network.values_for(tensors)
        for i, step in enumerate(network.graph.steps):
            with clock.stage(f"{i:03} {step.kind} {step.name}"):
                network.run_step(i, step, values)
        torch.cuda.current_stream().synchronize()
    times.by_layer |= clock.take()
    return times.drop_first(WARM_UP).as_json()
