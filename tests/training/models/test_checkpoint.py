from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.errors import IntegrityError, LongtakeError
from longtake.paths import REPOSITORY
from longtake.training.models.checkpoint import load_into, read_side_file, save_checkpoint
from longtake.training.models.presets import TINY
from longtake.training.models.side_file import SideFile

META = {"kind": "dit", "preset": "tiny", "step": 3}
SIDE = SideFile.of(META)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "dit.safetensors"
    save_checkpoint(path, nn.Linear(4, 3).state_dict(), SIDE)
    return path


def refused(path: Path, module: nn.Module | None = None, kind: str = "dit", preset: str = "tiny") -> str:
    """The message, after checking that nothing was loaded."""
    module = nn.Linear(4, 3) if module is None else module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(LongtakeError) as caught:
        load_into(module, path, kind=kind, preset=preset)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    return str(caught.value)


def test_round_trip_and_cast(tmp_path: Path) -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    path = tmp_path / "dit.safetensors"
    save_checkpoint(path, {name: value.bfloat16() for name, value in one.state_dict().items()}, SIDE)
    side = load_into(other, path, kind="dit", preset="tiny")
    assert torch.equal(other.weight, one.weight.bfloat16().float()) and other.weight.dtype == torch.float32
    assert side.step == 3 and len(side.sha256) == 64 and side.versions["torch"]


def test_missing_file_says_how_to_train_one(tmp_path: Path) -> None:
    message = refused(tmp_path / "dit.safetensors")
    assert "does not exist" in message and "longtake train --stage dit" in message


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "empty"])
def test_altered_file(saved: Path, damage: str) -> None:
    data = bytearray(saved.read_bytes())
    data[-3] ^= 4
    saved.write_bytes({"truncated": data[:-20], "bit-flipped": data, "empty": b""}[damage])
    message = refused(saved)
    assert "not the file its side file describes" in message and "sha256" in message and "fix:" in message


def test_bad_header_with_a_matching_digest(saved: Path) -> None:
    import hashlib

    data = b"\xff" * 64
    saved.write_bytes(data)
    side = saved.with_suffix(".json")
    side.write_text(json.dumps({**META, "sha256": hashlib.sha256(data).hexdigest()}))
    assert "is not safetensors" in refused(saved)


def test_swapped_files(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "vae.safetensors"
    save_checkpoint(other, nn.Linear(4, 3).state_dict(), SideFile("vae", "tiny"))
    saved.write_bytes(other.read_bytes())
    assert "not the file its side file describes" in refused(saved)


def test_pickle_by_name_or_content(saved: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "model.pt")
    assert "is a pickle" in refused(tmp_path / "model.pt")
    for content in ((tmp_path / "model.pt").read_bytes(), pickle.dumps({"weight": 1})):
        saved.write_bytes(content)
        message = refused(saved)
        assert "is a pickle" in message and "safetensors.torch.save_file" in message


def test_missing_and_damaged_side_file(saved: Path) -> None:
    side = saved.with_suffix(".json")
    side.write_text('{"kind": "di')
    assert "not valid JSON" in refused(saved)
    side.write_text("[]")
    assert "not a checkpoint's side file" in refused(saved)
    side.unlink()
    assert "has no side file" in refused(saved)


def test_wrong_kind_and_preset(saved: Path) -> None:
    assert "of another kind" in refused(saved, kind="vae")
    message = refused(saved, preset="wan2.2-ti2v-5b")
    assert "of another preset" in message and "got: tiny" in message


def test_keys_and_shapes_are_named(saved: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))
            self.gain = nn.Parameter(torch.zeros(1))

    message = refused(saved, Other())
    assert "missing: gain" in message and "extra: bias" in message and "weight [3, 4] instead of [4, 4]" in message


def test_failed_save_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longtake.training.models.side_file.SideFile.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, nn.Linear(4, 3).state_dict(), SIDE)
    monkeypatch.undo()
    load_into(nn.Linear(4, 3), saved, kind="dit", preset="tiny")
    assert sorted(p.name for p in saved.parent.iterdir()) == ["dit.json", "dit.safetensors"]


def test_integrity_errors_exit_with_their_own_code(saved: Path) -> None:
    saved.write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        load_into(nn.Linear(4, 3), saved, kind="dit", preset="tiny")
    assert caught.value.exit_code == 4


def test_a_vae_fits_every_preset_that_has_it(tmp_path: Path) -> None:
    """A preset of one's own with another text encoder takes the shipped VAE; one with another VAE does not."""
    own = replace(TINY, name="own", dit=replace(TINY.dit, text_dim=64), text=replace(TINY.text, dim=64))
    vae = REPOSITORY / TINY.checkpoints / "vae.safetensors"
    assert read_side_file(vae, kind="vae", preset=own).preset == "tiny"
    for kind, preset in (("vae", replace(own, vae=replace(own.vae, encoder_dim=8))), ("dit", own)):
        with pytest.raises(IntegrityError, match="is of another preset"):
            read_side_file(vae.with_name(f"{kind}.safetensors"), kind=kind, preset=preset)
