"""A slot: a process on a device that the scheduler gives units to. It starts with its first unit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Slot:
    """number: among the slots of its device. place: of the device among all. jobs: slots of its device."""

    out: Path
    device: str
    place: int
    number: int
    jobs: int = 1
    threads: int = 1
    unit: str | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.device} slot {self.place}.{self.number}"

    @property
    def beside(self) -> bool:
        """Whether its device has other slots."""
        return self.jobs > 1

    @property
    def sentinel(self) -> int:
        """What becomes readable when there is an answer, or when the process is gone."""
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout.fileno()

    def start(self, unit: str, seconds: float) -> None:
        """Begin a unit that has `seconds` at most."""
        if self.process is None or self.process.poll() is not None:
            self.process = self.new_process()
        assert self.process.stdin is not None
        self.unit = unit
        try:
            self.process.stdin.write(json.dumps({"unit": unit, "seconds": seconds}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, and `answer` will say so

    def new_process(self) -> subprocess.Popen[str]:
        """A worker that sees no GPU but its own, so that "the present device" is never another one."""
        environment, device = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TQDM_MININTERVAL": "5"}, self.device
        if device.startswith("cuda"):
            visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), int(device.partition(":")[2] or 0)
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
            device = "cuda:0"
        folder = self.out / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"worker-{self.place}-{self.number}.log", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "longtake.training.experiment.worker", str(self.out), device],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
                start_new_session=True,  # Ctrl-C reaches the scheduler only, which then asks
            )  # fmt: skip

    def answer(self) -> tuple[str, str, str] | None:
        """Unit, state and why, once there is an answer: "failed" if the process ended without one."""
        from select import select

        assert self.process is not None and self.process.stdout is not None and self.unit is not None
        if not select([self.process.stdout], [], [], 0)[0]:
            return None
        unit, line = self.unit, self.process.stdout.readline()
        self.unit = None
        if line:
            said = json.loads(line)
            return unit, said["state"], said["why"]
        return unit, "failed", f"its process ended with code {self.process.wait()}"

    def ask_to_stop(self) -> None:
        """Ctrl-C for a busy process and its children; a closed input, which ends it, for an idle one."""
        if self.process is None or self.process.poll() is not None:
            return
        if self.unit:
            self.signal(signal.SIGINT)
        elif self.process.stdin is not None:
            self.process.stdin.close()

    def end(self, seconds: float) -> None:
        """Wait so long at most, then kill it."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.unit = None

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)  # type: ignore[union-attr]
        except ProcessLookupError:
            pass
