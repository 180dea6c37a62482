"""Commands of longtake in processes of their own, forked from one that has the libraries already: a run spares their import,
which takes longer than what a fault is tried on."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

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
        self._said = bytearray()  # through a pipe: a limit on the size of files is none on what is said
        self._reading, saying = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_command, args=(list(map(str, words)), before, saying))
        self._process.start()
        saying.close()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        while data := os.read(self._reading.fileno(), 1 << 16):
            self._said += data

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, or None."""
        return self._process.exitcode

    def said(self) -> str:
        """What it has said so far."""
        return self._said.decode(errors="replace")

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
        self._reader.join(10)  # a process of its own, which outlives it, may hold the pipe
        return code, self.said()


def _command(words: list[str], before: str, saying: Connection) -> None:
    """In the child."""
    os.dup2(saying.fileno(), 1)
    os.dup2(saying.fileno(), 2)
    saying.close()
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
