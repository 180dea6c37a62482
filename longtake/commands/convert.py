"""`longtake convert`: released weights to our checkpoint folder, and calibration of what was converted."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.files import require_disk, require_folder
from longtake.outputs import claim_checkpoints
from longtake.plugins.nvfp4.reference import RULE_LIMITS
from longtake.training.convert.calibrate import calibrate_folder
from longtake.training.convert.files import PLACES, read_container
from longtake.training.convert.lora_scale import LoraScale, stored_scale
from longtake.training.convert.models import convert_dit, convert_text, convert_vae
from longtake.training.convert.pending import Converted
from longtake.training.models.presets import Preset, preset_named
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


def register(subparsers: Any) -> None:
    """Add the `convert` command."""
    parser = subparsers.add_parser(
        "convert", help="released weights (Wan, LongLive, diffusers) to a checkpoint folder", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", default="wan2.2-ti2v-5b", metavar="NAME", help="default: wan2.2-ti2v-5b")
    parser.add_argument(
        "--dit", type=Path, metavar="PATH", help="file or folder: the transformer, or LongLive's generator"
    )
    parser.add_argument("--vae", type=Path, metavar="PATH", help="Wan2.2_VAE.pth, or diffusers' file or folder")
    parser.add_argument(
        "--text", type=Path, metavar="PATH", help="models_t5_umt5-xxl-enc-bf16.pth, or Hugging Face's folder"
    )
    parser.add_argument("--base", type=Path, metavar="PATH", help="weights under a --dit that holds a LoRA only")
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="PATH",
        help="a LoRA (PEFT's, kohya's or ComfyUI's keys) to merge into --dit, in fp32",
    )
    parser.add_argument("--lora-scale", type=float, metavar="S",
                        help="default: as adapter_config.json beside the LoRA, its header or its alphas say, else 1.0")  # fmt: skip
    parser.add_argument("--use-ema", action="store_true", help="take generator_ema")
    parser.add_argument(
        "--packed-rule", choices=sorted(RULE_LIMITS), help="block scales of a packed --dit (default: mse)"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights written (default: bf16)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="checkpoint folder")
    group = parser.add_argument_group("calibration: activation amax, which native W4A4 and fp8 recipes need")
    group.add_argument("--calibrate", action="store_true", help="measure it; alone: of the DiT already in --out")
    group.add_argument("--latents", type=Path, metavar="FILE", help="tensor `latents` [B, F, C, H, W] (default: noise)")
    group.add_argument("--chunks", type=int, default=2, metavar="N", help="chunks of a clip (default: 2)")
    group.add_argument(
        "--passes", type=int, default=4, metavar="N", help="clips, each with its noise levels (default: 4)"
    )
    group.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda:N (default: cpu)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert what was given, then calibrate if asked."""
    preset = preset_named(args.preset)
    check_arguments(args)
    require_folder(args.out)
    _claim(args)
    models = [model for model in (dit_from(args, preset), vae_from(args, preset), text_from(args, preset)) if model]
    if models:
        write(models, args.out)
    if args.text:
        carry_tokenizer(args.text if args.text.is_dir() else args.text.parent, args.out)
    for model in models:
        print(f"{args.out / model.kind}.safetensors: {len(model.tensors)} tensors, {model.nbytes / 1e9:.2f} GB")
    if args.calibrate:
        calibrate(args, preset)
    elif args.dit:
        report_amax(models[0])
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise LongtakeError for combinations that mean nothing."""
    if not (args.dit or args.vae or args.text or args.calibrate):
        raise LongtakeError(
            "nothing to convert", expected="--dit, --vae, --text or --calibrate", fix="pass the files you have"
        )
    if (args.base or args.lora or args.use_ema) and not args.dit:
        raise LongtakeError("--base, --lora and --use-ema belong to --dit", fix="pass --dit, too")
    if args.chunks < 1 or args.passes < 1:
        raise LongtakeError(
            "nothing to calibrate with", got=f"{args.chunks} chunks, {args.passes} passes", expected="1 or more"
        )
    if args.calibrate and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise LongtakeError(
            "no GPU to calibrate on", got=args.device, expected="a device that is there", fix="--device cpu"
        )


def _claim(args: argparse.Namespace) -> None:
    """Refuse to write over what is read, or over files that are not ours."""
    kinds = [kind for kind, given in (("dit", args.dit), ("vae", args.vae), ("text_encoder", args.text)) if given]
    kinds += ["dit"] if args.calibrate and not args.dit else []
    read = {f"--{name}": getattr(args, name) for name in ("dit", "vae", "text", "base", "lora", "latents")}
    parts = {
        f"{name}/{place}": given / place
        for name, given in read.items()
        if given
        for places in PLACES.values()
        for place in places
    }
    claim_checkpoints(args.out, read | parts, kinds)


def dit_from(args: argparse.Namespace, preset: Preset) -> Converted | None:
    """The DiT that was asked for, checked and not yet read."""
    if not args.dit:
        return None
    base = None if args.base is None else read_container(args.base)
    lora = None if args.lora is None else read_container(args.lora)
    given = None if args.lora_scale is None else LoraScale(factor=args.lora_scale)
    model = convert_dit(
        read_container(args.dit), preset, dtype=DTYPES[args.dtype].torch, use_ema=args.use_ema, base=base, lora=lora,
        lora_scale=given or stored_scale(args.lora or args.dit), own_scale=given or stored_scale(args.dit), packed_rule=args.packed_rule,
    )  # fmt: skip
    return _from(model, args.dit, {"base": args.base, "lora": args.lora})


def vae_from(args: argparse.Namespace, preset: Preset) -> Converted | None:
    """The VAE that was asked for."""
    if not args.vae:
        return None
    return _from(convert_vae(read_container(args.vae, "vae"), preset, dtype=DTYPES[args.dtype].torch), args.vae)


def text_from(args: argparse.Namespace, preset: Preset) -> Converted | None:
    """The text encoder that was asked for."""
    if not args.text:
        return None
    return _from(
        convert_text(read_container(args.text, "text_encoder"), preset, dtype=DTYPES[args.dtype].torch), args.text
    )


def write(models: list[Converted], out: Path) -> None:
    """Write each model's pair; disk space is checked for all of them first."""
    total = sum(model.nbytes for model in models)
    require_disk(out, total + SLACK)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", leave=False, dynamic_ncols=True) as bar:
        for model in models:
            model.write(out / f"{model.kind}.safetensors", bar.update)


