"""Inputs of the networks of worlds: chunks of both lengths, cameras that move, and state that earlier chunks have left."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longtake.accuracy.runners import Feeds, Runner
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.presets import Preset

TIMESTEP = 727.0


def camera_cases(spec: NetworkSpec, generator: torch.Generator) -> Iterator[tuple[str, Feeds]]:
    """Maps of a first chunk and of a later one."""
    maps = spec.inputs[0]
    low, _, high = dict(spec.profile)["F"]
    for case, frames in (("a first chunk", high), ("a later chunk", low)):
        shape = [frames if size == "F" else int(size) for size in maps.shape]
        yield case, {maps.name: torch.randn(shape, generator=generator)}


def world_cases(
    preset: Preset, spec: NetworkSpec, context: Feeds, state: Feeds, run: Runner, generator: torch.Generator
) -> Iterator[tuple[str, Feeds]]:
    """What a session does at its start and with a full window, and in a pass that writes. `state`: zeros."""
    marker = family_of(preset).start(preset)
    names = ["first chunk", "one chunk read", "full window"]
    for chunk, case in enumerate(names):
        slots = marker.plan(False).inputs
        feeds = world_feeds(preset, spec, chunk, context, state, slots, TIMESTEP, generator)
        yield case, {**feeds, "write_slot": torch.tensor([-1], dtype=torch.int32)}
        writing = world_feeds(preset, spec, chunk, context, state, slots, 0.0, generator)
        if case == names[-1]:
            yield "full window, writes", writing
        else:
            outputs = run(writing)
            state = {name: outputs[f"{name}_out"] for name in state}
            marker = marker.plan(False).after


def world_feeds(
    preset: Preset,
    spec: NetworkSpec,
    chunk: int,
    context: Feeds,
    state: Feeds,
    slots: object,
    timestep: float,
    generator: torch.Generator,
) -> Feeds:
    """Inputs of one pass over chunk `chunk`, in spec order, with a camera that moves forward and turns."""
    family, frames = family_of(preset), preset.frames_of(chunk)
    count = preset.vae.stride[0] * frames
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    angle = torch.linspace(0, 0.3, count, dtype=torch.float64) + 0.3 * chunk
    poses[:, 0, 0] = poses[:, 2, 2] = angle.cos()
    poses[:, 0, 2], poses[:, 2, 0], poses[:, 2, 3] = angle.sin(), -angle.sin(), angle
    height, width = preset.latent_hw
    intrinsics = torch.tensor([0.9 * width, 0.9 * width, width / 2, height / 2]).expand(count, 4)
    cameras = family.camera_inputs(preset, chunk, poses, intrinsics)  # type: ignore[attr-defined]
    known = {
        "latents": torch.randn(1, preset.dit.channels, frames, *preset.latent_hw, generator=generator),
        **family.pass_inputs(preset, frames, timestep, 0),
        **family.chunk_inputs(preset, chunk, 0),
        **cameras,
        **{name: torch.tensor(values, dtype=torch.int32) for name, values in dict(slots).items()},  # type: ignore[call-overload]
        **context,
        **state,
    }
    for binding in spec.inputs:
        if binding.name.startswith("plucker_"):
            shape = [frames if size == "F" else int(size) for size in binding.shape]
            known[binding.name] = 0.3 * torch.randn(shape, generator=generator)
    return {binding.name: known[binding.name] for binding in spec.inputs}
