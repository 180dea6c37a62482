"""The VAE decoder's steps in little memory: the same results in an arena whose free bytes are poisoned after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from segment_steps import run_steps
from torch import Tensor

from longtake.formats.segmented_graph import SegmentedGraph, Step
from longtake.plugins.codes import encode
from longtake.plugins.registry import op_named
from longtake.runtime.backends.segments import planner as less_memory
from longtake.runtime.backends.segments import vae_first as first_step
from longtake.runtime.backends.segments.arena import storage_bytes
from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.backends.segments.planner import PlannedSteps, planned_steps
from longtake.runtime.backends.segments.vae_first import FirstStep, first_steps
from longtake.runtime.backends.trt.engine import Scratch
from longtake.runtime.budget.recorded_steps import library_decoder_steps
from longtake.training.models.conv_calibration import ConvCalibration, ConvInput
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, Preset
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, shuffle
from longtake.training.models.wan.vae_codes import codable_names, coded_convs
from longtake.training.models.wan.vae_layers import channels_first, channels_last
from longtake.training.models.wan.vae_library import LibrarySteady

CPU, POISON = torch.device("cpu"), 0xFF  # NaN, in bf16 and in fp32


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    made = CausalVAE(TINY.vae).eval().to(torch.bfloat16)
    made.latent_mean.normal_()
    return made


@pytest.fixture(scope="module")
def graph() -> SegmentedGraph:
    return library_decoder_steps(TINY)


def segment_functions(vae: CausalVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the three engines compute of their first input."""

    def before(latent: Tensor) -> Tensor:
        mean, std = (buffer.float().view(-1, 1, 1, 1) for buffer in (vae.latent_mean, vae.latent_std))
        return channels_last(vae.post_quant((latent.float() * std + mean).to(torch.bfloat16))).contiguous()

    def attention(x: Tensor) -> Tensor:
        return channels_last(vae.decoder.stages[0].attention(channels_first(x))).contiguous()

    def head(longer: Tensor) -> Tensor:
        return shuffle(vae.decoder.conv_out.conv(channels_first(longer))).float().clamp(-1.0, 1.0)

    return {"vae_steady_seg0": before, "vae_steady_seg1": attention, "vae_steady_seg2": head}


class Engine:
    """Stands for a plan; its scratch is what lies at the address it is given."""

    def __init__(self, name: str, compute: Callable[[Tensor], Tensor], scratch_bytes: int) -> None:
        self.name, self.compute, self.scratch_bytes = name, compute, scratch_bytes

    def context(self, arena: Scratch) -> Engine:
        self.arena = arena
        return self

    def keep_compiled_kernels(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], memory: tuple[int, int]) -> None:
        offset = memory[0] - self.arena.address
        result = self.compute(tensors["x0"])
        self.arena.memory[offset : offset + memory[1]] = POISON
        tensors["y0"].copy_(result)


class Poisoned:
    """The executor with references in the kernels' place; all that nobody will read is overwritten after each step."""

    poison = True

    def _launcher(self, step: Step) -> Any:
        return SimpleNamespace(workspace_bytes=0)

    def _launch(self, index: int, step: Step, values: Mapping[str, Tensor]) -> None:
        results = op_named(step.name).reference(*(values[name].clone() for name in step.inputs))
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(step.outputs, results, strict=True):
            values[name].copy_(result)

    def run_step(self, index: int, step: Step, values: dict[str, Tensor], write: bool = True) -> None:
        super().run_step(index, step, values, write)  # type: ignore[misc]
        if self.poison:
            free = torch.ones(self.arena.size, dtype=torch.bool)  # type: ignore[attr-defined]
            for start, stop in alive_after(self, index):  # type: ignore[arg-type]
                free[start:stop] = False
            self.arena.memory[free] = POISON  # type: ignore[attr-defined]


class Steady(Poisoned, SegmentedNetwork): ...


class First(Poisoned, FirstStep): ...


def alive_after(network: SegmentedNetwork, index: int) -> list[tuple[int, int]]:
    """Bytes of the arena that a later step reads and that are written by now, worked out from the steps alone."""
    ranges, steps = [], network.graph.steps

    def stretch(name: str) -> tuple[int, int]:
        first = network._offsets[name]
        return first, first + storage_bytes(network.graph.tensors[name])

    names = network._offsets.keys()
    made = [stretch(n) for step in steps[: index + 1] for n in step.outputs if n in names]
    later = [stretch(n) for step in steps[index + 1 :] for n in step.inputs if n in names]
    if isinstance(network, FirstStep):  # its frames are taken from the arena when all is over
        later.append(stretch(first_step.WHOLE))
    for first, stop in made:
        ranges += [(max(first, a), min(stop, b)) for a, b in later if a < stop and first < b]
    return ranges