def calibrate(args: argparse.Namespace, preset: Preset) -> None:
    """Measure and store amax."""
    with tqdm(total=args.passes, unit="clip", desc="calibrate", leave=False, dynamic_ncols=True) as bar:
        amax = calibrate_folder(
            preset, args.out, device=torch.device(args.device), chunks=args.chunks, passes=args.passes,
            latents=args.latents, progress=bar.update,
        )  # fmt: skip
    inputs = [sides["input"] for sides in amax.values()]
    print(f"{args.out / 'dit.json'}: amax of {len(amax)} linears, inputs {min(inputs):.3g} to {max(inputs):.3g}")


def report_amax(model: Converted) -> None:
    """Say that the converted DiT has no activation amax, and what a packed one was packed with."""
    if packed := model.meta.get("packed"):
        print(f"{len(packed['amax'])} linears were packed in 4 bits by rule {packed['rule']}; they are weights again, and"
              " exports pack them by that rule and amax to the same values")  # fmt: skip
    print("the checkpoint has no activation amax: bf16 and w4a16 recipes need none; native W4A4 (nvfp4) and fp8 recipes use\n"
          "calibrated amax where LongLive takes each call's own. Measure it: longtake convert --calibrate --out FOLDER")  # fmt: skip


def _from(model: Converted, path: Path, others: Mapping[str, Path | None] | None = None) -> Converted:
    """`model` with the names of its files in its side file."""
    files = {"file": path.name, **{name: other.name for name, other in (others or {}).items() if other}}
    return replace(
        model, meta={**model.meta, "command": "longtake convert", "source": {**model.meta["source"], **files}}
    )
