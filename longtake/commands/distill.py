"""`longtake distill`: a student of a few steps from a teacher-forced model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from longtake.commands.options_file import RecipeOptions
from longtake.commands.run_options import add_saving, chunk_choices, train_config
from longtake.errors import LongtakeError
from longtake.outputs import claim_checkpoints
from longtake.training.devices import device_named
from longtake.training.distill.options import DistillOptions
from longtake.training.distill.scores import CONTEXTS
from longtake.training.models.presets import PRESETS, Preset, preset_named
from longtake.training.models.quantize import RULES
from longtake.training.optimizer import OptimizerConfig
from longtake.training.resume import require_resume_point
from longtake.training.trainer import TrainConfig

DESCRIPTION = """Distil a model that was trained by teacher forcing (`longtake train --stage dit`) into one that needs
4 or 2 denoise steps a chunk and no guidance: distribution matching (DMD).

The student generates stories of its own by the rules of `longtake generate` (window, sinks, cuts, 4-bit cache). Two
more networks look at them noised: the real score (the teacher, guided) and the fake score (the critic, trained on what
the student makes). Where they differ is where the student has to go. The critic learns in every step, the student in
every fifth.

--out holds dit.safetensors and dit.json, with copies of the text encoder and the VAE: a folder that `longtake export
--checkpoints` takes. dit.json says how the student is sampled. With --lora-rank the LoRA is merged into the weights
before they are quantized for export, and is kept by itself in dit_lora.safetensors, too."""

EPILOG = """examples:
  longtake distill --teacher training/checkpoints/tiny --student-steps 4 --precision nvfp4 --out runs/four
  longtake distill --teacher runs/dit4 --student-steps 2 --lora-rank 32 --steps 3000 --out runs/two
  longtake distill --teacher runs/dit4 --i2v --out runs/pictures          (each video's first frame is given)
  longtake export --recipe tiny_nvfp4_sm120 --checkpoints runs/four
"""

RATES = {"tiny": (1e-4, 1e-4)}  # learning rates of student and critic; the reference's for all other presets
REFERENCE_RATES = (1e-5, 2e-6)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `distill` to the command line."""
    parser = subparsers.add_parser(
        "distill",
        help="distil a trained DiT to 4 or 2 denoise steps",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_what(parser.add_argument_group("what"))
    add_method(parser.add_argument_group("method"))
    add_optimizer(parser.add_argument_group("optimizers"))
    add_saving(parser.add_argument_group("how long, and what is kept"))
    options = RecipeOptions(parser, "distill", required=("teacher", "out"))
    parser.set_defaults(run=lambda args: run(options.complete(args)))


def add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--init", "--teacher", type=Path, dest="teacher", metavar="FOLDER",
                       help="checkpoints of the trained model: dit and text_encoder")  # fmt: skip
    group.add_argument("--steps-of-student", "--student-steps", type=int, default=4, dest="student_steps", metavar="N",
                       help="denoise steps a chunk of the student (default 4)")  # fmt: skip
    group.add_argument("--out", type=Path, help="folder for checkpoints and curves")
    group.add_argument("--data", default="digits", help='"digits" or "returning-digits" (need no download) or a folder of clips, for prompts, '
                       "cuts and given frames")  # fmt: skip
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep encoded stories and the embeddings of prompts "
                       "there, as `longtake train` does, instead of in memory")  # fmt: skip
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode clips for --cache-dir"
    )
    group.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    group.add_argument(
        "--vae", type=Path, help="folder of the frozen VAE (default: beside the teacher, else the shipped one)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    group.add_argument("--fp32", action="store_true", help="compute in fp32 on the GPU too (default there: bf16)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--dry-run", action="store_true", help="print sizes and passes of a step, and stop")


def add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch", type=int, default=8, help="stories generated a step (default 8)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N",
                       help="a step's batch is N times --batch, computed in N parts whose gradients add up (default 1)")  # fmt: skip
    group.add_argument("--stories", type=int, default=512, help="stories whose prompts are drawn from (default 512)")
    group.add_argument("--chunks", default="4", metavar="N..M", help="length of a story in chunks, drawn for every step: "
                       "N, N..M or a list (default 4; longer ones also train the sinks)")  # fmt: skip
    group.add_argument("--guidance", type=float, default=3.0, metavar="S",
                       help="of the real score: c + S (c - u), which is 1 + S as `generate` counts it (default 3)")  # fmt: skip
    group.add_argument("--critic-updates", type=int, default=5, metavar="N", help="for one of the student (default 5)")
    group.add_argument("--score-context", default="clean", choices=CONTEXTS,
                       help="scores see a noised chunk after the student's clean chunks, as the teacher was trained "
                       "(default), or all chunks noised alike, as in the reference")  # fmt: skip
    group.add_argument("--cache", default="nvfp4", choices=("nvfp4", "bf16"),
                       help="K/V cache of the student's stories: 4 bits as engines keep it (default), or unquantized")  # fmt: skip
    group.add_argument("--i2v", action="store_true", help="give each video's first latent frame (image to video)")
    group.add_argument("--lora-rank", type=int, default=0, metavar="R",
                       help="train LoRA of this rank for student and critic on one frozen base: a third of the weights' "
                       "memory (default 0: all weights)")  # fmt: skip
    group.add_argument("--lora-alpha", type=float, metavar="A", help="LoRA's scale is A / R (default: A = R)")
    group.add_argument("--precision", default="bf16", choices=("bf16", "nvfp4"),
                       help="nvfp4: W4A4 fake-quant of the student in the loop, with LoRA of the shared base")  # fmt: skip
    group.add_argument("--nvfp4-rules", default="static_6", choices=sorted(RULES), help="nvfp4: rules of block scales")
    group.add_argument("--recalibrate", type=int, default=100, metavar="N", help="nvfp4: refresh amax every N steps")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute blocks again in the backward pass"
    )
    group.add_argument("--no-graph", action="store_true", help="GPU: launch every kernel by itself (no CUDA graph)")


