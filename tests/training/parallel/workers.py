"""Ranks for tests: `python workers.py JOB RANKS FOLDER` imports once, forks a process a rank, and runs a job in each.

Rank 0 leaves what it found in FOLDER/result.json. Not a test itself: the tests beside it start it (`started`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longtake.training.models.presets import TINY, DiTConfig, TextEncoderConfig
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.window import full_history, shot_offsets, window_history
from longtake.training.objective.error_recycling import RecyclingConfig
from longtake.training.objective.teacher_forcing import Clips, Noise, draw_noise, flow_loss, predict_velocity
from longtake.training.optimizer import OptimizerConfig
from longtake.training.parallel.forcing import attention, part_loss, part_of, part_velocity, whole_velocity
from longtake.training.parallel.layout import Layout
from longtake.training.parallel.ranks import Ranks, join_ranks, ranks_of
from longtake.training.parallel.sharding import shard, shard_dit, whole
from longtake.training.parallel.stage import ParallelDiTStage
from longtake.training.parallel.trainer import ParallelTrainer, records_of
from longtake.training.stages.options import StageOptions
from longtake.training.trainer import TrainConfig

CHUNKS, SAMPLES = 4, 2
PRESET = replace(
    TINY,
    name="few tokens",
    dit=DiTConfig(dim=64, ffn_dim=96, layers=2, heads=4, channels=16, text_dim=32, text_len=32),
    text=TextEncoderConfig(kind="words", dim=32, layers=1, heads=2, length=32),
    height=64,
    width=64,
    chunk_latents=2,
)


def models() -> dict[str, nn.Module]:
    """The same random ones on every rank; a head that isn't zero, so that every weight has a gradient."""
    torch.manual_seed(0)
    dit = CausalDiT(PRESET.dit)
    nn.init.normal_(dit.head.head.weight, std=0.1)
    return {"dit": dit, "text": text_encoder_for(PRESET)}


def batch(context: str) -> tuple[Clips, Noise]:
    """Two stories with all history, or with the runtime's window, cuts, given and padding frames."""
    generator = torch.Generator().manual_seed(1)
    frames = CHUNKS * PRESET.chunk_latents
    latents = torch.randn(SAMPLES, frames, 16, *PRESET.latent_hw, generator=generator)
    tokens = torch.randint(2, 20, (SAMPLES, CHUNKS, 32), generator=generator, dtype=torch.int32)
    clips = Clips(latents, tokens, full_history(CHUNKS), CHUNKS)
    if context == "window":
        cuts = [[chunk in (1, 3) for chunk in range(CHUNKS)], [chunk == 2 for chunk in range(CHUNKS)]]
        given, valid = torch.zeros(SAMPLES, frames, dtype=torch.bool), torch.ones(SAMPLES, frames, dtype=torch.bool)
        given[0, 0], valid[1, -3:] = True, False
        history = torch.stack([window_history(row, window=3) for row in cuts])
        offsets = torch.tensor([shot_offsets(row, 8) for row in cuts])
        clips = Clips(latents, tokens, history, 3, offsets, given, valid)
    return clips, draw_noise(clips, 5.0, generator)


