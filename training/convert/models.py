"""State dicts and containers of the three models to our tensors: names, shapes, LoRA and 4 bits, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.training.convert import dit_keys, text_keys, vae_keys, vae_stock
from longtake.training.convert.containers import choose, unwrapped
from longtake.training.convert.fit import Shapes, check_fit, refuse_other_model
from longtake.training.convert.lora import merge
from longtake.training.convert.lora_scale import LoraScale
from longtake.training.convert.packed import ORDER, rule_of, unpack
from longtake.training.convert.pending import Converted, Pending, pending
from longtake.training.convert.world import convert_world_dit, convert_world_vae
from longtake.training.models.load import meta_models
from longtake.training.models.presets import Preset

UNSCALED = LoraScale()


def convert_dit(
    container: Mapping[str, Any], preset: Preset, *, dtype: torch.dtype | None = None, use_ema: bool = False,
    base: Mapping[str, Any] | None = None, lora: Mapping[str, Any] | None = None,
    lora_scale: LoraScale = UNSCALED, own_scale: LoraScale = UNSCALED, packed_rule: str | None = None,
) -> Converted:  # fmt: skip
    """The DiT in a container (or plain state dict) under our names.

    Args:
        container: what `files.read_container` gives, or a state dict.
        dtype: of the result; as in the source if None (fp32 where the source is packed).
        use_ema: take `generator_ema`.
        base: the weights under a container that holds a LoRA only.
        lora: a LoRA to merge besides. lora_scale: how it is scaled; own_scale: how the container's is.
        packed_rule: rule of packed block scales where the container doesn't say; "mse" if None.

    Raises:
        LongtakeError: another model's checkpoint (named), a base missing, EMA asked for but not there.
        IntegrityError: keys missing, extra or of another shape; LoRA or packed parts that don't fit.
    """
    if preset.family == "sana_wm":
        if base is not None or lora is not None:
            raise LongtakeError(
                "SANA-WM's LoRAs are not known", got="--base or --lora", expected="full weights", fix="leave it out"
            )
        return convert_world_dit(container, preset, dtype, use_ema)
    chosen = choose(container, use_ema)
    loras = [(chosen.lora, own_scale)] if chosen.lora else []
    entry, about = chosen.name, chosen.about
    if not chosen.weights:
        if base is None:
            got, expected = f"{len(chosen.lora)} LoRA tensors", "the weights that it was trained on, too"
            raise LongtakeError("the file holds a LoRA only", got=got, expected=expected, fix="pass them with --base")
        under = choose(base, use_ema and "generator_ema" in base)
        chosen, about, entry = under, under.about, f"{under.name} + {entry}"
        if not chosen.weights:
            raise LongtakeError("the base holds a LoRA only, too", fix="pass the full weights with --base")
    elif base is not None:
        what, got = "--base is the weights under a --dit that holds a LoRA only", "a --dit with full weights"
        fix = "leave out --base, or pass the LoRA with --lora"
        raise LongtakeError(what, got=got, expected="one of the two", fix=fix)
    if lora is not None:
        loras.append((_only_lora(lora), lora_scale))
    return _dit(chosen.weights, preset, dtype, loras, rule_of(about, packed_rule), entry)


def _dit(
    state: Mapping[str, Tensor], preset: Preset, dtype: torch.dtype | None,
    loras: list[tuple[dict[str, Tensor], LoraScale]], rule: str, entry: str,
) -> Converted:  # fmt: skip
    keys = "diffusers" if dit_keys.is_diffusers(state) else "wan"
    tensors, packed = unpack(dit_keys.from_diffusers(state) if keys == "diffusers" else state, rule)
    refuse_other_model(tensors, preset)
    check_fit(tensors, shapes_of(preset, "dit"), f"the DiT of preset {preset.name}")
    result, factors = dict(tensors), set[float]()
    for lora, scale in loras:
        result, merged = merge(result, lora, scale)
        factors.update(merged.values())
        packed = {name: value for name, value in packed.items() if name not in merged}
    meta: dict[str, Any] = {"source": {"entry": entry, "keys": keys}}
    if loras:
        meta["lora"] = {"merged": len(loras), "scale": factors.pop() if len(factors) == 1 else sorted(factors)}
    if packed:
        meta["packed"] = {"rule": rule, "order": ORDER, "amax": packed}
    return Converted("dit", preset, _cast(result, tensors, dtype), meta)


def convert_vae(state: Mapping[str, Any], preset: Preset, *, dtype: torch.dtype | None = None) -> Converted:
    """The VAE in Wan's or diffusers' state dict under our names, with the released latents' mean and std in fp32.

    Raises:
        LongtakeError: it is the Wan 2.1 VAE, or the preset's latents have other channels than the released VAE's.
        IntegrityError: keys missing, extra or of another shape.
    """
    if preset.family == "sana_wm":
        return convert_world_vae(state, preset, dtype)
    statistics = {"latent_mean": vae_keys.WAN22_LATENT_MEAN, "latent_std": vae_keys.WAN22_LATENT_STD}
    channels = preset.vae.z_channels
    if channels != len(vae_keys.WAN22_LATENT_MEAN) or not preset.vae.quant_convs:
        what = f"the VAE of preset {preset.name} is not of the Wan 2.2 kind"
        got, expected = f"{channels} latent channels", f"{len(vae_keys.WAN22_LATENT_MEAN)}"
        raise LongtakeError(what, got=got, expected=expected, fix="convert for preset wan2.2-ti2v-5b")
    state = unwrapped(state.get("model_state", state.get("state_dict", state)))
    stock = vae_stock.is_stock(state)
    state = vae_stock.from_stock(state) if stock else state
    first = state.get("encoder.conv_in.weight")
    vae_stock.refuse_wan21(None if first is None else tuple(first.shape))
    tensors = {name: pending(value) for name, value in vae_keys.from_diffusers(state).items()}
    tensors |= {name: pending(torch.tensor(values)) for name, values in statistics.items()}
    check_fit(tensors, shapes_of(preset, "vae"), f"the VAE of preset {preset.name}")
    cast = {name: value if name in statistics else value.to(dtype or value.dtype) for name, value in tensors.items()}
    return Converted("vae", preset, cast, {"source": {"keys": "wan" if stock else "diffusers"}})


def convert_text(state: Mapping[str, Any], preset: Preset, *, dtype: torch.dtype | None = None) -> Converted:
    """The umT5 encoder in Wan's or Hugging Face's state dict under our names.

    Raises:
        LongtakeError: the preset's text encoder isn't umT5.
        IntegrityError: keys missing, extra, unknown or of another shape.
    """
    if preset.text.kind != "umt5":
        what = f"preset {preset.name} has a text encoder of its own"
        raise LongtakeError(what, got="umT5 weights", expected=f"kind {preset.text.kind}", fix="leave out --text")
    wan = "token_embedding.weight" in state
    lazy = {name: pending(value) for name, value in unwrapped(state).items()}
    tensors = text_keys.from_wan(lazy) if wan else text_keys.from_huggingface(lazy)
    check_fit(tensors, shapes_of(preset, "text_encoder"), f"the text encoder of preset {preset.name}")
    meta = {"source": {"keys": "wan" if wan else "huggingface"}}
    return Converted("text_encoder", preset, _cast(tensors, tensors, dtype), meta)


@cache
def shapes_of(preset: Preset, kind: str) -> Shapes:
    """Key -> shape of the preset's "dit", "vae" or "text_encoder"."""
    models = meta_models(preset)
    module: nn.Module = {"dit": models.dit, "vae": models.vae, "text_encoder": models.text}[kind]
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _only_lora(container: Mapping[str, Any]) -> dict[str, Tensor]:
    chosen = choose(container)
    if not chosen.lora:
        what = "the file given as LoRA holds no LoRA"
        got, fix = f"{len(chosen.weights)} weights in {chosen.name!r}", "pass full weights with --dit"
        raise LongtakeError(what, got=got, expected="PEFT's, kohya's or ComfyUI's keys: ...lora_A.weight", fix=fix)
    return chosen.lora


def _cast(
    tensors: Mapping[str, Pending], source: Mapping[str, Pending], dtype: torch.dtype | None
) -> dict[str, Pending]:
    return {name: value.to(dtype or source[name].dtype) for name, value in tensors.items()}