def add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", type=float, help="of the student (default 1e-4 for tiny, else 1e-5)")
    group.add_argument("--critic-lr", type=float, help="of the critic (default 1e-4 for tiny, else 2e-6)")
    group.add_argument("--betas", type=float, nargs=2, default=(0.0, 0.999), metavar=("B1", "B2"))
    group.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up, then cosine decay")
    group.add_argument("--final-lr", type=float, default=1.0, metavar="F", help="decay to F x lr (default 1: constant)")
    group.add_argument("--clip", type=float, default=10.0, help="largest gradient norm")
    group.add_argument("--ema", type=float, help="decay of the student's averaged weights (default 0.99; with LoRA 0)")


def run(args: argparse.Namespace) -> int:
    """Distil as told; returns the exit code."""
    preset = preset_named(args.preset)
    options, config = options_from(args, preset), train_config(args, optimizer_from(args))
    if args.dry_run:
        return describe(options, config)
    from longtake.training.distill.stage import DistillStage
    from longtake.training.distill.trainer import DistillTrainer

    if config.resume:
        require_resume_point(config.out)
    claim_checkpoints(
        config.out, {"--teacher": args.teacher, "--vae": args.vae and args.vae / "vae.safetensors"}, ("dit",)
    )
    torch.manual_seed(args.seed)
    device = device_named(args.device)
    stage = DistillStage(options)
    print(
        f"distilling {args.teacher} to {args.student_steps} steps on {device} for {args.steps} steps, into {args.out}"
    )
    metrics = DistillTrainer(stage, config, optimizer_from(args, critic=True), device).fit()
    print(f"wrote {args.out / 'dit'}.safetensors, sampled with {args.student_steps} steps and guidance 1")
    print("held out: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
    return 0


def options_from(args: argparse.Namespace, preset: Preset) -> DistillOptions:
    """What the command line says to the stage."""
    if args.lora_alpha is not None and not args.lora_rank:
        raise LongtakeError("--lora-alpha without LoRA", got=args.lora_alpha, fix="pass --lora-rank 128, too")
    return DistillOptions(
        preset=preset,
        teacher=args.teacher,
        student_steps=args.student_steps,
        data=args.data,
        batch=args.batch,
        chunks=chunk_choices(args.chunks),
        stories=args.stories,
        guidance=args.guidance,
        ratio=args.critic_updates,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        precision=args.precision,
        rules=RULES[args.nvfp4_rules],
        recalibrate=args.recalibrate,
        cache=args.cache,
        score_context=args.score_context,
        i2v=args.i2v,
        vae=args.vae,
        seed=args.seed,
        amp=not args.fp32,
        gradient_checkpointing=args.gradient_checkpointing,
        accumulate=args.accumulate,
        cache_dir=args.cache_dir,
        workers=args.workers,
        graph=not args.no_graph,
    )


def optimizer_from(args: argparse.Namespace, critic: bool = False) -> OptimizerConfig:
    """The student's optimizer, or the critic's, which keeps no average."""
    rates = RATES.get(args.preset, REFERENCE_RATES)
    given = args.critic_lr if critic else args.lr
    ema = 0.0 if critic or args.lora_rank else 0.99
    return OptimizerConfig(
        lr=rates[critic] if given is None else given,
        betas=tuple(args.betas),
        clip=args.clip,
        warmup=args.warmup,
        final_lr=args.final_lr,
        ema=ema if critic or args.ema is None else args.ema,
    )


def describe(options: DistillOptions, config: TrainConfig) -> int:
    """Print what a step does, without weights."""
    from longtake.training.models.wan.dit import CausalDiT
    from longtake.training.models.wan.linears import quantized_linears

    preset, rank = options.preset, options.lora_rank
    with torch.device("meta"):
        dit = CausalDiT(preset.dit)
    weights = sum(parameter.numel() for parameter in dit.parameters())
    linears = [dit.get_submodule(name) for name in quantized_linears(dit)]
    trained = sum(rank * (x.in_features + x.out_features) for x in linears) if rank else weights  # type: ignore[operator, misc]
    chunks = max(options.chunks)
    passes = chunks * options.student_steps + chunks - 1
    copies = 1 if rank else 3
    memory = 4 * (copies * weights + (2 if rank else 0) * trained + 2 * 3 * trained + trained)
    for line in (
        f"a DiT: {weights:,} parameters; student and critic train {trained:,} each"
        + (f" (LoRA of rank {rank} on {len(linears)} linears, one frozen base)" if rank else " (three copies)"),
        f"latents of a step{f' (in {options.accumulate} parts)' if options.accumulate > 1 else ''}: "
        f"{[options.accumulate * options.batch, chunks * preset.chunk_latents, preset.dit.channels, *preset.latent_hw]}",
        f"a rollout: up to {passes} passes over {preset.chunk_tokens} tokens x {options.batch}, "
        f"{chunks} of them with a gradient in the student's update",
        f"the student's update (1 step in {options.ratio}): a rollout, 3 score passes; the critic's: a rollout, 1 pass",
        f"weights, gradients, AdamW and EMA in fp32: {memory / 1e9:.3g} GB, activations besides",
        f"student: {options.student_steps} steps, guidance 1; lr {config.optimizer.lr:g}; nothing was trained",
    ):
        print(line)
    return 0
