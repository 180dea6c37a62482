"""What the state of the released network takes, and that every network's spec is what its module gives."""

from __future__ import annotations

import math

import pytest

from longtake.training.models.presets import PRESETS, WorldPreset
from longtake.training.models.sana_wm.spec import dit_spec, slot_tokens

BYTES = {"fp32": 4, "bf16": 2}


def state_bytes(preset: WorldPreset) -> tuple[float, float]:
    """Allocated, and carried from chunk to chunk, in bytes."""
    spec, allocated, carried = dit_spec(preset), 0.0, 0.0
    for binding in spec.inputs:
        if binding.name not in {name for _, name in spec.aliases}:
            continue
        size = BYTES[binding.dtype] * math.prod(int(n) for n in binding.shape)
        allocated += size
        slot = size / int(binding.shape[0])
        held = slot_tokens(preset)
        carried += (
            slot * (held[0] + held[1]) / max(held) if "keys" in binding.name or "values" in binding.name else slot
        )
    return allocated, carried


def test_state_at_the_released_size() -> None:
    current, release = PRESETS["sana-wm"], PRESETS["sana-wm-release"]
    assert isinstance(current, WorldPreset) and isinstance(release, WorldPreset)
    allocated, carried = state_bytes(current)
    assert carried == pytest.approx(1.02e9, rel=0.01) and allocated == pytest.approx(1.87e9, rel=0.01)
    assert carried - state_bytes(release)[1] == pytest.approx(177e6, rel=0.01)
