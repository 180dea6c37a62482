"""A plan with plugins is compiled in a process of its own: whatever ends that process ends neither the command nor the rest."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from longtake.engines import child
from longtake.engines.child import engine_from_onnx
from longtake.engines.compile import PlanJob
from longtake.engines.progress import Interrupts
from longtake.errors import LongtakeError
from longtake.machine.flavour import Flavour, flavour_for
from longtake.machine.trt_log import scratch_of_last_build

RTX = Flavour("tensorrt_rtx", "1.7.1.116", None, "a test", "13")
ANSWER = """
import hashlib, json, os, sys
told = json.loads(sys.stdin.buffer.readline())
plan = b"the plan of " + told["name"].encode()
head = {{"layers": 7, "scratch": 5, "sha256": hashlib.sha256(plan).hexdigest()}}
with open({number}, "wb") as answer: answer.write(json.dumps(head).encode() + b"\\n" + plan)
{after}
"""


def a_job(folder: Path) -> PlanJob:
    return PlanJob("dit", folder / "dit.onnx", "", {"inputs": []}, Counter({"sink_attention_nvfp4": 1}))


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What runs in place of the child."""
    monkeypatch.setattr(child, "CODE", code)


def test_what_it_answers_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ANSWER.replace("{after}", "os.kill(os.getpid(), 11)"))  # once it has answered, nothing counts
    assert engine_from_onnx(a_job(tmp_path), "12.0", RTX) == (b"the plan of dit", 7)
    assert scratch_of_last_build() == 5


def test_a_signal_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "flag"
    first = f"import os\nif not os.path.exists({str(flag)!r}): open({str(flag)!r}, 'w'); os.kill(os.getpid(), 6)\n"
    stand_in(monkeypatch, first + ANSWER.replace("{after}", ""))
    with caplog.at_level(logging.WARNING):
        assert engine_from_onnx(a_job(tmp_path), "12.0", RTX)[1] == 7
    assert "ended with SIGABRT; trying once more" in caplog.text


@pytest.mark.parametrize(("code", "says"), [("import os; os.kill(os.getpid(), 11)", "SIGSEGV"), ("raise SystemExit(3)", "exit code 3"),
                                            ("import os; os.write({number}, b'{{\"layers\": 1'); os.kill(os.getpid(), 9)", "SIGKILL")])  # fmt: skip
def test_a_second_one_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str) -> None:
    stand_in(monkeypatch, code)
    with pytest.raises(LongtakeError, match=f"dit could not be built(.|\n)*got: {says}(.|\n)*fix: run it again"):
        engine_from_onnx(a_job(tmp_path), "12.0", RTX)


def test_ctrl_c_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch, f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )

    def press() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt), Interrupts():
        engine_from_onnx(a_job(tmp_path), "12.0", RTX)
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_errors_come_through_as_they_are(tmp_path: Path) -> None:
    flavour = flavour_for(None)
    if flavour.name != "tensorrt_rtx":
        pytest.skip(f"{flavour.label} does not build without a GPU")
    (tmp_path / "dit.onnx").write_bytes(b"no model")
    with pytest.raises(LongtakeError, match="TensorRT's ONNX parser refuses dit"):
        engine_from_onnx(a_job(tmp_path), "12.0", flavour, show_progress=False)