def network_of(
    graph: SegmentedGraph,
    vae: CausalVAE,
    scratch: int = 1000,
    kind: type = Steady,
    device: torch.device = CPU,
    coded: Mapping[str, Tensor] | None = None,
) -> Any:
    functions = segment_functions(vae)
    host = SimpleNamespace(device=device, load=lambda name, spec, bundle: Engine(name, functions[name], scratch))
    network = kind(host, graph, Scratch(device))
    weights = vae.state_dict() | dict(coded or {})
    network.load_weights((name, weights[name]) for name in graph.weights)
    return network


def bindings(graph: SegmentedGraph, caches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: cache.clone() for name, cache in caches.items()}
    return tensors | {f"{name}_out": tensor for name, tensor in tensors.items()}


def caches_of(graph: SegmentedGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(graph.tensors[name].shape, generator=generator).to(torch.bfloat16)
            for name in graph.inputs if name != "latent"}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scratch", (0, 1 << 20))
def test_a_later_step_is_the_same_in_little_memory(graph: SegmentedGraph, vae: CausalVAE, scratch: int) -> None:
    network = network_of(graph, vae, scratch)
    network.prepare()
    assert len(network.graph.steps) > len(graph.steps) or scratch, "some steps go in parts"
    weights, functions = vae.state_dict(), segment_functions(vae)

    def op(name: str, inputs: Any) -> Any:
        results = op_named(name).reference(*inputs)
        return results if isinstance(results, tuple) else (results,)

    for seed in (1, 2)[: 1 if scratch else 2]:  # the second finds the first one's leftovers
        latent = torch.randn(graph.tensors["latent"].shape, generator=torch.Generator().manual_seed(seed))
        caches = caches_of(graph, seed)
        wanted = run_steps(graph, {"latent": latent, **caches}, weights, lambda n, x: (functions[n](x[0]),), op)
        tensors = bindings(graph, caches) | {"latent": latent, "frames": torch.zeros(graph.tensors["frames"].shape)}
        network.run(tensors)
        for name, value in wanted.items():
            torch.testing.assert_close(tensors[name], value, rtol=2e-2, atol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_codes_lie_in_little_memory_as_well(vae: CausalVAE) -> None:
    graph = library_decoder_steps(TINY, "int8")
    peaks = ConvCalibration("", {name: ConvInput(8.0, 1.0) for name in codable_names(TINY.vae)})
    module = LibrarySteady(vae, coded=coded_convs(vae, "int8", peaks))
    coded = {name: tensor for name, tensor in module.named_buffers() if name.startswith("coded.")}
    network = network_of(graph, vae, coded=coded)
    network.prepare()
    generator = torch.Generator().manual_seed(3)
    given = {n: torch.randn(graph.tensors[n].shape, generator=generator) for n in graph.inputs}
    kinds = {"int8": lambda x: encode(40 * x, "int8"), "bf16": lambda x: x.to(torch.bfloat16), "fp32": lambda x: x}
    given = {name: kinds[graph.tensors[name].dtype](x) for name, x in given.items()}
    caches = {name: x for name, x in given.items() if name != "latent"}
    frames, *after = module(given["latent"], *(x.clone() for x in caches.values()))
    tensors = bindings(graph, caches) | {"latent": given["latent"], "frames": torch.zeros_like(frames)}
    network.run(tensors)
    torch.testing.assert_close(tensors["frames"], frames, rtol=2e-2, atol=2e-2)
    for name, made in zip(caches, after, strict=True):
        assert (tensors[name].float() - made.float()).abs().max() <= 2e-2 or torch.equal(tensors[name], made), name


@torch.no_grad()
def test_the_first_step_by_ops_is_the_decoders(graph: SegmentedGraph, vae: CausalVAE) -> None:
    steady = network_of(graph, vae)
    found = first_steps(graph)
    assert found is not None
    first = First(steady, found)
    first.prepare()
    steady.prepare()
    shape = list(graph.tensors["frames"].shape)
    for seed in (1, 2):
        latent = torch.randn(graph.tensors["latent"].shape, generator=torch.Generator().manual_seed(seed))
        wanted, *caches = DecoderFirst(vae, ops=True)(latent)
        outs = {f"vae_cache_{i}_out": torch.full_like(cache, float("nan")) for i, cache in enumerate(caches)}
        tensors = outs | {"latent": latent, "frames": torch.zeros(shape[:2] + [1] + shape[3:])}
        first.run(tensors)
        torch.testing.assert_close(tensors["frames"], wanted, rtol=3e-2, atol=3e-2)
        for out, cache in zip(outs.values(), caches, strict=True):
            torch.testing.assert_close(out, cache, rtol=5e-2, atol=5e-2)
        assert any(not cache.any() for cache in caches), "some history is still empty"


def test_the_first_step_keeps_nothing_of_its_own(graph: SegmentedGraph, vae: CausalVAE) -> None:
    steady = network_of(graph, vae)
    found = first_steps(graph)
    assert found is not None
    first = First(steady, found)
    assert set(first.graph.weights) < set(graph.weights) and first.engines == steady.engines
    assert all(first._fixed[name] is steady._fixed[name] for name in first.graph.weights)
    scratch = {segment.name: 1000 for segment in graph.segments}
    assert first.plan.layout(scratch)[2] < steady.plan.layout(scratch)[2]


def test_a_decoder_without_ops_has_no_such_first_step(graph: SegmentedGraph) -> None:
    ends = tuple(step for step in graph.steps if step.kind == "segment")
    assert first_steps(replace(graph, steps=ends)) is None


def test_each_thing_can_be_switched_off(graph: SegmentedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = {segment.name: 0 for segment in graph.segments}
    least = planned_steps(graph, scratch).layout(scratch)[2]
    monkeypatch.setattr(less_memory, "SPLIT", False)
    whole = planned_steps(graph, scratch)
    assert len(whole.graph.steps) == len(graph.steps) and whole.layout(scratch)[2] > least
    monkeypatch.setattr(less_memory, "SHARE", False)
    apart = planned_steps(graph, scratch)
    assert apart == PlannedSteps(graph) and apart.layout(scratch)[2] > whole.layout(scratch)[2]
    monkeypatch.setattr(first_step, "BY_OPS", False)
    assert first_steps(graph) is None


class Bytes:
    """Which tensor each byte of the arena holds, followed step by step."""

    def __init__(self, plan: PlannedSteps, scratch: int) -> None:
        self.graph, self.inside = plan.graph, plan.inside
        sizes = {segment.name: scratch for segment in plan.graph.segments}
        self.offsets, self.places, _ = plan.layout(sizes)
        self.scratch, self.held = scratch, list[tuple[int, int, str]]()

    def stretch(self, name: str) -> tuple[int, int]:
        return self.offsets[name], self.offsets[name] + storage_bytes(self.graph.tensors[name])

    def whole(self, name: str) -> str:
        return self.whole(self.inside[name].other) if name in self.inside and self.inside[name].part else name

    def write(self, start: int, stop: int, name: str) -> None:
        kept = [
            part for a, b, n in self.held for part in ((a, min(b, start), n), (max(a, stop), b, n)) if part[0] < part[1]
        ]
        self.held = [*kept, (start, stop, name)]

    def follow(self) -> None:
        """Every step reads what was written for it, and writes nothing that it still reads."""
        for i, step in enumerate(self.graph.steps):
            inputs = [name for name in step.inputs if name in self.offsets]
            outputs = [name for name in step.outputs if name in self.offsets]
            for name in inputs:
                start, stop = self.stretch(name)
                found = sum(min(b, stop) - max(a, start) for a, b, n in self.held
                            if n == self.whole(name) and a < stop and start < b)  # fmt: skip
                whole = stop - start if not name.endswith(("doubled", "to come")) else 1
                assert found >= whole, f"step {i}, {step.name}: {name} is overwritten"
            shares = [
                (step.outputs[o], step.inputs[x])
                for o, x in (op_named(step.name).spec.may_share if step.kind == "op" else ())
            ]
            for name in outputs:
                start, stop = self.stretch(name)
                for other in (*inputs, *(n for n in outputs if n != name)):
                    a, b = self.stretch(other)
                    assert b <= start or stop <= a or ((name, other) in shares and b == stop), (
                        f"{step.name}: {name}, {other}"
                    )
                if step.kind == "segment":
                    place = self.places[i]
                    assert all(
                        b <= place or place + self.scratch <= a for a, b in map(self.stretch, (*inputs, *outputs))
                    )
            if step.kind == "segment" and self.scratch:
                self.write(self.places[i], self.places[i] + self.scratch, "scratch")
            for name in outputs:
                self.write(*self.stretch(name), self.whole(name))


@pytest.mark.parametrize("scratch", (0, 100 << 20, 700 << 20))
@pytest.mark.parametrize("preset", (TINY, WAN22_TI2V_5B), ids=("tiny", "large"))
def test_nothing_is_overwritten_that_is_still_read(preset: Preset, scratch: int) -> None:
    graph = library_decoder_steps(preset)
    plan = planned_steps(graph, {segment.name: scratch for segment in graph.segments})
    Bytes(plan, scratch).follow()
    found = first_steps(graph)
    assert found is not None
    Bytes(found.plan, scratch).follow()


def test_the_large_models_decoder_takes_what_the_peak_step_needs() -> None:
    """Its last level's first convolution: 6 frames of 512 channels, one of its own output, and the shortcut's four."""
    graph = library_decoder_steps(WAN22_TI2V_5B)
    scratch = {segment.name: 0 for segment in graph.segments}
    frame = 2 * 352 * 640 * 256
    assert planned_steps(graph, scratch).layout(scratch)[2] == (6 * 2 + 1 + 4) * frame
    first = first_steps(graph)
    assert first is not None and first.plan.layout(scratch)[2] < 1.1e9


# ---- the whole stream: here small with references, on a GPU at full size with the real kernels and libraries ----------


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))


