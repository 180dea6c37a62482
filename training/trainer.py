"""The training loop of every stage: step, log, save, resume, stop cleanly."""

from __future__ import annotations

import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.runtime.errors import LongtakeError
from longtake.runtime.files import require_disk, require_folder, write_json
from longtake.training.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from longtake.training.history import History
from longtake.training.optimizer import Averaged, OptimizerConfig
from longtake.training.report import train_report
from longtake.training.stages.base import Metric, Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and what to leave on disk. Seconds count from the start of the run, preparation included."""

    out: Path
    preset: str
    steps: int
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    resume: bool = False
    stop_at: int | None = None
    max_seconds: float = math.inf
    save_steps: int = 0
    save_seconds: float = 300.0
    evaluate_steps: int = 1000
    log_steps: int = 50
    save_dtype: torch.dtype = torch.float32
    command: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.stop_at is not None and self.stop_at < 1):
            raise LongtakeError(
                "nothing to train", got=f"{self.steps} steps", expected="at least 1", fix="--steps 1000"
            )
        if not 0 <= self.seed < 2**63:
            raise LongtakeError("bad seed", got=self.seed, expected="0 to 2^63 - 1", fix="--seed 0")
        require_folder(self.out)


class Trainer:
    """Runs one stage. After `fit`, `<out>/<module>.safetensors` hold the EMA weights."""

    def __init__(self, stage: Stage, config: TrainConfig, device: torch.device) -> None:
        self.stage, self.config, self.device = stage, config, device
        self.started = self.saved_at = time.monotonic()
        self.interrupted = False
        self.step = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.pending: list[dict[str, Metric]] = []

    def fit(self) -> dict[str, float]:
        """Train to the end (or to the time limit) and save. Returns the last held-out metrics.

        Raises:
            LongtakeError: the loss became NaN or infinite (named step), the disk is too small, or nothing to resume.
            KeyboardInterrupt: Ctrl-C, after a resume point was saved.
        """
        self.prepare()
        try:
            begun, first = time.monotonic(), self.step
            with _interrupt_flag(self):
                for step in self.progress():
                    self.step = step
                    self.train_step()
                    self.housekeeping()
            self.log()  # waits for the device, so that the last steps count with their time
            return self.finish((self.step - first) / (time.monotonic() - begun))
        finally:
            self.history.close()

    def prepare(self) -> None:
        """Stage, optimizer and history, at the start or where a saved run stood."""
        resume = resume_point(self.config) if self.config.resume else None
        self.stage.prepare(self.device)
        self.optimizer = Averaged(self.stage.modules, self.config.optimizer)
        weights = sum(param.numel() for param in self.optimizer.params)
        require_disk(self.config.out, 60 * weights + 2**24)
        if resume is not None:
            self.load_resume_point(resume)
        self.history = History(self.config.out, self.step)

    def progress(self) -> Iterator[int]:
        """Step numbers, 1-based, until the end, the time limit, `stop_at` or Ctrl-C."""
        last = min(self.config.steps, self.config.stop_at or self.config.steps)
        first = self.step
        with tqdm(
            total=last, initial=first, unit="it", desc=f"train {self.stage.name}", dynamic_ncols=True
        ) as self.bar:
            for step in range(first + 1, last + 1):
                yield step
                self.bar.update()
                if self.interrupted:
                    self.save_resume_point()
                    raise KeyboardInterrupt
                if time.monotonic() - self.started > self.config.max_seconds:
                    logger.warning("time limit reached after step %d of %d", step, self.config.steps)
                    return

    def train_step(self) -> None:
        """One optimizer step; the host doesn't wait for the device."""
        self.stage.on_step(self.step - 1)
        loss, metrics = self.stage.loss(self.step - 1, self.generator)
        loss.backward()
        norm = self.optimizer.step(self.step - 1, self.config.steps)
        self.pending.append({"loss": loss.detach(), **metrics, "grad_norm": norm})

    def housekeeping(self) -> None:
        """Log, evaluate and save when it is time."""
        config, step = self.config, self.step
        if step % config.log_steps == 0 or step == 1:
            self.log()
        if config.evaluate_steps and step % config.evaluate_steps == 0 and step < config.steps:
            self.evaluate()
        due = config.save_steps and step % config.save_steps == 0
        if due or time.monotonic() - self.saved_at > config.save_seconds:
            self.save_resume_point()

    def log(self) -> None:
        """Fetch the metrics gathered since the last time; stop at the first loss that isn't a number.

        Raises:
            LongtakeError: a loss was NaN or infinite; the message names its step.
        """
        if not self.pending:
            return
        first = self.step - len(self.pending) + 1
        names = list(self.pending[-1])
        table = torch.stack(
            [torch.stack([_scalar(m[name], self.device) for name in names]) for m in self.pending]
        ).cpu()
        self.pending.clear()
        finite = table[:, [names.index("loss"), names.index("grad_norm")]].isfinite().all(1)
        if not finite.all():
            raise self.divergence(first + int(finite.logical_not().nonzero()[0]))
        means = dict(zip(names, table.mean(0).tolist()))
        self.history.add(
            "train", self.step, {**means, "lr": self.config.optimizer.lr_at(self.step - 1, self.config.steps)}
        )
        self.bar.set_postfix(loss=f"{means['loss']:.4f}")

    def divergence(self, step: int) -> LongtakeError:
        return LongtakeError(
            f"training diverged: the loss or gradient of step {step} is not finite",
            expected="finite numbers",
            fix=f"resume points in {self.config.out} are from before; lower --lr and start again, or --resume with it",
        )

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the EMA weights, recorded."""
        with self.optimizer.averaged_weights(), torch.no_grad():
            metrics = self.stage.evaluate()
            self.history.add_samples(self.step, self.stage.samples())
        self.history.add("held_out", self.step, metrics)
        self.history.save()
        self.bar.write(f"step {self.step}: held out " + ", ".join(f"{k} {v:.5g}" for k, v in metrics.items()))
        return metrics

    def save_resume_point(self) -> None:
        """Everything for a bit-identical continuation; older ones are deleted once it is whole."""
        self.log()
        path = self.config.out / f"resume-{self.step:07d}.safetensors"
        tensors = {**self.optimizer.state(), "generator": self.generator.get_state()}
        save_checkpoint(path, tensors, {**self.side(), "kind": f"resume-{self.stage.name}"})
        self.history.save()
        for old in sorted(self.config.out.glob("resume-*.safetensors"))[:-2]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
        self.saved_at = time.monotonic()

    def load_resume_point(self, path: Path) -> None:
        """Restore modules, optimizer, EMA, generator and step."""
        tensors, meta = load_checkpoint(path, kind=f"resume-{self.stage.name}", preset=self.config.preset)
        if meta["steps"] != self.config.steps:
            logger.warning(
                "resuming with --steps %d, saved with %d: the schedule changes", self.config.steps, meta["steps"]
            )
        self.generator.set_state(tensors.pop("generator"))
        self.optimizer.load_state(tensors)
        self.step = int(meta["step"])
        logger.info("resumed from %s", path)

    def finish(self, steps_per_s: float) -> dict[str, float]:
        """Last evaluation, EMA checkpoints, loss curve, report. A run stopped by `stop_at` can still be resumed."""
        self.save_resume_point()
        metrics = self.evaluate()
        with self.optimizer.averaged_weights():
            for name, facts in self.stage.metadata().items():
                self.save_module(name, {**facts, "metrics": metrics})
        for path in getattr(self.stage, "companions", ()):
            copy_checkpoint(path, self.config.out)
        self.history.plot(f"longtake train --stage {self.stage.name}")
        write_json(self.config.out / "report.json", train_report(self.side(), steps_per_s, metrics, self.device))
        return metrics

    def save_module(self, name: str, facts: dict[str, Any]) -> None:
        """Save one module's present weights (without quantizer state) as `<out>/<name>.safetensors`."""
        state = {k: v for k, v in self.stage.modules[name].state_dict().items() if "_quantizer" not in k}
        dtype = self.config.save_dtype
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        save_checkpoint(self.config.out / f"{name}.safetensors", tensors, {**self.side(), "kind": name, **facts})

    def side(self) -> dict[str, Any]:
        """The part of a side file that every checkpoint of a run shares."""
        config = self.config
        return {
            "preset": config.preset,
            "stage": self.stage.name,
            "step": self.step,
            "steps": config.steps,
            "seed": config.seed,
            "command": config.command or shlex.join(sys.argv),
            "optimizer": {"name": "AdamW", **asdict(config.optimizer)},
            "seconds": round(time.monotonic() - self.started, 1),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }


def resume_point(config: TrainConfig) -> Path:
    """The newest resume point of a run.

    Raises:
        LongtakeError: there is none.
    """
    points = sorted(config.out.glob("resume-*.safetensors"))
    if not points:
        raise LongtakeError(
            f"nothing to resume in {config.out}",
            got="no resume-*.safetensors",
            fix="drop --resume to start anew, or check --out",
        )
    return points[-1]


def _scalar(value: Metric, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device).detach()


@contextmanager
def _interrupt_flag(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C only raises a flag, so that a step is never cut in two; a second one stops at once."""

    def note(signum: int, frame: object) -> None:
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
