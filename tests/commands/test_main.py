"""The `longtake` command itself."""

from __future__ import annotations

import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.commands import main as cli
from longtake.options import Command


class InterruptedWhenDropped:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


def test_ctrl_c_in_a_finalizer_is_not_lost(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    came_back = []

    def run() -> int:
        InterruptedWhenDropped()
        came_back.append(True)  # Python has dropped the exception
        time.sleep(10)
        return 0

    monkeypatch.setattr(cli, "COMMANDS", {"drop": ("drop", "drops something")})
    monkeypatch.setitem(sys.modules, "drop", SimpleNamespace(COMMAND=Command(run, (), "")))  # type: ignore[arg-type]
    before = sys.unraisablehook
    assert cli.main(["drop"]) == 130 and came_back
    assert "interrupted" in capsys.readouterr().err
    assert sys.unraisablehook is before
