"""What the wrong file gets: the model named, keys listed, nothing run, nothing half done."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.convert.files import read_container
from longtake.training.convert.models import convert_dit
from longtake.training.models.presets import WAN22_TI2V_5B, Preset

State = dict[str, Tensor]
MARK: list[str] = []


class Malicious:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple:
        return MARK.append, ("ran",)


@pytest.mark.parametrize(
    ("dim", "layers", "channels", "name"),
    [(1536, 30, 16, r"Wan2\.1-T2V-1\.3B: dim 1536, 30 layers"), (5120, 40, 16, r"Wan2\.1-T2V-14B[^:]*: dim 5120, 40 layers"),
     (5120, 40, 36, r"Wan2\.1-I2V-14B or Wan2\.2-I2V-A14B: dim 5120, 40 layers"), (64, 2, 16, r"another model: dim 64, 2 layers")],
)  # fmt: skip
@pytest.mark.parametrize("keys", ["wan", "diffusers"])
def test_another_model_is_named(dim: int, layers: int, channels: int, name: str, keys: str) -> None:
    query = {"wan": "self_attn.q.weight", "diffusers": "attn1.to_q.weight"}[keys]
    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2)} | {
        f"blocks.{n}.{query}": (dim, dim) for n in range(layers)
    }
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with pytest.raises(LongtakeError, match=rf"this is {name}[\s\S]*wan2.2-ti2v-5b: dim 3072, 30 layers, 48 input"):
        convert_dit(state, WAN22_TI2V_5B)


def test_missing_extra_and_wrong_keys_are_listed(preset: Preset, dit_state: State) -> None:
    state = {key: value for key, value in dit_state.items() if not key.startswith("blocks.1.")}
    state |= {"img_emb.proj.0.weight": torch.ones(2), "head.head.bias": torch.ones(3)}
    with pytest.raises(IntegrityError) as error:
        convert_dit(state, preset)
    text = str(error.value)
    assert "27 missing: blocks.1.cross_attn.k.bias, " in text and "and 17 more" in text
    assert "1 extra: img_emb.proj.0.weight" in text
    assert "1 of another shape: head.head.bias [3] instead of [192]" in text


def test_integers_are_not_weights(preset: Preset, dit_state: State) -> None:
    key = "blocks.0.ffn.0.weight"
    with pytest.raises(IntegrityError, match=r"1 of another type: blocks.0.ffn.0.weight torch.int8"):
        convert_dit({**dit_state, key: torch.ones_like(dit_state[key], dtype=torch.int8)}, preset)


def test_legacy_format_is_refused(preset: Preset, dit_state: State) -> None:
    container = {"generator": dit_state, "checkpoint_format": "longlive_generator_te_nvfp4"}
    with pytest.raises(LongtakeError, match=r"legacy format longlive_generator_te_nvfp4[\s\S]*model_te.pt"):
        convert_dit(container, preset)


def test_ema_that_is_not_there(preset: Preset, dit_state: State) -> None:
    with pytest.raises(LongtakeError, match=r"no EMA weights[\s\S]*generator"):
        convert_dit({"generator": dit_state}, preset, use_ema=True)


def test_no_code_runs(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.ones(1)}, "config": Malicious()}, tmp_path / "model.pt")
    with pytest.raises(IntegrityError, match="holds more than tensors"):
        read_container(tmp_path / "model.pt")
    assert not MARK


def test_old_torch_files_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(IntegrityError, match="can be mapped"):
        read_container(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated_files(suffix: str, keep: float, tmp_path: Path, dit_state: State) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(dit_state, path) if suffix == ".safetensors" else torch.save(dit_state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(IntegrityError, match=str(path)):
        read_container(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="does not exist"):
        read_container(tmp_path / "no.pt")
    for name in ("weights/dit", "weights/dit.pt", str(tmp_path / "no")):
        with pytest.raises(LongtakeError, match="does not exist") as caught:
            read_container(Path(name))
        assert ("hf download" in str(caught.value)) is (name == "weights/dit"), name
    with pytest.raises(LongtakeError, match=r"cannot tell which file[\s\S]*no weights file"):
        read_container(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(LongtakeError, match=r"not a weights file[\s\S]*\.gguf"):
        read_container(tmp_path / "a.gguf")
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(LongtakeError, match=r"a.safetensors, b.safetensors"):
        read_container(tmp_path)


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(IntegrityError, match="outside its folder"):
        read_container(tmp_path)


def test_not_a_state_dict(preset: Preset) -> None:
    with pytest.raises(IntegrityError, match=r"not a state dict[\s\S]*epoch"):
        convert_dit({"epoch": 3, "x": OrderedDict()}, preset)
    with pytest.raises(IntegrityError, match="are the same once"):
        convert_dit({"x._fsdp_wrapped_module.w": torch.ones(1), "x.w": torch.ones(1)}, preset)


def test_another_networks_file_is_told_apart(preset: Preset, stock_vae: State) -> None:
    with pytest.raises(IntegrityError, match=r"DiT of preset small doesn't fit[\s\S]*fix: .*another network.*--vae"):
        convert_dit(stock_vae, preset)
