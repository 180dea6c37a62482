"""What a training step will take, worked out on the meta device: sizes, shapes, memory and arithmetic, no weights.

Nothing is allocated, so it works for any preset anywhere. Arithmetic is what torch's FlopCounterMode counts (matrix
products, convolutions, attention), forward and backward. Activations are what autograd keeps for the backward pass;
what kernels need besides, and fragmentation, come on top.

Legend: B batch, N chunks, F = N * chunk latents frames, E text length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from longtake.training.data.rooms.latents import Walks
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.window import full_history
from longtake.training.objective.teacher_forcing import Clips, Noise, flow_loss, predict_velocity
from longtake.training.objective.walk_forcing import Levels, predict
from longtake.training.objective.walk_forcing import flow_loss as walk_loss
from longtake.training.stages.options import StageOptions

META = torch.device("meta")
FP32 = 4
COMPUTE = torch.bfloat16


class FlashAttention(TorchFunctionMode):
    """Attention as a GPU computes it, which keeps no scores: the meta device would take the plain way, and keep them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **kwargs)


@dataclass
class Cost:
    """Of one step: tensors of a batch (name -> shape), bytes kept for the backward pass, and floating-point operations."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    activations: int = 0
    flops: int = 0
    forward_flops: int = 0


def cost_of(loss: Callable[[], Tensor], modules: list[nn.Module]) -> Cost:
    """Run `loss` and its backward pass, on the meta device, and count.

    Args:
        modules: whose parameters are not activations.
    """
    own = {param.untyped_storage()._cdata for module in modules for param in module.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), storage  # held, so that no other storage gets its address
        return x

    with FlopCounterMode(display=False) as counter, FlashAttention():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            total = loss()
        forward = counter.get_total_flops()
        total.backward()
    return Cost(
        activations=sum(size for size, _ in kept.values()), flops=counter.get_total_flops(), forward_flops=forward
    )


def dit_modules(preset: Preset, text: bool = True) -> dict[str, nn.Module]:
    """What stage "dit" trains, on the meta device, in the dtype it computes in on a GPU; `text`: its encoder, too."""
    with META:
        modules: dict[str, nn.Module] = {"dit": family_of(preset).dit(preset).to(COMPUTE)}
        if text:
            modules["text_encoder"] = text_encoder_for(preset).to(COMPUTE)
    return modules


def dit_cost(preset: Preset, modules: dict[str, nn.Module], batch: int, chunks: int) -> Cost:
    """Cost of one teacher-forcing step on `batch` stories of `chunks` chunks, full history."""
    dit, text = modules["dit"], modules.get("text_encoder")
    assert isinstance(dit, CausalDiT)
    frames = chunks * preset.chunk_latents
    latents = torch.empty(batch, frames, preset.dit.channels, *preset.latent_hw, dtype=torch.float32, device=META)
    tokens = torch.empty(batch, chunks, preset.text.length, dtype=torch.int32, device=META)
    clips = Clips(latents, tokens, full_history(chunks).to(META), unmasked=chunks)
    noise = Noise(torch.empty_like(latents), torch.empty(batch, chunks, 3, device=META))
    given = torch.empty(batch, chunks, preset.text.length, preset.text.dim, device=META)

    def loss() -> Tensor:
        rows = given if text is None else text(tokens.flatten(0, 1)).unflatten(0, (batch, chunks))
        return flow_loss(predict_velocity(dit, preset, rows, clips, noise), clips, noise)[0]

    cost = cost_of(loss, list(modules.values()))
    cost.shapes = {
        "latents": list(latents.shape),
        "noise": list(latents.shape),
        "tokens": list(tokens.shape),
        "levels": [batch, chunks, 3],
        "tokens of the transformer, [clean; noisy]": [batch, (2 * chunks - 1) * preset.chunk_tokens, preset.dit.dim],
    }
    return cost


def walk_cost(preset: Preset, modules: dict[str, nn.Module], batch: int, chunks: int, context: str) -> Cost:
    """Cost of one step of a world on `batch` walks of `chunks` chunks."""
    dit: Any = modules["dit"]
    frames = preset.first_frame(chunks)
    shown = 1 + preset.vae.stride[0] * (frames - 1)
    latents = torch.empty(batch, preset.dit.channels, frames, *preset.latent_hw, device=META)
    tokens = torch.empty(batch, preset.text.length, dtype=torch.int32, device=META)
    poses, intrinsics = (torch.empty(batch, *size, dtype=torch.float64, device=META) for size in ((shown, 4, 4), (4,)))
    walks, levels = Walks(latents, tokens, poses, intrinsics), Levels(torch.empty(batch, frames, 3, device=META))
    text = modules.get("text_encoder")
    given = torch.empty(batch, preset.text.length, preset.text.dim, device=META)

    def loss() -> Tensor:
        rows = given if text is None else text(tokens)
        velocity = predict(dit, preset, walks, rows, torch.empty_like(latents), levels, context)
        return walk_loss(velocity, walks, torch.empty_like(latents), levels)[0]

    cost = cost_of(loss, list(modules.values()))
    cost.shapes = {"latents": list(latents.shape), "noise": list(latents.shape), "tokens": list(tokens.shape)}
    cost.shapes |= {
        "cameras": [batch, shown, 4, 4],
        "tokens of the transformer": [batch, frames * preset.frame_tokens, preset.dit.dim],
    }
    return cost


def checkpointed(preset: Preset, cost: Cost, batch: int, chunks: int, text: bool = True) -> Cost:
    """`cost` if blocks are computed again in the backward pass: only their inputs are kept, and the inside of one."""
    one, two = (
        dit_cost(small, dit_modules(small, text), batch, chunks)
        for small in (replace(preset, dit=replace(preset.dit, layers=layers)) for layers in (1, 2))
    )
    none = 2 * one.forward_flops - two.forward_flops  # of what is no block
    tokens = (2 * chunks - 1) * (preset.chunk_tokens + 2 * preset.text.length)  # of x, and of the text's K and V
    inputs = preset.dit.layers * batch * tokens * preset.dit.dim * COMPUTE.itemsize
    return replace(
        cost,
        activations=one.activations + inputs,
        flops=cost.flops + cost.forward_flops - none,
    )


def frozen_text(options: StageOptions) -> int:
    """Bytes of a text encoder that doesn't learn."""
    with META:
        return 0 if options.trains_text else FP32 * _count(text_encoder_for(options.preset))


