"""PyTorch's side: eager, compiled and autotuned, with the weights that the engines get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from longtake.runtime.bench.gpu import device_from_name, synchronize
from longtake.runtime.bench.measure import Save, measure
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.torch_backend import PlainTorchBackend
from longtake.runtime.bench.torch_dit import ATTENTIONS, PlainDiT, attention, best_attention
from longtake.runtime.bench.torch_vae import with_fast_norms
from longtake.runtime.clock import StageClock
from longtake.training.models.presets import Preset
from longtake.training.models.random_weights import fill
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.vae import CausalVAE

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
    both = part == "torch" and "vae" in options.networks
    options = options if both else replace(options, networks=("dit",))
    dit = PlainDiT(random_dit(options.model, device), COMPILE[part])
    vae = random_vae(options.model, device, channels_last=False) if both else None
    backend = PlainTorchBackend(options.the_recipe, part, dit, vae, device)
    dit.library, attention_ms = fastest_attention(options.model, device)
    figures = measure(backend, options, save)
    return figures | {"attention": dit.library, "attention_ms": attention_ms, "compile": COMPILE[part]}


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
    for layout in ("contiguous", "channels_last"):
        vae = random_vae(options.model, device, channels_last=layout == "channels_last")
        backend = PlainTorchBackend(options.the_recipe, layout, None, vae, device)
        figures[layout] = measure(backend, replace(options, networks=("vae",)), lambda figures: None)
        save(figures)
        backend.close()
        del vae, backend
        if device.type == "cuda":
            torch.cuda.empty_cache()
    best = max(("contiguous", "channels_last"), key=lambda layout: figures[layout]["fps"]["vae"])
    fps = {"vae": figures["contiguous"]["fps"]["vae"], "vae_best": figures[best]["fps"]["vae"]}
    return figures | {"fps": fps, "stage_ms": figures["contiguous"]["stage_ms"], "best": best}
