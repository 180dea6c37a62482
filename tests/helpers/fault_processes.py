"""Commands of longtake in processes of their own, forked from one that has the libraries already: a run spares their import,
which takes longer than what a fault is tried on."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longtake.paths import REPOSITORY

CODE = """
import os, resource, signal, sys
sys.path[:] = {path!r}
{before}
from longtake.commands.main import main
sys.exit(main(sys.argv[1:]))
"""
FORKS = multiprocessing.get_context("forkserver")
COMMANDS = ("train", "export", "engines", "generate", "training_run", "video_output")
FORKS.set_forkserver_preload(
    ["__main__", "torch", "torch._dynamo", "torch.onnx._internal.exporter._core", "onnx", "onnxscript", "onnxruntime", "av",
     "sklearn.datasets", "torch.utils.tensorboard",
     *(f"longtake.commands.{name}" for name in COMMANDS), "longtake.chain", "longtake.training.trainer",
     "longtake.runtime.generator", "longtake.engines.build", "fault_processes"]
)  # fmt: skip


class Run:
    """A command, begun; `before` is run in its process first."""

    def __init__(self, words: Sequence[object], before: str = "") -> None:
        number, name = tempfile.mkstemp(prefix="longtake-said-")
        os.close(number)
        self._said = Path(name)
        self._process = FORKS.Process(target=_command, args=(list(map(str, words)), before, name))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, or None."""
        return self._process.exitcode

    def said(self) -> str:
        """What it has said so far."""
        return self._said.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Wait for it: its exit code, and what it said. Raises TimeoutError, and kills it, if that takes longer."""
        self._process.join(seconds)
        code = self.poll()
        if code is None:
            self.kill()
            raise TimeoutError(f"not ended after {seconds:g} s: {self.said()[-300:]}")
        said = self.said()
        self._said.unlink()
        return code, said


def _command(words: list[str], before: str, said: str) -> None:
    """In the child."""
    number = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ["LONGTAKE_THREADS"] = "1"
    exec("import resource, signal\n" + before, {})
    from longtake.commands.main import main

    sys.exit(main(words))


def whole_process(words: Sequence[object], before: str) -> tuple[int, str]:
    """A command from the interpreter's start on: its exit code, and what it said."""
    code = CODE.format(path=[str(REPOSITORY), *sys.path], before=before)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LONGTAKE_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, words)], text=True, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)  # fmt: skip
    return done.returncode, done.stdout
