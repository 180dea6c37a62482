from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.commands.main import main
from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.bench.umt5 import random_source, report
from longtake.training.models.checkpoint import save_checkpoint
from longtake.training.models.load import load_models
from longtake.training.models.presets import TINY, WAN22_TI2V_5B, TextEncoderConfig
from longtake.training.models.side_file import SideFile
from longtake.training.models.text import runner as text_runner
from longtake.training.models.text.runner import TextRunner, text_runner_for
from longtake.training.models.text.umt5 import UMT5
from longtake.training.models.text.umt5_paged import (
    STORAGES,
    PagedUMT5,
    device_bytes,
    int8_rows,
    source_from_state,
    stored_bytes,
)

CPU = torch.device("cpu")
CONFIG = TextEncoderConfig(kind="umt5", dim=128, layers=5, heads=4, length=40, ffn_dim=192, vocabulary=300)
READER = replace(WAN22_TI2V_5B.dit, text_dim=CONFIG.dim, text_len=CONFIG.length)
PRESET = replace(WAN22_TI2V_5B, name="small-umt5", text=CONFIG, dit=READER)
FULL = WAN22_TI2V_5B.text


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    shapes = UMT5(CONFIG).state_dict()
    return dict(random_source(CONFIG, CPU)(set(shapes)))


def module_of(state: dict[str, Tensor]) -> UMT5:
    module = UMT5(CONFIG)
    module.load_state_dict(state, assign=True)
    return module.eval()


def prompt(length: int = 29) -> Tensor:
    tokens = torch.zeros(1, CONFIG.length, dtype=torch.int32)
    tokens[0, :length] = torch.randint(2, CONFIG.vocabulary, (length,), generator=torch.Generator().manual_seed(length))
    return tokens


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
@pytest.mark.parametrize("resident", [True, False])
def test_bf16_is_bit_equal_to_the_module_in_bf16(state: dict[str, Tensor], resident: bool) -> None:
    encoder = PagedUMT5(CONFIG, source_from_state(state), CPU, "bf16", resident)
    tokens = torch.cat([prompt(), prompt(3), prompt(40)])
    got = encoder(tokens)
    assert got.dtype == torch.float32 and got.shape == (3, 40, 128) and not got[1, 3:].any()
    assert torch.equal(got, module_of(state)(tokens))
    assert torch.equal(encoder(tokens), got)


@torch.no_grad()
def test_int8_costs_a_few_times_what_bf16_does(state: dict[str, Tensor]) -> None:
    exact = module_of({name: tensor.float() for name, tensor in state.items()})(prompt())
    paged, resident, reference = (
        PagedUMT5(CONFIG, source_from_state(state), CPU, storage, resident)(prompt())
        for storage, resident in (("int8", False), ("int8", True), ("bf16", False))
    )
    assert torch.equal(paged, resident)
    own = error(reference, exact)
    assert own < 0.015 and own < error(paged, exact) < 3 * own
    assert error(paged, reference) < 0.03


def test_int8_rows_round_trip_and_survive_zeros() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 6)[:, None]
    weight[3] = 0
    rounded, scale = int8_rows(weight.to(torch.bfloat16))
    back = rounded.float() * scale[:, None]
    assert rounded.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]
    assert ((back - weight.to(torch.bfloat16).float()).abs() <= scale[:, None] * 0.5001).all() and back.isfinite().all()


