"""How large the experiment is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.runtime.errors import LongtakeError
from longtake.training.experiment.classifier import JudgeTraining

# Steps a second that an H100 makes at the full size, and what else takes how long there: for the plan only.
STEPS_PER_SECOND = {"bf16": 30.0, "nvfp4": 20.0, "distill": 5.0}
JUDGE_SECONDS, EVALUATION_SECONDS, START_SECONDS = 45.0, 7.0, 25.0


@dataclass(frozen=True)
class Settings:
    """start: "random", "shipped" or a folder of checkpoints; every seed's base goes on from there in bf16.

    base_steps: that common bf16 part, of each seed. branch_steps: what each arm trains after it, bf16 or under NVFP4.
    steps, guidance: of sampling, for models that aren't distilled. distill_steps: training steps of each student,
    of which every fifth is the student's own and all are the critic's.
    """

    start: str = "shipped"
    seeds: int = 3
    base_steps: int = 1200
    branch_steps: int = 1600
    batch: int = 32
    chunks: tuple[int, ...] = (1, 1, 2, 5, 5)
    stories: int = 4000
    base_lr: float = 6e-4
    branch_lr: float = 3e-4
    recalibrate: int = 200
    judge: JudgeTraining = JudgeTraining()
    judge_clips: int = 1024
    fidelity_stories: int = 64
    fidelity_chunks: int = 6
    identity_stories: int = 50
    identity_lengths: tuple[int, int, int] = (2, 4, 5)
    drift_stories: int = 20
    drift_chunks: int = 45
    steps: int = 16
    guidance: float = 3.0
    students: tuple[int, ...] = (4, 2)
    distill_steps: int = 1000
    distill_batch: int = 32
    distill_chunks: tuple[int, ...] = (3, 5)
    quick: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise LongtakeError("no seeds", got=self.seeds, expected="1 or more", fix="--seeds 3")
        known = self.start in ("random", "shipped") or (Path(self.start) / "dit.safetensors").is_file()
        if not known:
            raise LongtakeError(
                "nothing to start from",
                got=self.start,
                expected="random, shipped or a folder with dit.safetensors",
                fix="--start shipped",
            )

    def as_json(self) -> dict[str, Any]:
        """Everything that makes this experiment the one it is."""
        described = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in described.items()}


def quick(settings: Settings) -> Settings:
    """The same at toy size: minutes become seconds and its figures mean nothing."""
    return replace(
        settings,
        seeds=1,
        base_steps=1,
        branch_steps=2,
        batch=1,
        chunks=(1, 2),
        stories=2,
        recalibrate=1,
        judge=JudgeTraining(steps=2, batch=2),
        judge_clips=2,
        fidelity_stories=1,
        fidelity_chunks=1,
        identity_stories=1,
        identity_lengths=(1, 1, 1),
        drift_stories=1,
        drift_chunks=2,
        steps=1,
        students=(4,),
        distill_steps=1,
        distill_batch=1,
        distill_chunks=(1,),
        quick=True,
    )
