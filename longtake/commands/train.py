"""`longtake train`: train the VAE or the DiT (with its text encoder) from clips."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from longtake.commands.options_file import RecipeOptions
from longtake.commands.run_options import add_saving, chunk_choices, train_config
from longtake.errors import LongtakeError
from longtake.outputs import claim_checkpoints
from longtake.plugins.nvfp4.reference import RULE_LIMITS
from longtake.training.devices import device_named
from longtake.training.models.presets import PRESETS, preset_named
from longtake.training.models.quantize import RULES, Rules
from longtake.training.objective.error_recycling import RecyclingConfig
from longtake.training.objective.noise import WEIGHTINGS
from longtake.training.optimizer import OptimizerConfig
from longtake.training.parallel.ranks import started_by_torchrun
from longtake.training.resume import require_resume_point
from longtake.training.stages.base import Stage, StageOptions
from longtake.training.trainer import TrainConfig, Trainer

STAGES = ("vae", "dit")
DESCRIPTION = """Train one stage and leave safetensors checkpoints (the averaged weights) in --out.

  --stage vae   the causal video VAE: clips to latents and back
  --stage dit   the causal DiT and the text encoder, by teacher forcing on latents of a frozen VAE;
                --precision nvfp4 trains it with the 4-bit weights and activations it will run with

Beside the checkpoints: loss.json and loss.png, TensorBoard scalars, and resume points. Ctrl-C saves a resume
point; the same command with --resume goes on from there."""

EPILOG = """examples:
  longtake train --stage vae --data digits --steps 20000 --batch 8 --out runs/vae
  longtake train --stage dit --data digits --vae runs/vae --steps 30000 --batch 32 --out runs/dit
  longtake train --stage dit --init runs/dit --precision nvfp4 --lr 1e-4 --steps 3000 --batch 32 --out runs/dit4
  longtake train --stage dit --data my_clips --init runs/dit --steps 2000 --out runs/mine
                                 (my_clips/video/<sample>/<n>.mp4, my_clips/caption/<sample>/<n>.json)
  tensorboard --logdir runs
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train the VAE or the DiT, in bf16 or under NVFP4",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_what(parser.add_argument_group("what"))
    add_vae(parser.add_argument_group("stage vae"))
    add_dit(parser.add_argument_group("stage dit"))
    add_optimizer(parser.add_argument_group("optimizer"))
    add_data(parser.add_argument_group("data at scale"))
    add_ranks(parser.add_argument_group("several GPUs (torchrun -m longtake train ...; docs/multi-gpu.md)"))
    add_saving(parser.add_argument_group("how long, and what is kept"))
    options = RecipeOptions(parser, "train", required=("stage", "out"))
    parser.set_defaults(run=lambda args: run(options.complete(args)))


