"""The training loop of every stage: step, log, save, resume, stop cleanly."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtake.errors import LongtakeError, some
from longtake.files import require_disk, require_folder, write_json
from longtake.options import check
from longtake.signals import first_interrupt
from longtake.training.history import History
from longtake.training.models.checkpoint import copy_checkpoint, save_checkpoint
from longtake.training.models.quantize import plain_state
from longtake.training.models.side_file import SideFile
from longtake.training.optimizer import Averaged, OptimizerConfig
from longtake.training.options import RunOptions
from longtake.training.parts import Part, new_part
from longtake.training.report import present_memory, train_report
from longtake.training.resume import (
    check_same_run,
    delete_older,
    leave_run_file,
    newest_whole,
    require_resume_point,
    set_aside,
    sweep,
)
from longtake.training.stages.base import Loss, Metric, Stage

logger = logging.getLogger(__name__)

SAVED = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEFORE = "resume points in {} are from before; lower --lr and start again, or --resume with it"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunOptions):
    """What the loop is told: how long to train, and what to leave on disk.

    settings: what makes this run the one it is (JSON-ready); resuming with others is refused or warned about.
    parts: of a run in several, those before this one; source: what it starts from (see `parts`).
    told: what it was told, as a run file, which is left in its folder: --resume and --out are enough then.
    """

    preset: str
    preset_digests: dict[str, str] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_steps: int = 50
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    source: dict[str, Any] | None = None
    told: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise LongtakeError for what nothing can be trained by."""
        check(self)
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
        self.batches: list[object] = []  # what each pending step was trained on, where the stage says

    def fit(self) -> dict[str, float]:
        """Train to the end (or to the time limit) and save. Returns the last held-out metrics.

        Raises:
            LongtakeError: the loss became NaN or infinite (named step), the disk is too small, or nothing to resume.
            KeyboardInterrupt: Ctrl-C, after a resume point was saved.
        """
        self.prepare()
        try:
            begun, first = time.monotonic(), self.step
            with first_interrupt(self.interrupt):  # so that a step is never cut in two
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
        if self.config.resume:
            require_resume_point(self.config.out)
        self.stage.prepare(self.device)
        self.optimizer = self.new_optimizer()
        weights = sum(param.numel() for param in self.optimizer.params)
        require_disk(self.config.out, 60 * weights + 2**24)
        sweep(self.config.out)
        if self.config.resume:
            self.load_resume_point()
        else:
            set_aside(self.config.out, self.stage.modules)
        leave_run_file(self.config.out, self.config.told)
        self.history = History(self.config.out, self.step)

    def new_optimizer(self) -> Averaged:
        """What updates the stage's modules, once the stage is prepared."""
        return Averaged(self.stage.modules, self.config.optimizer)

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
                if self.stop_asked():
                    self.save_resume_point()
                    raise KeyboardInterrupt
                if self.past(self.started, self.config.max_seconds):
                    logger.warning("time limit reached after step %d of %d", step, self.config.steps)
                    return

    def past(self, since: float, seconds: float) -> bool:
        """Whether more than `seconds` went by since then."""
        return time.monotonic() - since > seconds

    def interrupt(self) -> None:
        """Stop after the step at hand."""
        self.interrupted = True

    def stop_asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupted

    def train_step(self) -> None:
        """One optimizer step; the host doesn't wait for the device."""
        self.stage.on_step(self.step - 1)
        metrics = backward(self.stage.losses(self.step - 1, self.generator))
        norm = self.optimizer.step(self.step - 1, self.config.steps)
        self.pending.append({**metrics, "grad_norm": norm})
        self.batches.append(self.stage.batch_name())

    def housekeeping(self) -> None:
        """Log, evaluate and save when it is time."""
        config, step = self.config, self.step
        if step % config.log_steps == 0 or step == 1:
            self.log()
        if config.evaluate_steps and step % config.evaluate_steps == 0 and step < config.steps:
            self.evaluate()
        if config.sample_steps and step % config.sample_steps == 0 and step < config.steps:
            with self.optimizer.averaged_weights(), torch.no_grad():
                self.history.add_samples(self.step, self.stage.samples())
        due = config.save_steps and step % config.save_steps == 0
        if due or self.past(self.saved_at, config.save_seconds):
            self.save_resume_point()

    def log(self) -> None:
        """Fetch the metrics gathered since the last time; stop at the first loss that isn't a number.

        Raises:
            LongtakeError: a loss was NaN or infinite; the message names its step.
        """
        if not self.pending:
            return
        first = self.step - len(self.pending) + 1
        batches = self.batches[-len(self.pending) :]
        names = list(self.pending[-1])
        rows = [
            [torch.as_tensor(m[name], dtype=torch.float32, device=self.device) for name in names] for m in self.pending
        ]
        table = torch.stack([torch.stack(row).detach() for row in rows]).cpu()
        self.pending.clear()
        self.batches.clear()
        finite = table[:, [names.index("loss"), names.index("grad_norm")]].isfinite().all(1)
        if not finite.all():
            bad = int(finite.logical_not().nonzero()[0])
            of = batches[bad]
            raise LongtakeError(
                f"training diverged: the loss or gradient of step {first + bad} is not finite",
                got=None if of is None else f"the batch of {of}, --seed {self.config.seed}",
                expected="finite numbers",
                fix=BEFORE.format(self.config.out),
            )
        means = dict(zip(names, table.mean(0).tolist()))
        self.history.add(
            "train", self.step, {**means, "lr": self.config.optimizer.lr_at(self.step - 1, self.config.steps)}
        )
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", memory=present_memory(self.device))

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the EMA weights, recorded."""
        with self.optimizer.averaged_weights(), torch.no_grad():
            metrics = self.stage.evaluate()
            if not self.config.sample_steps:
                self.history.add_samples(self.step, self.stage.samples())
        self.history.add("held_out", self.step, metrics)
        self.history.save()
        self.bar.write(f"step {self.step}: evaluation: " + ", ".join(f"{k} {v:.5g}" for k, v in metrics.items()))
        return metrics

    def save_resume_point(self) -> None:
        """Everything for a bit-identical continuation; older ones are deleted once it is whole."""
        self.log()
        tensors = {**self.optimizer.state(), "generator": self.generator.get_state()}
        tensors |= {f"stage/{name}": tensor for name, tensor in self.stage.state().items()}
        facts = {
            "kind": f"resume-{self.stage.name}",
            "position": self.stage.position(),
            "settings": self.config.settings,
        }
        self.history.save()  # first: a run that goes on from this point leaves out what is later, and lacks nothing
        self.save(f"resume-{self.step:07d}", tensors, facts)
        delete_older(self.config.out)
        self.saved_at = time.monotonic()

    def load_resume_point(self) -> None:
        """Restore modules, optimizer, EMA, generator, step and the place in the data, of the newest whole one."""
        path, tensors, saved = newest_whole(
            self.config.out, kind=f"resume-{self.stage.name}", preset=self.config.preset
        )
        check_same_run(path, saved.settings or {}, self.config.settings)
        if saved.steps != self.config.steps:
            logger.warning(
                "resuming with --steps %d, saved with %d: the schedule changes", self.config.steps, saved.steps
            )
        self.stage.require_position(saved.position or {})
        self.generator.set_state(tensors.pop("generator"))
        self.optimizer.load_state(tensors)
        self.stage.load_state({k.removeprefix("stage/"): v for k, v in tensors.items() if k.startswith("stage/")})
        self.stage.seek(saved.position or {})
        self.step = saved.step or 0
        logger.info("resumed from %s", path)

    def finish(self, steps_per_s: float) -> dict[str, float]:
        """Last evaluation, EMA checkpoints, loss curve, report. A run stopped by `stop_at` can still be resumed."""
        self.save_resume_point()
        metrics = self.evaluate()
        parts = self.parts()
        with self.optimizer.averaged_weights():
            for name, facts in self.stage.metadata().items():
                self.save_module(name, {**facts, "metrics": metrics, "parts": parts})
        for path in self.stage.companions:
            copy_checkpoint(path, self.config.out)
        self.stage.leave(self.config.out)
        self.history.plot(f"longtake train --stage {self.stage.name}")
        write_json(
            self.config.out / "report.json",
            train_report({**self.side(), "parts": parts}, steps_per_s, metrics, self.device),
        )
        return metrics

    def parts(self) -> list[Part]:
        """The run's record, this part last."""
        config = self.config
        warmup = config.optimizer.warmup_of(config.steps)
        return [*config.parts, new_part(self.side(), config.parts, config.source, warmup)]

    def save_module(self, name: str, facts: dict[str, Any]) -> None:
        """Save one module's present weights (without quantizer state) as `<out>/<name>.safetensors`."""
        state, dtype = plain_state(self.stage.modules[name]), SAVED[self.config.save_dtype]
        self.save(name, {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, facts)

    def save(self, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write `<out>/<name>.safetensors` and its side file."""
        path = self.config.out / f"{name}.safetensors"
        require_finite(tensors, path)
        save_checkpoint(path, tensors, SideFile.of({**self.side(), "kind": name, **facts}))

    def side(self) -> dict[str, Any]:
        """The part of a side file that every checkpoint of a run shares."""
        config = self.config
        return {
            "preset": config.preset,
            **({"preset_digests": config.preset_digests} if config.preset_digests else {}),
            "stage": self.stage.name,
            "step": self.step,
            "steps": config.steps,
            "seed": config.seed,
            "command": config.command or shlex.join(sys.argv),
            "optimizer": {"name": "AdamW", **asdict(config.optimizer)},
            "seconds": round(time.monotonic() - self.started, 1),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }


def backward(parts: Iterable[Loss]) -> dict[str, Metric]:
    """Backward passes of a loss that comes in parts, each before the next is computed; the sums, "loss" among them."""
    total: dict[str, Metric] = {}
    for loss, metrics in parts:
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total[name] = total[name] + value if name in total else value
    return total


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise LongtakeError rather than save a number that isn't one."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
    if bad:
        what, got = f"training diverged: {path.name} is not written, for its numbers are not finite", some(bad, 3)
        expected, fix = "finite numbers", BEFORE.format(path.parent)
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