def vae_modules(preset: Preset, decoder_only: bool = False) -> dict[str, nn.Module]:
    """The module of stage "vae", on the meta device, in the dtype it computes in on a GPU."""
    with META:
        vae = family_of(preset).vae(preset).to(COMPUTE)
    vae.encoder.requires_grad_(not decoder_only)
    return {"vae": vae}


def vae_cost(preset: Preset, modules: dict[str, nn.Module], batch: int, frames: int) -> Cost:
    """Cost of one reconstruction step on `batch` clips of `frames` frames."""
    vae: Any = modules["vae"]
    video = torch.empty(batch, 3, frames, preset.height, preset.width, dtype=COMPUTE, device=META)
    latents: list[Tensor] = []

    def loss() -> Tensor:
        latents.append(vae.encode_raw(video, vae.stream()))
        return (vae.decode_raw(latents[0], vae.stream()) - video).float().abs().mean()

    cost = cost_of(loss, [vae])
    cost.shapes = {"video": list(video.shape), "latents": list(latents[0].shape)}
    return cost


def memory_of(modules: dict[str, nn.Module], activations: int) -> dict[str, int]:
    """Bytes by use: fp32 master weights as the trainer keeps them, and what comes with those that learn."""
    params = [param for module in modules.values() for param in module.parameters()]
    weights, learn = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
    return {
        "weights, fp32": FP32 * weights,
        "gradients, fp32": FP32 * learn,
        "AdamW's two moments, fp32": 2 * FP32 * learn,
        "averaged weights (EMA), fp32": FP32 * learn,
        "weights in bf16, kept for the backward pass": COMPUTE.itemsize * weights,
        "activations in bf16, kept for the backward pass": activations,
    }


def describe(stage: str, options: StageOptions) -> list[str]:
    """Lines about a step of `stage` with these options; for stage "dit", one of its longest stories."""
    preset = options.preset
    if stage == "vae":
        from longtake.training.stages.vae import clip_frames

        modules = vae_modules(preset, options.decoder_only)
        cost = vae_cost(preset, modules, options.batch, max(clip_frames(preset)))
    elif "camera" in family_of(preset).can:
        from longtake.training.stages.world import require_world

        require_world(options)
        modules = dit_modules(preset, options.trains_text)
        cost = walk_cost(preset, modules, options.batch, max(options.chunks), options.context)
    else:
        modules = dit_modules(preset, options.trains_text)
        cost = dit_cost(preset, modules, options.batch, max(options.chunks))
        if options.gradient_checkpointing:
            cost = checkpointed(preset, cost, options.batch, max(options.chunks), options.trains_text)
    memory = memory_of(modules, cost.activations)
    frozen = frozen_text(options) if stage == "dit" else 0
    if frozen and options.cache_dir is None:
        memory["text encoder, frozen, fp32"] = frozen
    lines, parts = [*size_lines(modules), *cost_lines(cost, memory)], options.accumulate
    if frozen and options.cache_dir is not None:
        reads = f"reads prompts that {options.cache_dir} does not have yet, then it leaves the GPU"
        lines.insert(-1, f"before the first step the text encoder ({frozen / 1e9:,.3f} GB, frozen) {reads}")
    if parts > 1:
        lines.insert(
            -1, f"with --accumulate {parts} a step is {parts} of these: so many times the arithmetic, no more memory"
        )
    return lines


def size_lines(modules: dict[str, nn.Module]) -> list[str]:
    """Parameters of each module and of its parts."""
    lines, total = [], 0
    for name, module in modules.items():
        count = _count(module)
        total += count
        lines.append(f"{name}: {count:,} parameters")
        lines += [f"  {child}: {_count(part):,}" for child, part in module.named_children()]
    return [*lines, f"together: {total:,} parameters, {total * FP32 / 1e6:,.1f} MB in fp32"]


def cost_lines(cost: Cost, memory: dict[str, int]) -> list[str]:
    """Shapes of a batch, memory and arithmetic of a step."""
    width = max(map(len, memory))
    return [
        "a batch:",
        *(f"  {name}: {shape}" for name, shape in cost.shapes.items()),
        "memory on one GPU, without sharding and without what kernels need besides:",
        *(f"  {name:<{width}} {size / 1e9:10.3f} GB" for name, size in memory.items()),
        f"  {'together':<{width}} {sum(memory.values()) / 1e9:10.3f} GB",
        f"a step: {cost.flops / 1e12:,.3f} TFLOP, forward and backward "
        f"({cost.flops / 1e12 / 100:,.3g} s at a sustained 100 TFLOP/s)",
        "nothing was trained",
    ]


def _count(module: Any) -> int:
    return sum(param.numel() for param in module.parameters())
