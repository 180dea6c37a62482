"""The memory's rate is that of the GPU that was measured, and none where it is not known."""

from __future__ import annotations

import pytest
import torch

from longtake.machine.memory_rate import memory_rate
from longtake.plugins.bench.harness import memory_use


def test_a_gpu_has_its_own_rate() -> None:
    assert memory_rate("NVIDIA H100 80GB HBM3") == 3.35e12
    assert memory_rate("NVIDIA H200") == 4.8e12
    assert memory_rate("NVIDIA L4") is None and memory_rate(None) is None


def test_a_share_is_of_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert memory_use(2400.0) == {"gb_s": 2400.0, "of_peak": 0.5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L4")
    assert memory_use(2400.0) == {"gb_s": 2400.0}
