"""`longtake convert`: released weights to our checkpoint folder, and calibration of what was converted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.files import require_disk, require_folder
from longtake.formats.model_name import checked_name, write_name
from longtake.options import Command, OneOf, Text, option
from longtake.outputs import claim_checkpoints
from longtake.plugins.nvfp4.reference import RULE_LIMITS
from longtake.training.convert.calibrate import calibrate_folder
from longtake.training.convert.calibrate_vae import calibrate_vae_folder
from longtake.training.convert.files import PLACES, read_container
from longtake.training.convert.lora_scale import LoraScale, stored_scale
from longtake.training.convert.models import convert_dit, convert_text, convert_vae
from longtake.training.convert.pending import Converted
from longtake.training.models.families import preset_named
from longtake.training.models.presets import PRESETS, WAN22_TI2V_5B, Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.gemma import KIND, NAME, GemmaSource, instruction_from_config
from longtake.training.models.text.sentencepiece import carry_tokenizer

logger = logging.getLogger(__name__)

SLACK = 64 << 20  # side files, headers and the tokenizer
DESCRIPTION = """\
Convert released weights into a checkpoint folder that `longtake export --checkpoints FOLDER` takes.

Read are safetensors, sharded folders with an *.index.json, and .pt/.pth files, these only as plain tensors and mapped:
Wan's, diffusers', Hugging Face's and LongLive's keys, LoRA, and packed 4-bit checkpoints. Nothing is written before
every key and shape was checked.

Wan2.2-TI2V-5B takes 10.0 GB (DiT), 1.4 GB (VAE) and 11.4 GB (umT5-XXL) of disk in --out. One tensor is in memory at a
time: under 1 GB beside the mapped files (2.5 GB for a umT5 in fp32). --calibrate takes 10 GB for the weights, on
--device, and the activations of a few chunks; on a CPU at 704x1280 that is hours, on a GPU minutes.
"""


@dataclass(frozen=True)
class ConvertOptions:
    """What"""

    preset: Annotated[Preset, Text(preset_named, lambda preset: preset.name)] = option(WAN22_TI2V_5B, metavar="NAME")
    """sizes of the networks: a shipped preset, or a .yaml file"""
    dit: Path | None = option(None, metavar="PATH")
    """file or folder: the transformer, or LongLive's generator (default: none)"""
    vae: Path | None = option(None, metavar="PATH")
    """Wan2.2_VAE.pth, or diffusers' file or folder (default: none)"""
    text: Path | None = option(None, metavar="PATH")
    """models_t5_umt5-xxl-enc-bf16.pth, or Hugging Face's folder (default: none)"""
    base: Path | None = option(None, metavar="PATH")
    """weights under a --dit that holds a LoRA only (default: none)"""
    lora: Path | None = option(None, metavar="PATH")
    """a LoRA (PEFT's, kohya's or ComfyUI's keys) to merge into --dit, in fp32 (default: none)"""
    lora_scale: float | None = option(None, metavar="S")
    """what the LoRA is multiplied with (default: as adapter_config.json beside the LoRA, its header or its
    alphas say, else 1.0)"""
    use_ema: bool = option(False)
    """take generator_ema"""
    packed_rule: Annotated[str, OneOf(tuple(sorted(RULE_LIMITS)))] | None = option(None)
    """block scales of a packed --dit (default: mse)"""
    dtype: Annotated[str, OneOf(("bf16", "fp32"))] = option("bf16")
    """of the weights written"""
    instruction: Path | None = option(None, metavar="CONFIG.yaml")
    """released configuration with the lines before every prompt, of a Gemma given with --text (default: none)"""
    out: Path = option(metavar="FOLDER")
    """checkpoint folder"""
    name: str | None = option(None, metavar="NAME")
    """what the model is called, for `--model NAME` (default: as the folder --out)"""


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration: activation amax, which native W4A4, fp8 recipes and 8-bit convolutions need"""

    calibrate: bool = option(False)
    """measure it, and what the VAE's convolutions read; alone: of the models already in --out"""
    latents: Path | None = option(None, metavar="FILE")
    """tensor `latents` [B, F, C, H, W] (default: noise)"""
    chunks: int = option(2, metavar="N")
    """chunks of a clip"""
    passes: int = option(4, metavar="N")
    """clips, each with its noise levels"""
    device: str = option("cpu", metavar="NAME")
    """cpu or cuda:N"""

    @property
    def clips(self) -> dict[str, Any]:
        """What is measured and where, as the two calibrations take it."""
        device = torch.device(self.device)
        return {"device": device, "chunks": self.chunks, "passes": self.passes, "latents": self.latents}


