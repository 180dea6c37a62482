"""Where a text or VAE encoder that was not exported comes from: the folder an export was made of, unless another is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.runtime.sources import require_checkpoints, source_from_name
from longtake.training.models.checkpoint import read_side_file


def test_an_export_knows_its_checkpoints(tmp_path: Path) -> None:
    made, export = tmp_path / "mine", tmp_path / "export"
    made.mkdir()
    export.mkdir()
    Export("tiny_w4a16", "tiny", "w4a16", "bf16", {}, (), checkpoints=str(made)).write(export)
    assert source_from_name(export).checkpoints == made
    made.rmdir()  # moved to another machine: the preset's own folder is looked at
    assert source_from_name(export).checkpoints is None


def test_a_released_text_encoder_that_is_not_there_is_converted_not_trained(tmp_path: Path) -> None:
    path = tmp_path / "text_encoder.safetensors"
    with pytest.raises(LongtakeError, match=r"does not exist[\s\S]*fix: .*convert --preset wan2.2-ti2v-5b --text"):
        read_side_file(path, kind="text_encoder", preset="wan2.2-ti2v-5b")
    with pytest.raises(LongtakeError, match=r"no folder of checkpoints[\s\S]*text_encoder.safetensors"):
        require_checkpoints(path)
