"""The training loop on many ranks: all step together, the first one writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.files import require_disk
from longtake.training.history import History
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.quantize import plain_state
from longtake.training.models.side_file import SideFile
from longtake.training.parallel.optimizer import ShardedAveraged
from longtake.training.parallel.ranks import Ranks
from longtake.training.parallel.sharding import whole
from longtake.training.resume import leave_run_file, require_resume_point, set_aside, sweep
from longtake.training.stages.base import Stage
from longtake.training.trainer import SAVED, TrainConfig, Trainer


class ParallelTrainer(Trainer):
    """`Trainer` for a stage that is sharded over ranks. Other ranks than the first keep their records in `scratch`."""

    def __init__(self, stage: Stage, config: TrainConfig, ranks: Ranks, scratch: Path) -> None:
        super().__init__(stage, config if ranks.first else replace(config, out=scratch), ranks.device)
        self.shared, self.ranks = config, ranks

    def prepare(self) -> None:
        """Stage, optimizer and history, at the start or where a saved run stood."""
        config = self.shared
        if config.resume:
            require_resume_point(config.out)
        self.stage.prepare(self.device)
        self.optimizer = ShardedAveraged(self.stage.modules, config.optimizer, self.ranks)
        if self.ranks.first:
            require_disk(config.out, 60 * sum(param.numel() for param in self.optimizer.params) + 2**24)
            sweep(config.out)
            if not config.resume:
                set_aside(config.out, self.stage.modules)
            leave_run_file(config.out, config.told)
        self.ranks.wait()  # nobody reads the folder before it is swept
        if config.resume:
            self.load_resume_point()
        self.history = History(self.config.out, self.step)

    def load_resume_point(self) -> None:
        """Every rank reads the first one's file: --out must be a folder that all hosts see."""
        own, self.config = self.config, self.shared
        try:
            super().load_resume_point()
        finally:
            self.config = own

    def past(self, since: float, seconds: float) -> bool:
        """Clocks differ: it is late for all when it is late for one."""
        return bool(self.ranks.largest(super().past(since, seconds)))

    def stop_asked(self) -> bool:
        """Whether any rank was interrupted."""
        return bool(self.ranks.largest(super().stop_asked()))

    def save_resume_point(self) -> None:
        super().save_resume_point()
        self.ranks.wait()  # a rank that went on would wait for the first one inside a step, with a shorter patience

    def save_module(self, name: str, facts: dict[str, Any]) -> None:
        """Save one module's present weights, gathered, as `<out>/<name>.safetensors`."""
        tensors: dict[str, Tensor] = {}
        for key, value in plain_state(self.stage.modules[name]).items():
            gathered = whole(value.detach())
            if self.ranks.first:
                kept = gathered.to(SAVED[self.config.save_dtype]) if gathered.is_floating_point() else gathered
                tensors[key] = kept.cpu().clone()
        if self.ranks.first:
            side = SideFile.of({**self.side(), "kind": name, **facts})
            save_checkpoint(self.config.out / f"{name}.safetensors", tensors, side)
        self.ranks.wait()


@contextmanager
def records_of(ranks: Ranks) -> Iterator[Path]:
    """A folder for what a rank other than the first writes, thrown away; such a rank is silent, errors apart."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="longtake-rank-"))
        if not ranks.first:
            nowhere = stack.enter_context(open("/dev/null", "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            logging.getLogger("longtake").setLevel(logging.ERROR)
        yield Path(folder)


def threads_of(ranks: Ranks) -> None:
    """On the CPU, ranks of one host share its cores."""
    if ranks.device.type == "cpu" and ranks.world > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.world))