def run(options: ConvertOptions, measure: CalibrationOptions) -> int:
    """Convert what was given, then calibrate if asked."""
    check_options(options, measure)
    options = of_the_checkpoint(options, measure)
    if options.name is not None:
        checked_name(options.name)
    require_folder(options.out)
    _claim(options, measure)
    models = list(models_from(options))
    if models:
        write(models, options.out)
    if options.text and options.preset.text.kind == "gemma2":
        lines = instruction_from_config(options.instruction) if options.instruction else ()
        KIND.write(GemmaSource(str(options.text.resolve()), lines), options.out / NAME)
        GemmaSource.find(options.out)
    elif options.text:
        carry_tokenizer(options.text if options.text.is_dir() else options.text.parent, options.out)
    for model in models:
        print(f"{options.out / model.kind}.safetensors: {len(model.tensors)} tensors, {model.nbytes / 1e9:.2f} GB")
    write_name(options.out, options.name)
    if measure.calibrate:
        calibrate(options, measure)
    elif options.dit:
        report_amax(models[0])
    return 0


def of_the_checkpoint(options: ConvertOptions, measure: CalibrationOptions) -> ConvertOptions:
    """With the preset that the DiT in --out is of, where it is calibrated alone and no other preset was asked for."""
    side = options.out / "dit.json"
    alone = measure.calibrate and not (options.dit or options.vae or options.text)
    if not alone or options.preset != WAN22_TI2V_5B or not side.is_file():
        return options
    name = SideFile.read(side).preset
    return replace(options, preset=preset_named(name)) if name in PRESETS else options


def check_options(options: ConvertOptions, measure: CalibrationOptions) -> None:
    """Raise LongtakeError for combinations that mean nothing."""
    if not (options.dit or options.vae or options.text or measure.calibrate):
        raise LongtakeError(
            "nothing to convert", expected="--dit, --vae, --text or --calibrate", fix="pass the files you have"
        )
    if (options.base or options.lora or options.use_ema) and not options.dit:
        raise LongtakeError("--base, --lora and --use-ema belong to --dit", fix="pass --dit, too")
    if options.lora_scale is not None and not options.dit:
        raise LongtakeError("--lora-scale belongs to --dit", fix="pass --dit, too")
    if measure.latents and not measure.calibrate:
        raise LongtakeError(
            "--latents are what --calibrate measures with", got="no --calibrate", fix="pass --calibrate"
        )
    if measure.chunks < 1 or measure.passes < 1:
        raise LongtakeError(
            "nothing to calibrate with", got=f"{measure.chunks} chunks, {measure.passes} passes", expected="1 or more"
        )
    if measure.calibrate and measure.device.startswith("cuda") and not torch.cuda.is_available():
        raise LongtakeError(
            "no GPU to calibrate on", got=measure.device, expected="a device that is there", fix="--device cpu"
        )


def _claim(options: ConvertOptions, measure: CalibrationOptions) -> None:
    """Refuse to write over what is read, or over files that are not ours."""
    kinds = [k for k, given in (("dit", options.dit), ("vae", options.vae), ("text_encoder", options.text)) if given]
    kinds += ["dit"] if measure.calibrate and not options.dit else []
    kinds += ["vae"] if measure.calibrate and not options.vae and (options.out / "vae.safetensors").is_file() else []
    read = {f"--{name}": getattr(options, name) for name in ("dit", "vae", "text", "base", "lora")}
    read["--latents"] = measure.latents
    places = [place for group in PLACES.values() for place in group]
    parts = {f"{name}/{place}": given / place for name, given in read.items() if given for place in places}
    claim_checkpoints(options.out, read | parts, kinds)


