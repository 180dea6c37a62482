"""LoRA merged into the weights: numerics, keys, and what doesn't fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.commands.main import main
from longtake.errors import IntegrityError, LongtakeError
from longtake.paths import REPOSITORY
from longtake.training.convert.files import read_container
from longtake.training.convert.lora_scale import LoraScale, stored_scale
from longtake.training.convert.models import convert_dit
from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears

State = dict[str, Tensor]
RANK = 4


@pytest.fixture
def lora(preset: Preset, dit_state: State) -> State:
    generator = torch.Generator().manual_seed(1)
    state = {}
    with torch.device("meta"):
        names = quantized_linears(CausalDiT(preset.dit))
    for name in names:
        out, into = dit_state[f"{name}.weight"].shape
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return state


def merged(dit_state: State, lora: State, scale: float) -> State:
    """W + scale B A in float64, rounded once."""
    result = dict(dit_state)
    for key, a in lora.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = lora[key.replace("lora_A", "lora_B")]
            result[f"{name}.weight"] = (
                dit_state[f"{name}.weight"].double() + scale * (b.double() @ a.double())
            ).bfloat16()
    return result


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merge_is_in_fp32_and_rounded_once(scale: float, preset: Preset, dit_state: State, lora: State) -> None:
    got = convert_dit(dit_state, preset, lora=lora, lora_scale=LoraScale(factor=scale)).state_dict()
    wanted = merged(dit_state, lora, scale)
    changed = 0
    for name, tensor in wanted.items():
        assert got[name].dtype == torch.bfloat16
        # A tie in float64 may fall to the other side in fp32: one rounding step, and almost never.
        assert (got[name] != tensor).float().mean() < 1e-3
        assert torch.allclose(got[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        changed += not torch.equal(tensor, dit_state[name])
    assert changed == 10 * preset.dit.layers


def test_generator_lora_needs_a_base(preset: Preset, dit_state: State, lora: State) -> None:
    with pytest.raises(LongtakeError, match=r"LoRA only[\s\S]*--base"):
        convert_dit({"generator_lora": lora, "step": 3}, preset)
    alone = convert_dit({"generator_lora": lora}, preset, base={"generator": dit_state})
    beside = convert_dit(dit_state, preset, lora={"generator_lora": lora})
    assert alone.meta["source"]["entry"] == "generator + generator_lora" and alone.meta["lora"] == {
        "merged": 1,
        "scale": 1.0,
    }
    assert all(torch.equal(x, beside.state_dict()[name]) for name, x in alone.state_dict().items())


def test_adapter_names_in_keys(preset: Preset, dit_state: State, lora: State) -> None:
    named = {key.replace(".weight", ".default.weight"): value for key, value in lora.items()}
    one, other = (convert_dit(dit_state, preset, lora=x).state_dict() for x in (lora, named))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lora_that_does_not_fit(preset: Preset, dit_state: State, lora: State) -> None:
    first = next(iter(lora))
    with pytest.raises(IntegrityError, match=r"1 LoRA pairs are not whole[\s\S]*blocks.0.self_attn.q \(only lora_B\)"):
        convert_dit(dit_state, preset, lora={key: value for key, value in lora.items() if key != first})
    with pytest.raises(IntegrityError, match=r"doesn't fit blocks.0.self_attn.q"):
        convert_dit(dit_state, preset, lora={**lora, first: torch.ones(RANK, 7)})
    strange = {key.replace("blocks.1.", "blocks.9."): value for key, value in lora.items()}
    with pytest.raises(IntegrityError, match=r"10 linears that the model lacks[\s\S]*blocks.9.cross_attn.k"):
        convert_dit(dit_state, preset, lora=strange)
    with pytest.raises(LongtakeError, match="holds no LoRA"):
        convert_dit(dit_state, preset, lora=dit_state)


def test_scale_of_the_adapter_config(tmp_path: Path) -> None:
    assert stored_scale(tmp_path / "lora.pt").of("blocks.0.ffn.0", 128) == 1.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64, "r": 128}))
    assert stored_scale(tmp_path / "lora.pt").of("blocks.0.ffn.0", 128) == 0.5


# ---- scales and layouts ----------------------------------------------------------------------------------------------


def peft_merged(dit_state: State, config: Any, tensors: dict[str, tuple[Tensor, Tensor]]) -> State:
    """What PEFT itself makes of the weights, in fp32."""
    from peft import inject_adapter_in_model

    model = nn.Module()
    for name in tensors:
        place = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        weight = dit_state[f"{name}.weight"].float()
        place.add_module(last, nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        getattr(place, last).weight.data.copy_(weight)
    inject_adapter_in_model(config, model)
    result = {}
    for name, (a, b) in tensors.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
        result[f"{name}.weight"] = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"ffn.0": 2}, "alpha_pattern": {"ffn.0": 16, "q": 3}},
        {"rank_pattern": {r"blocks\.1\..*": 2}, "alpha_pattern": {"blocks.0.self_attn.q": 5}, "use_rslora": True},
    ],
)
@pytest.mark.parametrize("in_header", [False, True])
def test_scales_are_pefts(
    settings: dict[str, Any], in_header: bool, preset: Preset, dit_state: State, tmp_path: Path
) -> None:
    from peft import LoraConfig  # which takes seconds

    names = ["blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.1.cross_attn.q"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, **settings)
    tensors = {}
    for number, name in enumerate(names):
        rank = next((r for key, r in config.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)), 4)
        generator = torch.Generator().manual_seed(number)
        out, into = dit_state[f"{name}.weight"].shape
        tensors[name] = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    state = {
        f"base_model.model.{name}.lora_{side}.weight": x for name, ab in tensors.items() for side, x in zip("AB", ab)
    }
    values = {key: value for key, value in config.to_dict().items() if isinstance(value, (int, bool, dict))}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in values.items()})}
    save_file(state, tmp_path / "adapter_model.safetensors", metadata=header if in_header else None)
    if not in_header:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    got = convert_dit(
        dit_state, preset, dtype=torch.float32, lora=read_container(tmp_path), lora_scale=stored_scale(tmp_path)
    ).state_dict()
    for name, wanted in peft_merged(dit_state, config, tensors).items():
        assert torch.allclose(got[name], wanted, rtol=1e-5, atol=1e-6), name


def test_one_lora_in_three_layouts_merges_to_the_same_bits(
    preset: Preset, dit_state: State, lora: State, tmp_path: Path
) -> None:
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in lora}
    of = {(name, side): lora[f"base_model.model.{name}.lora_{side}.weight"] for name in names for side in "AB"}
    layouts: dict[str, State] = {
        "peft": lora,
        "kohya": {f"lora_unet_{name.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight": x
                  for (name, side), x in of.items()} | {
                      f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(6.0) for name in names},
        "comfy": {f"diffusion_model.{name}.lora_{side}.weight": x for (name, side), x in of.items()} | {
            f"diffusion_model.{name}.alpha": torch.tensor(6.0, dtype=torch.bfloat16) for name in names},
        "comfy without alphas": {f"diffusion_model.{name}.lora_{side}.weight": x for (name, side), x in of.items()},
    }  # fmt: skip
    results = []
    for layout, state in layouts.items():
        folder = tmp_path / layout
        folder.mkdir()
        header = {"lora_alpha": "6", "rank": str(RANK)} if layout == "comfy without alphas" else None
        save_file(state, folder / "lora.safetensors", metadata=header)
        if layout == "peft":
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 6}))
        path = folder / "lora.safetensors"
        model = convert_dit(dit_state, preset, lora=read_container(path), lora_scale=stored_scale(path))
        assert model.meta["lora"] == {"merged": 1, "scale": 1.5}
        results.append(model.state_dict())
    wanted = merged(dit_state, lora, 1.5)
    for name, tensor in results[0].items():
        assert all(torch.equal(tensor, other[name]) for other in results[1:])
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=2**-7, atol=1e-6)


def test_the_scale_of_our_own_lora_is_beside_it(tmp_path: Path) -> None:
    facts = {"distillation": {"lora": {"rank": 8, "alpha": 2}}}
    (tmp_path / "student_lora.json").write_text(json.dumps(facts))
    assert stored_scale(tmp_path / "student_lora.safetensors").of("blocks.0.ffn.0", 8) == 0.25


@pytest.mark.parametrize(
    "key, kind",
    [
        ("blocks.0.ffn.0.lora_magnitude_vector", "DoRA"),
        ("lora_unet_blocks_0_ffn_0.dora_scale", "DoRA"),
        ("lora_unet_blocks_0_ffn_0.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.ffn.0.diff_b", "a LoRA with full differences"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_other_adapters_are_named(
    key: str, kind: str, alone: bool, preset: Preset, dit_state: State, lora: State
) -> None:
    state = {key: torch.ones(4)} | ({} if alone else lora)
    with pytest.raises(LongtakeError, match=rf"this is {kind}, not a plain LoRA\n  got: {key}[\s\S]*fix: merge it"):
        convert_dit(dit_state, preset, lora=state)


@pytest.mark.parametrize(
    "settings, kind",
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA on weights changed by pissa"),
    ],
)
def test_other_kinds_of_a_configuration_are_named(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LongtakeError, match=f"this is {kind}, not a plain LoRA"):
        stored_scale(tmp_path)


def test_a_rank_that_is_not_the_stated_one(preset: Preset, dit_state: State, lora: State) -> None:
    with pytest.raises(IntegrityError, match="another rank than .* says\n  got: 4\n  expected: 8"):
        convert_dit(dit_state, preset, lora=lora, lora_scale=LoraScale(8.0, 8))


@pytest.mark.parametrize("alpha", [torch.ones(3), torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(0)])
def test_an_alpha_that_is_no_number_merges_nothing_unseen(
    alpha: Tensor, preset: Preset, dit_state: State, lora: State
) -> None:
    key = next(iter(lora)).partition(".lora_")[0] + ".alpha"
    with pytest.raises(IntegrityError, match=r"q.alpha is no alpha[\s\S]*expected: one positive number"):
        convert_dit(dit_state, preset, lora={**lora, key: alpha})


def test_two_alphas_of_one_linear_are_refused(preset: Preset, dit_state: State, lora: State) -> None:
    name = next(iter(lora)).partition(".lora_")[0].removeprefix("base_model.model.")
    alphas = {f"{prefix}{name}.alpha": torch.tensor(4.0) for prefix in ("", "diffusion_model.")}
    with pytest.raises(IntegrityError, match="linears twice"):
        convert_dit(dit_state, preset, lora={**lora, **alphas})


def test_a_lora_of_rank_0_does_not_fit(preset: Preset, dit_state: State, lora: State) -> None:
    empty = {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in lora.items()}
    with pytest.raises(IntegrityError, match="doesn't fit blocks.0.self_attn.q"):
        convert_dit(dit_state, preset, lora=empty, lora_scale=LoraScale(8.0))


@pytest.mark.parametrize(
    "settings", [{"use_rslora": "false"}, {"lora_alpha": float("inf")}, {"alpha_pattern": {"q": "nan"}}]
)
def test_settings_that_are_no_numbers_are_not_guessed(settings: dict[str, Any], tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LongtakeError, match="doesn't say how a LoRA is scaled"):
        stored_scale(tmp_path)


def test_a_scale_or_a_base_that_changes_nothing_is_refused(
    preset: Preset, dit_state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LongtakeError, match="(?s)--base is the weights under.*full weights"):
        convert_dit(dit_state, preset, base=dit_state)
    whole = str(REPOSITORY / "training" / "checkpoints" / "tiny" / "dit.safetensors")
    words = ["--preset", "tiny", "--dit", whole, "--lora-scale", "0.5", "--out", str(tmp_path / "out")]
    assert main(["convert", *words]) == 2
    assert "--lora-scale without a LoRA" in capsys.readouterr().err and not (tmp_path / "out" / "dit.json").exists()


def test_two_adapters_in_one_file_are_refused(preset: Preset, dit_state: State, lora: State) -> None:
    both = lora | {key.replace(".weight", ".other.weight"): value for key, value in lora.items()}
    with pytest.raises(IntegrityError, match=r"linears twice[\s\S]*one adapter"):
        convert_dit(dit_state, preset, lora=both)
