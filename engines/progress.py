"""A progress bar per plan, fed by TensorRT's progress monitor; Ctrl-C stops the build instead of crashing it."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class BuildProgress:
    """`monitor` goes into the builder config. After the build, `finish` closes the bar and re-raises a Ctrl-C."""

    def __init__(self, trt: Any, title: str, show: bool = True) -> None:
        self.bar = tqdm(total=0, desc=title, unit="step", leave=False, disable=not show, file=sys.stderr)
        self.interrupted = False
        self.monitor = _monitor(trt, self)

    def finish(self) -> None:
        self.bar.close()
        if self.interrupted:
            raise KeyboardInterrupt


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """An exception must not pass through TensorRT: a Ctrl-C that lands in a callback becomes "stop"."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                progress.bar.total += num_steps
                if parent_phase is None or parent_phase == "Building engine":
                    progress.bar.set_postfix_str(phase_name.lower(), refresh=False)
            except KeyboardInterrupt:
                progress.interrupted = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress.bar.update(1)
            except KeyboardInterrupt:
                progress.interrupted = True
            return not progress.interrupted

        def phase_finish(self, phase_name: str) -> None:
            return None

    return Monitor()
