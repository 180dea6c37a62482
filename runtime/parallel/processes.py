"""The processes of the other ranks, as the first one sees them. Commands are lines of JSON in their stdin.

A pipe, not an exchange, because a rank may wait for its next command for hours; and a rank whose first one is gone reads
the pipe's end and ends, too.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from longtake.errors import LongtakeError, UnavailableError

MODULE = "longtake.runtime.parallel.follower"
START_S = 600.0  # reading a large model from a cold disk
LAST_WORDS_S = 2.0  # what a rank takes to end, and to say why
# One host only: the loopback is always there. Multicast over NVLink stays off: on shared hosts it can wedge the switch.
SETTINGS = {"NCCL_NVLS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}


def is_silence(words: str) -> bool:
    """Whether an exchange failed because another rank is gone or does not answer: these are gloo's and NCCL's words."""
    return any(said in words for said in ("onnection", "imed out", "imeout", "NCCL", "Broken pipe"))


class Followers:
    """Ranks 1 to `world` - 1."""

    def __init__(self, openings: Sequence[Mapping[str, Any]]) -> None:
        """Start a process for each of `openings`, see follower.Opening."""
        self._said: dict[int, str] = {}
        self._processes = [self._started(opening) for opening in openings]

    def _started(self, opening: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        # What this process finds its modules in, and no more: with -c alone the working folder would come first.
        command = [sys.executable, "-P", "-c", f"from {MODULE} import main; main()"]
        places = os.pathsep.join(place or os.getcwd() for place in sys.path)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**SETTINGS, **os.environ, "PYTHONPATH": places},
            start_new_session=True,  # an interrupt is the first rank's to handle
        )
        self._write(process, opening)
        return process

    def _write(self, process: subprocess.Popen[bytes], line: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()

    def tell(self, command: Mapping[str, Any]) -> None:
        """All of them do `command`, after what they were told before."""
        for process in self._processes:
            self._write(process, command)

    def require_ready(self, seconds: float = START_S) -> None:
        """Wait until all have opened their models.

        Raises:
            LongtakeError: one has not, or not in time; all are ended.
        """
        waiting, end = dict(enumerate(self._processes, 1)), time.monotonic() + seconds
        while waiting:
            for rank, process in list(waiting.items()):
                line = self._line(process, 0.1)
                if line and "ready" in line:
                    del waiting[rank]
                elif line is not None or process.poll() is not None:
                    said = str(line.get("error")) if line else f"exit code {process.poll()}"
                    raise self.not_ready(f"rank {rank} has ended: {said}")
            if waiting and time.monotonic() > end:
                raise self.not_ready(f"no answer of rank {min(waiting)} within {seconds:g} s")

    def not_ready(self, why: str) -> LongtakeError:
        """All are ended, and this says why."""
        self.end()
        return UnavailableError(
            "a rank could not be started",
            got=why,
            expected="its part of the model, opened",
            fix="see what it wrote above, or leave out --gpus",
        )

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """What a process says next; {} at its end, None if nothing came."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def why(self) -> str | None:
        """Which rank ended first, and what it said; None if none did, or those alone that had no answer of another one."""
        end = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < end:
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None and not is_silence(said := self._last_words(rank, process)):
                    return f"rank {rank} has ended: {said}"
            time.sleep(0.05)
        return None

    def silent(self) -> list[int]:
        """Ranks that are still there: those that had no answer of another one have ended by now."""
        return [rank for rank, process in enumerate(self._processes, 1) if process.poll() is None]

    def _last_words(self, rank: int, process: subprocess.Popen[bytes]) -> str:
        if rank not in self._said:
            line = self._line(process, 0) or {}
            self._said[rank] = str(line.get("error") or f"exit code {process.returncode}")
        return self._said[rank]

    def end(self, politely: bool = False) -> None:
        """End all that still run; politely: they may leave by themselves first."""
        for process in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.close()
            except OSError:
                pass  # it is gone
        for process in self._processes:
            try:
                process.wait(LAST_WORDS_S if politely else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None and not process.stdout.closed and politely:
                process.stdout.close()
