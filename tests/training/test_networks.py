"""Loading checkpoints by mapping them: what memory it takes, in which dtype, and that files stay as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtake.errors import IntegrityError
from longtake.files import sha256
from longtake.training.models import load as networks
from longtake.training.models.checkpoint import map_into, save_checkpoint
from longtake.training.models.load import load_models
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, Preset, TextEncoderConfig
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.umt5 import UMT5
from longtake.training.models.text.words import text_encoder_for
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.vae import CausalVAE

WIDE = replace(
    TINY,
    name="wide",
    dit=replace(TINY.dit, dim=1024, heads=8, ffn_dim=4096, layers=3, text_dim=64),
    text=TextEncoderConfig(kind="umt5", dim=64, layers=2, heads=4, length=32, ffn_dim=96, vocabulary=50),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wide")
    modules: dict[str, nn.Module] = {
        "dit": CausalDiT(WIDE.dit),
        "vae": CausalVAE(WIDE.vae),
        "text_encoder": text_encoder_for(WIDE),
    }
    for name, module in modules.items():
        save_checkpoint(made / f"{name}.safetensors", module.bfloat16().state_dict(), SideFile(name, "wide"))
    return made


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def test_a_large_model_is_mapped_as_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "LARGE", 10**6)
    size = (folder / "dit.safetensors").stat().st_size
    assert size > 100e6
    load_models(WIDE, folder)  # torch imports 60 MB of itself with the first module built on meta
    before = own_memory()
    models = load_models(WIDE, folder)
    total = sum(float(p.detach().sum()) for p in models.dit.parameters())  # every page is read
    assert own_memory() - before < 0.2 * size
    assert abs(total) > 0 and isinstance(models.text, UMT5)
    assert {p.dtype for m in (models.dit, models.vae, models.text) for p in m.parameters()} == {torch.bfloat16}


def test_a_small_model_is_fp32_and_dtype_overrules(folder: Path) -> None:
    for asked, got in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        models = load_models(WIDE, folder, asked)
        assert {p.dtype for m in (models.dit, models.vae, models.text) for p in m.parameters()} == {got}


@torch.no_grad()
def test_writing_to_weights_leaves_the_file_alone(folder: Path) -> None:
    digest = sha256(folder / "dit.safetensors")
    models = load_models(WIDE, folder, torch.bfloat16)
    weight = models.dit.blocks[0].ffn[0].weight
    kept = weight.clone()
    weight.mul_(2)
    assert sha256(folder / "dit.safetensors") == digest
    again: Tensor = load_models(WIDE, folder, torch.bfloat16).dit.blocks[0].ffn[0].weight
    assert torch.equal(again, kept)


def test_nothing_is_left_on_the_meta_device(folder: Path) -> None:
    models = load_models(WIDE, folder)
    for module in (models.dit, models.vae, models.text):
        assert not [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
        assert all(p.requires_grad for p in module.parameters())


def test_a_checkpoint_of_another_size_is_refused_whole(folder: Path) -> None:
    with torch.device("meta"):
        other = CausalDiT(replace(WIDE.dit, layers=2))
    with pytest.raises(IntegrityError, match=r"extra: blocks\.2\."):
        map_into(other, folder / "dit.safetensors", kind="dit", preset="wide")
    assert all(p.is_meta for p in other.parameters())


@pytest.mark.parametrize(("preset", "dtype"), [(TINY, torch.float32), (WAN22_TI2V_5B, None)])
def test_only_large_presets_stay_as_stored(preset: Preset, dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        modules = CausalDiT(preset.dit), CausalVAE(preset.vae), text_encoder_for(preset)
    assert networks.weights_dtype(*modules) is dtype