def models_from(options: ConvertOptions) -> Iterator[Converted]:
    """What was asked for, checked and not yet read."""
    dtype = DTYPES[options.dtype].torch
    if options.dit:
        scale = None if options.lora_scale is None else LoraScale(factor=options.lora_scale)
        model = convert_dit(
            read_container(options.dit),
            options.preset,
            dtype=dtype,
            use_ema=options.use_ema,
            base=None if options.base is None else read_container(options.base),
            lora=None if options.lora is None else read_container(options.lora),
            lora_scale=scale or stored_scale(options.lora or options.dit),
            own_scale=scale or stored_scale(options.dit),
            packed_rule=options.packed_rule,
        )
        if scale is not None and "lora" not in model.meta:
            raise LongtakeError(
                "--lora-scale without a LoRA", got=f"full weights in {options.dit}", fix="pass the LoRA with --lora"
            )
        yield _from(model, options.dit, {"base": options.base, "lora": options.lora})
    if options.vae:
        weights = read_container(options.vae, "vae")
        yield _from(convert_vae(weights, options.preset, dtype=dtype), options.vae, {})
    if options.text and options.preset.text.kind != "gemma2":
        weights = read_container(options.text, "text_encoder")
        yield _from(convert_text(weights, options.preset, dtype=dtype), options.text, {})


def write(models: list[Converted], out: Path) -> None:
    """Write each model's pair; disk space is checked for all of them first."""
    total = sum(model.nbytes for model in models)
    require_disk(out, total + SLACK)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", leave=False, dynamic_ncols=True) as bar:
        for model in models:
            model.write(out / f"{model.kind}.safetensors", bar.update)


def calibrate(options: ConvertOptions, measure: CalibrationOptions) -> None:
    """Measure and store amax of the DiT, and of the VAE's convolutions, of those that are there."""
    vae = (options.out / "vae.safetensors").is_file()
    if not vae or (options.out / "dit.safetensors").is_file():
        calibrate_dit(options, measure)
    if vae:
        calibrate_vae(options, measure)


def calibrate_vae(options: ConvertOptions, measure: CalibrationOptions) -> None:
    """Measure and store what the VAE's convolutions read; print what 8-bit codes cost its frames."""
    with tqdm(unit="clip", desc="calibrate the VAE", leave=False, dynamic_ncols=True) as bar:
        found = calibrate_vae_folder(options.preset, options.out, **measure.clips, progress=bar.update)
    counts = ", ".join(f"{count} in {codes}" for codes, count in found.counts.items())
    cost = ""
    if found.psnr_db is not None:
        cost = f"; frames at {found.psnr_db:.1f} dB against bf16, the worst at {found.worst_frame_db:.1f}"
    print(f"{options.out / 'vae.json'}: convolutions of the VAE's decoder, {counts}{cost} (recipes with vae_conv)")


def calibrate_dit(options: ConvertOptions, measure: CalibrationOptions) -> None:
    """Measure and store amax."""
    with tqdm(total=measure.passes, unit="clip", desc="calibrate", leave=False, dynamic_ncols=True) as bar:
        amax = calibrate_folder(options.preset, options.out, **measure.clips, progress=bar.update)
    inputs = [sides["input"] for sides in amax.values()]
    print(f"{options.out / 'dit.json'}: amax of {len(amax)} linears, inputs {min(inputs):.3g} to {max(inputs):.3g}")


def report_amax(model: Converted) -> None:
    """Say that the converted DiT has no activation amax, and what a packed one was packed with."""
    if packed := model.meta.get("packed"):
        print(
            f"{len(packed['amax'])} linears were packed in 4 bits by rule {packed['rule']}; they are weights again, and"
            " exports pack them by that rule and amax to the same values"
        )
    print(
        "the checkpoint has no activation amax: bf16 and w4a16 recipes need none; native W4A4 (nvfp4) and fp8 recipes use\n"
        "calibrated amax where LongLive takes each call's own. Measure it: longtake convert --calibrate --out FOLDER"
    )


def _from(model: Converted, path: Path, others: Mapping[str, Path | None]) -> Converted:
    """`model` with the names of its files in its side file."""
    files = {"file": path.name, **{name: other.name for name, other in others.items() if other}}
    source = {**model.meta["source"], **files}
    return replace(model, meta={**model.meta, "command": "longtake convert", "source": source})


COMMAND = Command(run=run, options=(ConvertOptions, CalibrationOptions), description=DESCRIPTION)
