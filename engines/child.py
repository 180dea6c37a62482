"""A plan with plugins inside is compiled in a process of its own.

TensorRT-RTX 1.7.1 now and then damages the heap of a process that parses a network with Python plugins. Whatever comes
of that then, a signal that ends the process or a crash hours later, is the child's: it is started once more, and the plans
that are built already are kept. Errors, the progress bar and the log come through; a Ctrl-C ends the child at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from longtake.engines import compile as in_process
from longtake.engines.compile import PlanJob
from longtake.errors import GateError, IntegrityError, LongtakeError, UnavailableError
from longtake.machine.flavour import Choice, Flavour, load
from longtake.machine.trt_log import note_scratch, scratch_of_last_build

log = logging.getLogger(__name__)

ERRORS = {kind.__name__: kind for kind in (LongtakeError, UnavailableError, IntegrityError, GateError)}
ATTEMPTS = 2
CODE = "import sys; sys.path[:] = {path!r}; from longtake.engines.child import serve; serve({number})"


def engine_from_onnx(job: PlanJob, target: str, flavour: Flavour, show_progress: bool = True) -> tuple[bytes, int]:
    """`compile.engine_from_onnx`, in a child process if there are plugins in the plan.

    Raises:
        LongtakeError: what that raises; or the child was ended by a signal, twice.
    """
    if not job.plugins:
        return in_process.engine_from_onnx(job, target, flavour, show_progress)
    for attempt in range(1, ATTEMPTS + 1):
        code, told, plan = _run(job, target, flavour, show_progress)
        if told is not None:
            return _result(told, plan)
        ended = _ended(code)
        if attempt < ATTEMPTS:
            log.warning("%s: the process that compiled it ended with %s; trying once more", job.name, ended)
    raise LongtakeError(
        f"{job.name} could not be built: the process that compiles it was ended twice",
        got=ended,
        expected=f"a plan for {target}",
        fix="run it again: plans that are built are kept. SIGKILL mostly means that the machine lacks memory; "
        "LONGTAKE_LOG=debug shows how far it came",
    )


def _ended(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _run(job: PlanJob, target: str, flavour: Flavour, show: bool) -> tuple[int, dict[str, Any] | None, bytes]:
    """The child's exit code, what it told (None: nothing whole), and the plan."""
    ours, theirs = os.pipe()
    code = CODE.format(path=[path or os.getcwd() for path in sys.path], number=theirs)
    with open(ours, "rb") as answer:
        try:
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=(theirs,))
        finally:
            os.close(theirs)
        reader = _Answer(answer)
        try:
            _ask(child, job, target, flavour, show)
            reader.start()
            while reader.is_alive():  # a signal's handler runs between two rounds
                reader.join(0.1)
                if _interrupted():
                    child.kill()
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
    return child.returncode, reader.told, reader.plan


def _interrupted() -> bool:
    """Whether a Ctrl-C was noted that is to be raised once this plan is done (see progress.Interrupts)."""
    handler = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return bool(getattr(handler, "noted", False))


def _ask(child: subprocess.Popen[bytes], job: PlanJob, target: str, flavour: Flavour, show: bool) -> None:
    told = {
        "name": job.name, "path": str(job.source) if isinstance(job.source, Path) else None, "sha256": job.onnx_sha256,
        "spec": job.spec, "plugins": dict(job.plugins), "channels_last": job.channels_last, "target": target,
        "flavour": [flavour.name, flavour.version, flavour.reason], "show": show,
    }  # fmt: skip
    model = b"" if isinstance(job.source, Path) else job.source.SerializeToString(deterministic=True)
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(told).encode() + b"\n" + model)
        child.stdin.close()
    except BrokenPipeError:  # it has ended already: its exit code tells
        pass


class _Answer(threading.Thread):
    """Reads what a child answers: a line of JSON, and the plan."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__(name="longtake-plan", daemon=True)
        self.source, self.plan = source, b""
        self.told: dict[str, Any] | None = None

    def run(self) -> None:
        line = self.source.readline()
        content = self.source.read()
        if line.endswith(b"\n"):  # else it was cut off
            told = json.loads(line)
            if told.get("sha256") in (None, hashlib.sha256(content).hexdigest()):
                self.told, self.plan = told, content


def _result(told: dict[str, Any], plan: bytes) -> tuple[bytes, int]:
    if "error" in told:
        kind = ERRORS.get(told["error"], LongtakeError)
        raise kind(told["what"], got=told["got"], expected=told["expected"], fix=told["fix"])
    note_scratch(told["scratch"])
    return plan, told["layers"]


# ---- in the child ------------------------------------------------------------------------------------------------------


def serve(number: int) -> None:
    """Compile what standard input says and answer on the open file `number`; ends the process, its heap as it may be."""
    from longtake.settings import configure_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _die_with_parent()
    configure_logging()
    with open(number, "wb") as answer:
        answer.write(_answer(sys.stdin.buffer))
    sys.stderr.flush()
    os._exit(0)


def _answer(source: BinaryIO) -> bytes:
    told = json.loads(source.readline())
    model: Path | onnx.ModelProto = Path(told["path"] or "")
    if told["path"] is None:
        model = onnx.ModelProto.FromString(source.read())
    job = PlanJob(
        told["name"], model, told["sha256"], told["spec"], Counter(told["plugins"]), tuple(told["channels_last"])
    )
    try:
        flavour = load(Choice(*told["flavour"]))
        plan, layers = in_process.engine_from_onnx(job, told["target"], flavour, told["show"])
    except LongtakeError as error:
        shown = [None if value is None else str(value) for value in (error.got, error.expected, error.fix)]
        kind = next(name for name in (type(error).__name__, "LongtakeError") if name in ERRORS)
        return (
            json.dumps({"error": kind, "what": error.what, **dict(zip(("got", "expected", "fix"), shown))}).encode()
            + b"\n"
        )
    digest = hashlib.sha256(plan).hexdigest()
    head = {"layers": layers, "scratch": scratch_of_last_build(), "sha256": digest}
    return json.dumps(head).encode() + b"\n" + plan


def _die_with_parent() -> None:
    """On Linux: a child whose parent is killed goes on for nobody."""
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return