def on_one_rank(context: str, checkpointing: bool) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Velocity, weighted and plain loss, and gradients as `teacher_forcing` has them."""
    parts, (clips, noise) = models(), batch(context)
    parts["dit"].checkpointing = checkpointing
    embeddings = parts["text"](clips.tokens.flatten(0, 1)).unflatten(0, clips.tokens.shape[:2])
    velocity = predict_velocity(parts["dit"], PRESET, embeddings, clips, noise)  # type: ignore[arg-type]
    losses = flow_loss(velocity, clips, noise)
    losses[0].backward()
    return velocity.detach(), [x.item() for x in losses], gradients(parts)


def gradients(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{owner}/{n}": whole(p.grad) for owner, m in parts.items() for n, p in m.named_parameters()}


def on_many_ranks(ranks: Ranks, mode: str, context: str) -> tuple[Tensor | None, list[float], dict[str, Tensor]]:
    """The same of all ranks together; the velocity where one group has the whole batch."""
    parts, (clips, noise), frames = models(), batch(context), PRESET.chunk_latents
    parts["dit"].checkpointing = mode == "balanced"
    shard_dit(parts["dit"], ranks)  # type: ignore[arg-type]
    shard(parts["text"], ranks)
    rows = torch.arange(SAMPLES).tensor_split(ranks.groups)[ranks.my_group]
    pick = {name: None if (x := getattr(clips, name)) is None else x[rows] for name in ("offsets", "given", "valid")}
    history = clips.history[rows] if clips.history.dim() == 3 else clips.history
    clips = replace(clips, latents=clips.latents[rows], tokens=clips.tokens[rows], history=history, **pick)
    noise = Noise(noise.eps[rows], noise.levels[rows])
    layout = Layout(mode, CHUNKS, ranks.sequence)
    part = part_of(clips, noise, layout, ranks.place, frames)
    attend = attention(layout, clips.history, ranks.group)
    velocity = part_velocity(parts["dit"], PRESET, parts["text"], part, attend)  # type: ignore[arg-type]
    losses = part_loss(velocity, clips, noise, layout, ranks, frames)
    losses[0].backward()
    put = whole_velocity(velocity, layout, ranks, frames)
    return put if ranks.groups == 1 else None, [x.item() for x in losses], gradients(parts)


def equality(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Errors of every mode, context and shape against one rank."""
    found: dict[str, Any] = {}
    shapes = [(ranks.world, ranks.world)] if ranks.world == 2 else [(4, 4), (2, 4), (2, 2), (1, 4)]
    for context in ("full", "window"):
        wanted = on_one_rank(context, checkpointing=False)
        total = torch.stack([g.norm() for g in wanted[2].values()]).norm()
        for sequence, host in shapes:
            shape = ranks_of("cpu", ranks.rank, ranks.world, ranks.rank % host, host, sequence)
            if shape.groups > SAMPLES:
                continue
            for mode in ("balanced", "naive"):
                got = on_many_ranks(shape, mode, context)
                found[f"{mode}, {context}, groups of {sequence}, hosts of {host}"] = {
                    "velocity": 0.0 if got[0] is None else error(got[0], wanted[0]),
                    "losses": [abs(a - b) / b for a, b in zip(got[1], wanted[1])],
                    "gradients": max(float((g - wanted[2][n]).norm() / total) for n, g in got[2].items()),
                    "largest": max(
                        error(g, wanted[2][n]) for n, g in got[2].items() if wanted[2][n].norm() > 1e-3 * total
                    ),
                }
    return found


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def small_preset() -> Any:
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("training_conftest", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SMALL


def options(folder: Path, **more: Any) -> StageOptions:
    """Training of the small preset on a few stories; `folder` holds its VAE."""
    usual: dict[str, Any] = {"batch": 2, "stories": 2, "chunks": (2,), "seed": 5, "context": "window"}
    return StageOptions(small_preset(), vae=folder / "vae", **{**usual, **more})


def config(out: Path, **more: Any) -> TrainConfig:
    optimizer = OptimizerConfig(lr=1e-3, warmup=1)
    return TrainConfig(
        out=out, preset="small", steps=2, seed=5, evaluate_steps=0, log_steps=1, optimizer=optimizer, **more
    )


def training(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A run into FOLDER/run that stops, and is resumed."""
    return {
        "stopped": run(ranks, folder, "run", {}, stop_at=1),
        "resumed": run(ranks, folder, "run", {}, resume=True),
    }


def special(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Runs under NVFP4 and with recycled errors."""
    return {name: run(ranks, folder, name, SPECIAL[name]) for name in SPECIAL}


SPECIAL: dict[str, dict[str, Any]] = {
    "nvfp4": {"precision": "nvfp4", "recalibrate": 1},
    "recycled": {"error_recycling": True, "errors": RecyclingConfig(clean=0.0, warmup=1, capacity=2)},
}


def run(ranks: Ranks, folder: Path, name: str, more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Held-out metrics, and what a rank other than the first would have left in its own folder."""
    with records_of(ranks) as scratch:
        stage = ParallelDiTStage(options(folder, **more), ranks, "balanced")
        metrics = ParallelTrainer(stage, config(folder / name, **settings), ranks, scratch).fit()
        return {**metrics, "kept apart": sorted(path.name for path in scratch.iterdir())}


JOBS: dict[str, Callable[[Ranks, Path], dict[str, Any]]] = {
    "equality": equality,
    "training": training,
    "special": special,
}


def started(job: str, ranks: int, folder: Path, limit: float = 240) -> Any:
    """Run a job on ranks of its own; what rank 0 found."""
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    words = [sys.executable, __file__, job, str(ranks), str(folder)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "result.json").read_text())


def main(job: str, world: int, folder: Path) -> int:
    torch.set_num_threads(1)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os._exit(be_rank(job, rank, world, folder))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def be_rank(job: str, rank: int, world: int, folder: Path) -> int:
    port = 20000 + os.getppid() % 20000
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with join_ranks("cpu", world) as ranks:
            found = JOBS[job](ranks, folder)
            if rank == 0:
                (folder / "result.json").write_text(json.dumps(found))
            dist.barrier()
        return 0
    except BaseException:  # the parent must see it, whatever it was
        traceback.print_exc()
        sys.stderr.flush()
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
