"""SANA-WM's published containers to our tensors: its own and diffusers' names, training checkpoints, the LTX-2 VAE.

What does not match is refused: nothing is padded or cut to fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.convert.containers import choose, unwrapped
from longtake.training.convert.fit import Shapes, check_fit
from longtake.training.convert.pending import Converted, Pending, pending
from longtake.training.models.families import family_of
from longtake.training.models.presets import Preset, WorldPreset
from longtake.training.models.sana_wm.keys import our_key, our_tensor, our_vae_key

REFINER = re.compile(r"^(transformer_blocks\.\d+\.|audio_|av_cross|caption_projection|text_connectors|.*connectors?\.)")


def convert_world_dit(
    container: Mapping[str, Any], preset: Preset, dtype: torch.dtype | None, use_ema: bool
) -> Converted:
    """Stage 1 in a container or plain state dict; of a training checkpoint the generator, the critic is not looked at.

    Raises:
        LongtakeError: it is the refiner, or holds a LoRA only.
        IntegrityError: keys missing, extra or of another shape.
    """
    assert isinstance(preset, WorldPreset)
    chosen = choose(container, use_ema)
    if not chosen.weights:
        raise LongtakeError(
            "the file holds a LoRA only", expected="the weights of stage 1", fix="pass the full weights"
        )
    refuse_refiner(chosen.weights)
    softmax = frozenset(layer for layer in range(preset.dit.layers) if preset.dit.softmax(layer))
    tensors: dict[str, Pending] = {}
    for key, tensor in chosen.weights.items():
        name = our_key(key, softmax)
        if name is not None:
            if name in tensors:
                raise IntegrityError(
                    "a weight is there twice", got=key, expected="once", fix="pass a file with one model"
                )
            tensors[name] = _reshaped(name, tensor)
    check_fit(tensors, _shapes(preset, "dit"), f"the DiT of preset {preset.name}")
    keys = "diffusers" if any(key.startswith("t_embedder.linear_1") for key in chosen.weights) else "sana"
    told = {
        "source": {"entry": chosen.name, "keys": keys},
        "dialect": {
            "softmax_scale": list(preset.dit.dialect.softmax_scale),
            "camera_conv_tail": preset.dit.dialect.camera_conv_tail,
            "ray_clip": preset.dit.dialect.ray_clip,
        },
    }
    return Converted("dit", preset, _cast(tensors, dtype), told)


def convert_world_vae(state: Mapping[str, Any], preset: Preset, dtype: torch.dtype | None) -> Converted:
    """The causal LTX-2 VAE. Its latents' mean and std stay fp32.

    Raises:
        IntegrityError: keys missing, extra or of another shape.
    """
    state = unwrapped(state.get("state_dict", state))
    tensors = {our_vae_key(key): pending(tensor) for key, tensor in state.items()}
    check_fit(tensors, _shapes(preset, "vae"), f"the VAE of preset {preset.name}")
    wide = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name.startswith("latent_")}
    return Converted("vae", preset, {**_cast(tensors, dtype), **wide}, {"source": {"keys": "ltx2"}})


def refuse_refiner(state: Mapping[str, Tensor]) -> None:
    """Raise LongtakeError, and name it, if these are the weights of SANA-WM's second stage."""
    if "blocks.0.attn.qkv.weight" not in state and any(REFINER.match(key) for key in state):
        raise LongtakeError(
            "this is SANA-WM's refiner, its second stage, an LTX-2 video transformer: longtake runs stage 1 only",
            got=f"{len(state)} tensors, such as {next(key for key in state if REFINER.match(key))}",
            expected="stage 1, such as blocks.0.attn.qkv.weight",
            fix="pass the file of stage 1, sana_dit/model.pt of the streaming release; videos go without the refiner",
        )


def _reshaped(name: str, tensor: Tensor) -> Pending:
    return pending(our_tensor(name, tensor))


def _cast(tensors: Mapping[str, Pending], dtype: torch.dtype | None) -> dict[str, Pending]:
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}


@cache
def _shapes(preset: Preset, kind: str) -> Shapes:
    family = family_of(preset)
    with torch.device("meta"):
        module: nn.Module = family.dit(preset) if kind == "dit" else family.vae(preset)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
