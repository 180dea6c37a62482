"""SIGTERM and SIGHUP end what runs as Ctrl-C does, with exit codes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from longtake.commands.main import main
from longtake.signals import AT_ONCE, ended_by_signals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_ends_with_the_signals_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    monkeypatch.setattr("longtake.commands.inspect.describe", lambda path: send(number))
    assert main(["inspect", "v.mp4"]) == code
    assert "interrupted; nothing half-written was left" in capsys.readouterr().err


def test_whoever_handles_ctrl_c_handles_them() -> None:
    """The first only asks; another, later, ends at once; a double one of a closing terminal counts once."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        with ended_by_signals() as ended:
            send(signal.SIGHUP)
            send(signal.SIGTERM)
            assert asked == [signal.SIGINT] and ended.code(130) == 129
            time.sleep(AT_ONCE)
            send(signal.SIGTERM)
            assert asked == [signal.SIGINT] * 2
            assert (ended.code(130), ended.code(0), ended.code(2)) == (129, 0, 2)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_background_job_ends_too() -> None:
    """A shell starts those with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with ended_by_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


FORK = """
import os, signal, time
from longtake.signals import ended_by_signals
with ended_by_signals():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"here")
        time.sleep(60)
        os._exit(0)
    os.read(read, 4)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_ends_by_the_signal_itself() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(-signal.SIGTERM) and not done.stderr


CLOSED = """
import os, signal
from longtake import signals
signals._is_terminal = lambda number: True
with signals.ended_by_signals() as ended:
    print("before", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
    except KeyboardInterrupt:
        print("nobody reads this", flush=True)
"""


def test_after_a_closed_terminal_printing_goes_nowhere() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "before\n" and not done.stderr
