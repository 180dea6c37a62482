"""A progress bar per plan, fed by TensorRT's progress monitor; Ctrl-C stops the build after the plan at hand."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Interrupts:
    """While it is entered, a Ctrl-C is noted; it is raised on leaving, in place of whatever came of it.

    An exception must not pass through TensorRT: one raised in its logger's callback is logged, and lost. Nor is the
    build told to cancel: TensorRT-RTX 1.7 then sometimes corrupts its heap and aborts the process.
    """

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> Interrupts:
        self._main = threading.current_thread() is threading.main_thread()  # others get no signals
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)
        if self.noted:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        if not self.noted:
            logger.warning("interrupted: stopping; the plan at hand is not kept")
        self.noted = True


class BuildProgress:
    """`monitor` goes into the builder config. After the build, `finish` closes the bar."""

    def __init__(self, trt: Any, title: str, show: bool = True) -> None:
        self.bar = tqdm(total=0, desc=title, unit="step", leave=False, disable=not show, file=sys.stderr)
        self.monitor = _monitor(trt, self)

    def finish(self) -> None:
        self.bar.close()


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Moves the bar; never asks TensorRT to stop (see `Interrupts`)."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.bar.total += num_steps
            if parent_phase is None or parent_phase == "Building engine":
                progress.bar.set_postfix_str(phase_name.lower(), refresh=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.bar.update(1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            return None

    return Monitor()
