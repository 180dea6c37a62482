"""How large the experiment is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.training.data.held_out_stories import BETWEEN, DISTANCES
from longtake.training.data.returns import RETURNING, require_room
from longtake.training.experiment.classifier import JudgeTraining

# Steps a second that an H100 makes at the full size, and what else takes how long there: for the plan only.
STEPS_PER_SECOND = {"bf16": 12.0, "nvfp4": 12.0}
JUDGE_SECONDS, EVALUATION_SECONDS, START_SECONDS = 40.0, 12.0, 10.0
MEMORY_SECONDS, FILM_SECONDS = 35.0, 80.0  # estimated from these


@dataclass(frozen=True)
class Settings:
    """start: "random", "shipped" or a folder of checkpoints; the base goes on from there in bf16.

    base_steps: of that bf16 part, which all arms of all seeds have in common. branch_steps: what each arm trains after
    it, bf16 or under NVFP4. story_parts: pieces that the training stories are encoded in, by as many processes.
    return_distance: shortest and longest distance of returns in training stories; (): those of `returning_story`.
    flow_stories, flow_draws: held-out stories of the flow loss and how often each is noised. teacher: the seed whose
    NVFP4-aware model is distilled; "first" is chosen before anything is measured, "best" by the lowest flow loss.
    memory_*: returns of a subject, so many stories for each distance in chunks and number of subjects between. drift_*: one
    shot of a minute; film_*: of five. probe_*: returns in which attention is looked at.
    steps, guidance: of sampling, for models that aren't distilled. distill_steps, distill_seconds: a student's training
    ends with whichever comes first; distill_ratio: the critic's steps for one of the student. distill_rollout: chunks of its own
    video, of which the last distill_chunks are learnt on; (): no others.
    """

    start: str = "shipped"
    seeds: int = 3
    base_steps: int = 1800
    branch_steps: int = 1000
    batch: int = 20
    chunks: tuple[int, ...] = (1, 5, 8, 8, 8)
    return_distance: tuple[int, ...] = ()
    stories: int = 4000
    story_parts: int = 4
    base_lr: float = 6e-4
    branch_lr: float = 3e-4
    recalibrate: int = 200
    judge: JudgeTraining = JudgeTraining()
    judge_clips: int = 1024
    flow_stories: int = 256
    flow_draws: int = 2
    fidelity_stories: int = 384
    fidelity_chunks: int = 5
    identity_stories: int = 160
    identity_lengths: tuple[int, int, int] = (2, 4, 3)
    memory_stories: int = 24
    memory_distances: tuple[int, ...] = DISTANCES
    memory_between: tuple[int, ...] = BETWEEN
    drift_stories: int = 40
    drift_chunks: int = 45
    film_stories: int = 16
    film_chunks: int = 225
    probe_stories: int = 64
    probe_distance: int = 7
    steps: int = 16
    guidance: float = 3.0
    students: tuple[int, ...] = (4, 2)
    teacher: str = "first"
    distill_steps: int = 3000
    distill_seconds: float = 330.0
    distill_ratio: int = 2
    distill_batch: int = 48
    distill_chunks: tuple[int, ...] = (1, 2, 4)
    distill_rollout: tuple[int, ...] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise LongtakeError("no seeds", got=self.seeds, expected="1 or more", fix="--seeds 3")
        for name, value in (("batch", self.batch), ("stories", self.stories)):
            if value < 1:
                raise LongtakeError(f"bad --{name}", got=value, expected="1 or more", fix=f"leave --{name} out")
        if self.teacher not in ("first", "best"):
            raise LongtakeError("unknown teacher", got=self.teacher, expected="first or best", fix="--teacher first")
        require_room(RETURNING, self.chunks, self.return_distance or None)
        if self.distill_rollout:
            require_room(RETURNING, self.distill_rollout, self.return_distance or None)
            if min(self.distill_rollout) < max(self.distill_chunks):
                raise LongtakeError(
                    "the students' roll-out is shorter than what they learn on",
                    got=f"--distill-rollout {min(self.distill_rollout)}",
                    expected=f"{max(self.distill_chunks)} chunks or more",
                    fix=f"--distill-rollout {max(self.distill_chunks)}..16",
                )
        known = self.start in ("random", "shipped") or (Path(self.start) / "dit.safetensors").is_file()
        if not known:
            what, got = "nothing to start from", self.start
            expected, fix = "random, shipped or a folder with dit.safetensors", "--start shipped"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)

    def as_json(self) -> dict[str, Any]:
        """Everything that makes this experiment the one it is."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def quick(settings: Settings) -> Settings:
    """The same at toy size: minutes become seconds and its figures mean nothing."""
    return replace(
        settings,
        seeds=1,
        base_steps=1,
        branch_steps=2,
        batch=1,
        chunks=(1, 2),
        stories=4,
        story_parts=2,
        flow_stories=2,
        flow_draws=1,
        recalibrate=1,
        judge=JudgeTraining(steps=2, batch=2),
        judge_clips=2,
        fidelity_stories=1,
        fidelity_chunks=1,
        identity_stories=1,
        identity_lengths=(1, 1, 1),
        memory_stories=1,
        memory_distances=(1,),
        memory_between=(1,),
        drift_stories=1,
        drift_chunks=2,
        film_stories=1,
        film_chunks=3,
        probe_stories=1,
        probe_distance=1,
        steps=1,
        students=(4,),
        distill_steps=2,
        distill_seconds=600.0,
        distill_batch=1,
        distill_chunks=(1,),
        quick=True,
    )