@torch.no_grad()
def check_a_stream(preset: Preset, device: torch.device, kinds: tuple[type, type]) -> None:
    """A first latent, then two later ones, in little memory: against PyTorch, and against the steps as exported."""
    torch.manual_seed(0)
    graph = library_decoder_steps(preset)
    with device:
        vae = CausalVAE(preset.vae).eval().to(torch.bfloat16)
        latents = torch.randn(3, *graph.tensors["latent"].shape)
        frames = torch.empty(graph.tensors["frames"].shape)
    little = network_of(graph, vae, kind=kinds[0], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(less_memory, "SHARE", False)
        patch.setattr(less_memory, "SPLIT", False)
        plain = network_of(graph, vae, kind=kinds[0], device=device)
    assert plain.graph == graph != little.graph
    first = kinds[1](little, first_steps(graph))
    for network in (little, first, plain):
        network.prepare()
    assert little.arena.size < 0.85 * plain.arena.size
    wanted, *histories = DecoderFirst(vae, ops=True)(latents[0])
    outs = {f"vae_cache_{i}_out": torch.full_like(cache, float("nan")) for i, cache in enumerate(histories)}
    got = torch.empty_like(wanted)
    little.arena.memory.fill_(POISON)
    first.run({"latent": latents[0], "frames": got, **outs})
    assert off(got, wanted) < 0.05
    assert all(off(outs[f"vae_cache_{i}_out"], cache) < 0.05 for i, cache in enumerate(histories) if cache.any())
    caches = {name.removesuffix("_out"): cache for name, cache in outs.items()}
    for latent in latents[1:]:
        results = []
        for network in (little, little, plain):  # a race between threads shows as two runs that differ
            network.arena.memory.fill_(POISON)
            given = bindings(graph, caches)
            network.run(given | {"latent": latent, "frames": frames})
            results.append({"frames": frames.clone()} | {name: given[name] for name in caches})
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), f"two runs differ in {name}"
            assert off(value, results[2][name]) < 0.01, f"{name}: other sizes may round otherwise, no more"
        caches = {name: results[0][name] for name in caches}


@pytest.mark.parametrize("widths", ((1, 2, 2, 4), (1, 2, 4, 4)))
def test_a_stream_in_little_memory(widths: tuple[int, ...]) -> None:
    check_a_stream(replace(TINY, vae=replace(TINY.vae, dim_mult=widths)), CPU, (Steady, First))


@pytest.mark.gpu
def test_a_stream_in_little_memory_at_full_size() -> None:
    check_a_stream(WAN22_TI2V_5B, torch.device("cuda"), (SegmentedNetwork, FirstStep))