def add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stage", choices=STAGES, help="what is trained: " + " or ".join(STAGES))
    group.add_argument("--data", default="digits", help='"digits" (needs no download), "returning-digits" (prompts leave '
                       "the colours of known subjects to the past) or a folder of clips")  # fmt: skip
    group.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    group.add_argument("--out", type=Path, help="folder for checkpoints and curves")
    group.add_argument("--init", type=Path, help="folder of checkpoints to start from (default: random weights)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    group.add_argument("--fp32", action="store_true", help="compute in fp32 on the GPU too (default there: bf16)")
    group.add_argument("--cpu-bf16", action="store_true", help="compute in bf16 on the CPU, too (default there: fp32)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--dry-run", action="store_true", help="print sizes, shapes, memory and cost, and stop")


def add_dit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision", default="bf16", choices=("bf16", "nvfp4"), help="nvfp4: W4A4 fake-quant in the loop"
    )
    group.add_argument(
        "--vae", type=Path, help="folder of the frozen VAE (default: beside --init, else the shipped one)"
    )
    group.add_argument(
        "--max-chunks-per-shot",
        type=int,
        default=0,
        metavar="N",
        help="folders: a clip that fills more than N chunks in a row is cut there into shots (default 0: never)",
    )
    group.add_argument("--stories", type=int, default=6000, help="stories encoded into the latent cache (default 6000)")
    group.add_argument(
        "--chunks",
        default="4..6",
        metavar="N..M",
        help="length of a story in chunks, drawn for every step: N, N..M or a list such as 1,1,5 (default 4..6); "
        "short ones come in larger batches, so that every step has about as many chunks",
    )
    group.add_argument(
        "--context",
        default="full",
        choices=("full", "window"),
        help="history a chunk attends to: all of it, as in the reference, or the runtime's window of sinks and "
        "previous chunk, with the shot offset of the rotary positions",
    )
    group.add_argument(
        "--loss-weighting",
        default="bell",
        choices=WEIGHTINGS,
        help="weight of a noise level in the loss: the reference's bell, nearly 0 at pure noise (default), or uniform, "
        "with which a model trained from random weights learns to follow its prompt sooner",
    )
    group.add_argument("--recalibrate", type=int, default=100, metavar="N", help="nvfp4: refresh amax every N steps")
    group.add_argument(
        "--nvfp4-rules",
        default="static_6",
        choices=sorted(RULES),
        help="nvfp4: rules of the block scales, those of engines (static_6, default) or of LongLive's stages, whose "
        "activations by mse no TensorRT engine has",
    )
    group.add_argument(
        "--weight-rule",
        choices=sorted(RULE_LIMITS),
        help="nvfp4: another rule for the weights; exports pack them by it",
    )
    group.add_argument(
        "--weight-scales", choices=("1d", "2d"), help="nvfp4: 2d: a scale for 16 x 16 weights, alike in W and W^T"
    )
    group.add_argument(
        "--quantize-gradients",
        action="store_true",
        help="nvfp4: gradients in 4 bits, too, with stochastic rounding; an emulation, which is slower than without",
    )
    group.add_argument(
        "--i2v",
        type=float,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="share of samples trained as image to video: first frame given, and not in the loss (alone: 1; default 0)",
    )
    group.add_argument(
        "--error-recycling",
        action="store_true",
        help="add the model's errors of earlier steps to the noise, to what is noised and to the clean history",
    )
    group.add_argument(
        "--error-capacity",
        type=int,
        default=RecyclingConfig().capacity,
        metavar="N",
        help="errors of a chunk kept for each of 50 noise levels (default 500; at 704x1280 all together 135 GB)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute each block again in the backward pass: the same gradients from less memory and a third more work",
    )
    group.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "flex", "blocks"),
        help="FlexAttention, or block by block; auto (default): the former on a GPU for 8,192 tokens or more",
    )
    group.add_argument("--no-graph", action="store_true", help="GPU: launch every kernel by itself (no CUDA graph)")
    group.add_argument(
        "--freeze-text", action="store_true", help="don't train the text encoder (a released one never is)"
    )
    group.add_argument("--text-dropout", type=float, default=0.1, help="share of samples trained without a prompt")


def add_vae(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--decoder-only",
        action="store_true",
        help="leave the encoder and the latents' statistics as they are, so that a DiT trained on them still fits",
    )


def add_optimizer(group: argparse._ArgumentGroup) -> None:
    default = OptimizerConfig()
    group.add_argument("--batch", type=int, default=8, help="clips (vae) or longest stories (dit) a step (default 8)")
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="a step's batch is N times --batch, computed in N parts whose gradients add up (default 1)",
    )
    group.add_argument("--lr", type=float, default=default.lr)
    group.add_argument("--betas", type=float, nargs=2, default=default.betas, metavar=("B1", "B2"))
    group.add_argument("--weight-decay", type=float, default=default.weight_decay)
    group.add_argument("--warmup", type=int, default=default.warmup, help="steps of linear warm-up, then cosine decay")
    group.add_argument(
        "--final-lr", type=float, default=default.final_lr, metavar="F", help="decay to F x lr; 1 keeps it constant"
    )
    group.add_argument("--clip", type=float, default=default.clip, help="largest gradient norm")
    group.add_argument("--ema", type=float, default=default.ema, help="decay of the averaged weights")


def add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="stage dit: keep the encoded stories there instead of in memory (they are taken in epochs, each once), and "
        "the embeddings of prompts where the text encoder is frozen",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that decode and read ahead (same order for any N)",
    )
    group.add_argument(
        "--max-bad-share",
        type=float,
        default=0.5,
        metavar="S",
        help="folders: stop when more than this share of the clips cannot be used (default 0.5; skipped ones are named)",
    )


