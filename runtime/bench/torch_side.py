"""PyTorch's side: eager, compiled and autotuned, with the weights that the engines get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from longtake.runtime.backends.base import Backend
from longtake.runtime.bench.gpu import device_from_name, synchronize
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.torch_backend import PlainTorchBackend
from longtake.runtime.bench.torch_dit import ATTENTIONS, PlainDiT, attention, best_attention
from longtake.runtime.bench.torch_vae import with_fast_norms
from longtake.runtime.bench.torch_world import PlainWorldBackend
from longtake.runtime.clock import StageClock
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset
from longtake.training.models.random_weights import fill
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.vae import CausalVAE

CHANNELS_LAST = "channels_last"
COMPILE: dict[str, dict[str, Any] | None] = {
    "torch": None,
    "torch_compile": {"mode": "default"},
    "torch_autotune": {"mode": "max-autotune-no-cudagraphs"},
}


def random_dit(preset: Preset, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> CausalDiT:
    """The preset's DiT with random weights on `device`."""
    with torch.device("meta"):
        dit = CausalDiT(preset.dit)
    fill(dit, device, dtype)
    return dit


def random_vae(
    preset: Preset, device: torch.device, channels_last: bool, dtype: torch.dtype = torch.bfloat16
) -> CausalVAE:
    """The preset's VAE with random weights on `device`, its decoder's norms as PyTorch does them fastest."""
    with torch.device("meta"):
        vae = CausalVAE(preset.vae)
        vae.encoder = torch.nn.Identity()  # type: ignore[assignment]  # not decoded with
    fill(vae, device, dtype)
    return with_fast_norms(vae, channels_last)


def measure_torch(part: str, options: BenchOptions, save: Save) -> dict[str, Any]:
    """The figures of one of PARTS, but for "engine". "torch_vae" is the decoder alone, contiguous and channels last."""
    device = device_from_name(options.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    if part == "torch_vae":
        return _measure_vae(options, device, save)
    torch.set_float32_matmul_precision("high")  # what a model computes in fp32: TF32, as a training framework would
    both = part == "torch" and "vae" in options.networks
    options = options if both else replace(options, networks=("dit",))
    library, attention_ms = fastest_attention(options.model, device)
    backend = PLAIN[options.model.family](options, part, device, library)
    figures = measure(backend, options, save)
    return figures | {"attention": library, "attention_ms": attention_ms, "compile": COMPILE[part]}


def plain_wan(options: BenchOptions, part: str, device: torch.device, library: str) -> Backend:
    """The networks that `options` names; the decoder contiguous."""
    dit = PlainDiT(random_dit(options.model, device), COMPILE[part], library) if "dit" in options.networks else None
    vae = random_vae(options.model, device, part == CHANNELS_LAST) if "vae" in options.networks else None
    return PlainTorchBackend(options.the_recipe, part, dit, vae, device)


def plain_world(options: BenchOptions, part: str, device: torch.device, library: str) -> Backend:
    """The same of a world. It always has its VAE: a video starts from a picture."""
    family = family_of(options.model)
    with torch.device("meta"):
        vae, dit = family.vae(options.model), family.dit(options.model) if "dit" in options.networks else None
    for network in (vae, dit):
        if network is not None:
            fill(network, device)
    if part == CHANNELS_LAST:
        vae.to(memory_format=torch.channels_last_3d)
    backend = PlainWorldBackend(options.the_recipe, part, dit, vae, device, COMPILE.get(part))
    backend.library = library
    return backend


PLAIN: dict[str, Callable[[BenchOptions, str, torch.device, str], Backend]] = {"wan": plain_wan, "sana_wm": plain_world}


@torch.no_grad()
def fastest_attention(preset: Preset, device: torch.device) -> tuple[str, dict[str, float]]:
    """The library that runs a full window's self-attention fastest, and each one's milliseconds."""
    heads, dim, tokens = preset.dit.heads, preset.dit.head_dim, preset.chunk_tokens
    q, k, v = (torch.randn(n * tokens, heads, dim, device=device, dtype=torch.bfloat16) for n in (1, 4, 4))
    spent: dict[str, float] = {}
    for name in ATTENTIONS:
        clock = StageClock(device)
        with best_attention(name):
            attention(q, k, v)
            for _ in range(5):
                with clock.stage("attention"):
                    attention(q, k, v)
        synchronize(device)
        spent[name] = round(min(clock.take()["attention"]), 3)
    return min(spent, key=lambda name: spent[name]), spent


def _measure_vae(options: BenchOptions, device: torch.device, save: Save) -> dict[str, Any]:
    figures: dict[str, Any] = {"backend": "torch_vae", "fps": {}, "stage_ms": {}}
    options = replace(options, networks=("vae",))
    for layout in ("contiguous", CHANNELS_LAST):
        backend = PLAIN[options.model.family](options, layout, device, "")
        figures[layout] = measure(backend, options, lambda figures: None)
        save(figures)
        backend.close()
        del backend
        if device.type == "cuda":
            torch.cuda.empty_cache()
    best = max(("contiguous", CHANNELS_LAST), key=lambda layout: figures[layout]["fps"]["vae"])
    fps = {"vae": figures["contiguous"]["fps"]["vae"], "vae_best": figures[best]["fps"]["vae"]}
    shared = {name: figures["contiguous"][name] for name in ("stage_ms", "vae_conv")}
    return figures | shared | {"fps": fps, "best": best}