def test_one_layer_at_a_time_is_read(state: dict[str, Tensor]) -> None:
    asked: list[set[str]] = []

    def source(names: set[str]) -> Iterator[tuple[str, Tensor]]:
        asked.append(names)
        return source_from_state(state)(names)

    PagedUMT5(CONFIG, source, CPU)
    assert len(asked) == 6 and all(name.startswith("blocks.2.") for name in asked[3])
    assert set().union(*asked) == state.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("blocks.3.ffn.up.weight"), "no blocks.3.ffn.up.weight"),
        (lambda state: state.update({"norm.weight": torch.ones(7)}), r"norm.weight \[7\] instead of \[128\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(state: dict[str, Tensor], change: object, said: str) -> None:
    altered = dict(state)
    change(altered)  # type: ignore[operator]
    with pytest.raises(IntegrityError, match=said):
        PagedUMT5(CONFIG, source_from_state(altered), CPU)


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(LongtakeError, match="bf16 or int8"):
        PagedUMT5(CONFIG, source_from_state({}), CPU, "fp4")


def test_full_size_footprints() -> None:
    """umT5-XXL: 4.6 G weights of layers; two pages on the device, and at most 0.5 GB beside them."""
    assert stored_bytes(FULL, "bf16") == pytest.approx(386e6, rel=0.001)
    assert stored_bytes(FULL, "int8") == pytest.approx(193e6, rel=0.001)
    assert device_bytes(FULL, "bf16", resident=False) < 1.3e9
    assert device_bytes(FULL, "int8", resident=False) < 0.9e9
    assert 9.2e9 < device_bytes(FULL, "bf16", resident=True) < 9.8e9
    assert 4.6e9 < device_bytes(FULL, "int8", resident=True) < 5.2e9


def test_the_last_prompts_are_kept() -> None:
    encoded: list[int] = []

    def encode(tokens: Tensor) -> Tensor:
        encoded.append(int(tokens.sum()))
        return tokens.float()

    runner = TextRunner(encode, kept=2)
    one, two, three = (torch.full((1, 4), i, dtype=torch.int32) for i in (1, 2, 3))
    for tokens in (one, two, one, three, one, two):
        assert torch.equal(runner(tokens), tokens.float())
    assert encoded == [4, 8, 12, 8]


@torch.no_grad()
def test_the_runner_reads_a_checkpoint(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "text_encoder.safetensors", state, SideFile("text_encoder", PRESET.name))
    runner = text_runner_for(PRESET, tmp_path, CPU)
    assert torch.equal(runner(prompt()), module_of(state)(prompt()))
    assert error(text_runner_for(PRESET, tmp_path, CPU, storage="int8")(prompt()), runner(prompt())) < 0.03
    with pytest.raises(LongtakeError, match="does not exist"):
        text_runner_for(PRESET, tmp_path / "nowhere", CPU)


@torch.no_grad()
def test_the_runner_of_words_is_the_module() -> None:
    models = load_models(TINY)
    tokens = models.text.tokenize(["a green seven drifts left"])
    assert torch.equal(text_runner_for(TINY, None, CPU)(tokens), models.text(tokens))
    assert text_runner.KEPT > 1


def test_the_bench_measures_every_storage(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(CONFIG, CPU, repeats=1)
    assert [(row["storage"], row["resident"]) for row in found["rows"]] == [
        (s, r) for s in STORAGES for r in (True, False)
    ]
    bf16, paged, int8, _ = found["rows"]
    assert bf16["error"] == paged["error"] == 0 < int8["error"] < 0.03 and paged["ms"] > 0
    assert main(["bench", "umt5", "--bench"]) == 2
    assert "--bench" in capsys.readouterr().err


@pytest.mark.gpu
@torch.no_grad()
def test_on_the_gpu_pages_are_the_module_and_stay_within_the_promise() -> None:
    """Full width, six layers: enough that both slots are reused."""
    device, config = torch.device("cuda:0"), replace(FULL, layers=6)
    tokens = torch.randint(2, config.vocabulary, (1, config.length), dtype=torch.int32)
    found = {}
    for storage in STORAGES:
        for resident in (True, False):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            encoder = PagedUMT5(config, random_source(config, device), device, storage, resident)
            torch.cuda.reset_peak_memory_stats()
            found[storage, resident] = encoder(tokens)
            assert torch.equal(found[storage, resident], encoder(tokens))
            taken = torch.cuda.max_memory_allocated() - before - sum(f.nbytes for f in found.values())
            assert taken <= device_bytes(config, storage, resident)
            del encoder
    for storage in STORAGES:  # the same kernels on the same bytes: an early or late copy would show
        assert torch.equal(found[storage, True], found[storage, False])
    assert error(found["int8", True], found["bf16", True]) < 0.05


@pytest.mark.gpu
@pytest.mark.slow
def test_bench_at_full_size_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "umt5", "--repeats", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row in found["rows"]:
        assert row["peak_bytes"] <= row["promised_bytes"], row
        assert row["ms"] < 2000, row
