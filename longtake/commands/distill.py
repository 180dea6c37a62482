"""`longtake distill`: a student of a few steps from a teacher-forced model."""

from __future__ import annotations

from dataclasses import replace

import torch

from longtake.commands.run_files import RUNS
from longtake.commands.training_run import WhereOptions, conclude, train_config
from longtake.devices import device_named
from longtake.options import Command
from longtake.outputs import claim_checkpoints
from longtake.training.data.named import require_dataset
from longtake.training.distill.options import DistillOptimizers, DistillOptions
from longtake.training.models.families import family_of
from longtake.training.models.quantize import modelopt
from longtake.training.options import RunOptions
from longtake.training.parts import source_of
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


def run(where: WhereOptions, how: RunOptions, options: DistillOptions, optimizers: DistillOptimizers) -> int:
    """Distil as told; returns the exit code."""
    optimizer = optimizers.student(options.preset, lora=bool(options.lora_rank))
    config = train_config(how, options.preset, optimizer, where, options, optimizers)
    config = replace(config, source=source_of("dit", options.student or options.teacher))
    world = "camera" in family_of(options.preset).can
    if world:
        from longtake.training.distill.world_stage import require_world_student

        require_world_student(options, how.sample_steps)
    if where.dry_run:
        return describe(options, config)
    from longtake.training.distill.stage import DistillStage
    from longtake.training.distill.trainer import DistillTrainer
    from longtake.training.distill.world_stage import WorldDistillStage

    if config.resume:
        require_resume_point(config.out)
    require_dataset(options.data)
    vae = options.vae and options.vae / "vae.safetensors"
    read = {"--teacher": options.teacher, "--student": options.student, "--vae": vae}
    claim_checkpoints(config.out, read, ("dit",))
    modelopt()  # measures amax at the end: what is missing is said now
    torch.manual_seed(how.seed)
    device = device_named(where.device)
    stage = WorldDistillStage(options) if world else DistillStage(options)
    student = f"{options.student_steps} steps"
    print(f"distilling {options.teacher} to {student} on {device} for {config.steps} steps, into {config.out}")
    if stage.line:
        print(stage.line)
    metrics = DistillTrainer(stage, config, optimizers.critic(options.preset), device).fit()
    conclude([config.out / "dit.safetensors"], metrics, f", sampled with {student} and guidance 1", where.name)
    return 0


def describe(options: DistillOptions, config: TrainConfig) -> int:
    """Print what a step does, without weights."""
    preset, rank = options.preset, options.lora_rank
    family = family_of(preset)
    with torch.device("meta"):
        dit = family.dit(preset)
    weights = sum(parameter.numel() for parameter in dit.parameters())
    linears = [dit.get_submodule(name) for name in family.linears(dit)]
    trained = sum(rank * (x.in_features + x.out_features) for x in linears) if rank else weights  # type: ignore[operator, misc]
    chunks = options.longest
    passes = chunks * options.student_steps + chunks - 1
    copies = 1 if rank else 3
    memory = 4 * (copies * weights + (2 if rank else 0) * trained + 2 * 3 * trained + trained)
    for line in (
        f"a DiT: {weights:,} parameters; student and critic train {trained:,} each"
        + (f" (LoRA of rank {rank} on {len(linears)} linears, one frozen base)" if rank else " (three copies)"),
        f"latents of a step{f' (in {options.accumulate} parts)' if options.accumulate > 1 else ''}: "
        f"{[options.accumulate * options.batch, preset.first_frame(chunks), preset.dit.channels, *preset.latent_hw]}",
        f"a rollout: up to {passes} passes over {preset.chunk_tokens} tokens x {options.batch}, "
        f"{max(options.chunks)} of them with a gradient in the student's update",
        f"the student's update (1 step in {options.critic_updates}): a rollout, 3 score passes; the critic's: a rollout, 1 pass",
        f"weights, gradients, AdamW and EMA in fp32: {memory / 1e9:.3g} GB, activations besides",
        f"student: {options.student_steps} steps, guidance 1; lr {config.optimizer.lr:g}; nothing was trained",
    ):
        print(line)
    return 0


COMMAND = Command(
    run, (WhereOptions, RunOptions, DistillOptions, DistillOptimizers), DESCRIPTION, EPILOG, runs=RUNS / "distill"
)