def add_ranks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sequence-parallel",
        type=int,
        default=1,
        metavar="N",
        help="stage dit: ranks that share a sample's tokens; groups of N ranks share a batch (default 1)",
    )
    group.add_argument(
        "--sp-mode",
        default="balanced",
        choices=("balanced", "naive"),
        help="each rank holds clean and noisy half of the same chunks (default), or all clean ones stand before all "
        "noisy ones and are cut into parts",
    )


def run(args: argparse.Namespace) -> int:
    """Train as told; returns the exit code."""
    config = config_from(args)
    if config.resume:
        require_resume_point(config.out)
    if args.dry_run:
        return show_costs(args.stage, options_from(args))
    kinds = ("vae",) if args.stage == "vae" else ("dit", "text_encoder")
    claim_checkpoints(args.out, {"--init": args.init, "--vae": args.vae and args.vae / "vae.safetensors"}, kinds)
    if args.sequence_parallel != 1 or started_by_torchrun():
        from longtake.commands.train_parallel import run_parallel

        return run_parallel(args, config, options_from(args), device_named(args.device))
    torch.manual_seed(args.seed)
    stage = stage_from(args)
    device = device_named(args.device)
    print(f"training {args.stage} of preset {args.preset} on {device} for {args.steps} steps, into {args.out}")
    metrics = Trainer(stage, config, device).fit()
    for name in stage.modules:
        print(f"wrote {args.out / name}.safetensors")
    print("held out: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
    return 0


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The loop's settings from the command line."""
    optimizer = OptimizerConfig(
        lr=args.lr,
        betas=tuple(args.betas),
        weight_decay=args.weight_decay,
        clip=args.clip,
        warmup=args.warmup,
        final_lr=args.final_lr,
        ema=args.ema,
    )
    return train_config(args, optimizer)


def stage_from(args: argparse.Namespace) -> Stage:
    """The stage named on the command line."""
    from longtake.training.stages import dit, vae

    return {"dit": dit, "vae": vae}[args.stage].stage_from_options(options_from(args))


def options_from(args: argparse.Namespace) -> StageOptions:
    """What the command line says to a stage."""
    if args.batch < 1:
        raise LongtakeError("bad batch size", got=args.batch, expected="at least 1", fix="--batch 8")
    if args.max_chunks_per_shot < 0:
        raise LongtakeError(
            "bad --max-chunks-per-shot", got=args.max_chunks_per_shot, expected="0 (never) or more", fix="leave it out"
        )
    return StageOptions(
        preset=preset_named(args.preset),
        data=args.data,
        batch=args.batch,
        precision=args.precision,
        amp=not args.fp32,
        init=args.init,
        vae=args.vae,
        seed=args.seed,
        max_chunks_per_shot=args.max_chunks_per_shot,
        stories=args.stories,
        chunks=chunk_choices(args.chunks),
        context=args.context,
        recalibrate=args.recalibrate,
        text_dropout=args.text_dropout,
        loss_weighting=args.loss_weighting,
        graph=not args.no_graph,
        cpu_bf16=args.cpu_bf16,
        decoder_only=args.decoder_only,
        cache_dir=args.cache_dir,
        workers=args.workers,
        max_bad_share=args.max_bad_share,
        i2v=args.i2v,
        recycling=RecyclingConfig(capacity=args.error_capacity) if args.error_recycling else None,
        gradient_checkpointing=args.gradient_checkpointing,
        attention=args.attention,
        rules=rules_from(args),
        quantize_gradients=args.quantize_gradients,
        freeze_text=args.freeze_text,
        accumulate=args.accumulate,
    )


def rules_from(args: argparse.Namespace) -> Rules:
    """NVFP4 rules by name, with what overrides them."""
    rules = RULES[args.nvfp4_rules]
    rule, scales = args.weight_rule or rules.weight.rule, args.weight_scales
    tiles = rules.weight.block_2d if scales is None else scales == "2d"
    return replace(rules, weight=replace(rules.weight, rule=rule, block_2d=tiles))


def show_costs(stage: str, options: StageOptions) -> int:
    """Print what a step takes, without making anything."""
    from longtake.training.dry_run import describe

    print("\n".join(describe(stage, options)))
    return 0
