"""Weights read back from an exported file: right ones agree in every recipe, a wrong one is named whatever it is worth."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from longtake.accuracy.compare import recipe_models
from longtake.accuracy.rows import Row, require_gate
from longtake.accuracy.stored import stored_rows
from longtake.errors import GateError
from longtake.formats.onnx_file import data_path, read_onnx, tensor_content
from longtake.formats.recipe import Recipe
from longtake.training.models.families import family_of
from longtake.training.models.load import Models

Package = Callable[[str], tuple[Models, Recipe, Path]]
LINEAR = "blocks.1.ffn.0.weight"


def rows_of(models: Models, recipe: Recipe, network: str, path: Path) -> list[Row]:
    oracle = recipe_models(models, recipe.precision)
    return list(stored_rows(family_of(models.preset).module(oracle, recipe, network), network, path))


@pytest.mark.parametrize("precision", ("bf16", "w4a16", "nvfp4", "fp8"))
def test_right_weights_agree_and_each_wrong_one_is_named(package: Package, precision: str, tmp_path: Path) -> None:
    models, recipe, folder = package(precision)
    for network in family_of(models.preset).networks(models.preset):
        rows = rows_of(models, recipe, network, folder / f"{network}.onnx")
        assert rows and all(row.error < 1e-6 for row in rows), max(rows, key=lambda row: row.error)
    kept = {t.name for t in read_onnx(folder / "dit.onnx", "none").graph.initializer}
    for part in (part for part in ("", ".values", ".scales", ".scale") if LINEAR + part in kept):
        change = a_hundredth if part == ".scale" else one_bit
        assert wrong(package, precision, tmp_path, LINEAR + part, change) == [LINEAR]
    assert wrong(package, precision, tmp_path, "blocks.0.self_attn.o.bias", other_sign) == ["blocks.0.self_attn.o.bias"]
    assert wrong(package, precision, tmp_path, "blocks.1.modulation", rolled) == ["blocks.1.modulation"]


def wrong(
    package: Package, precision: str, into: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> list[str]:
    """The weights that fail once the bytes of initializer `name` of the DiT are changed; nobody tells their digests."""
    models, recipe, folder = package(precision)
    for file in (folder / "dit.onnx", data_path(folder / "dit.onnx")):
        shutil.copy(file, into)
    path = into / "dit.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    raw = change(tensor_content(tensor, path)).tobytes()
    if place := {pair.key: pair.value for pair in tensor.external_data}:
        with open(data_path(path), "r+b") as data:
            data.seek(int(place["offset"]))
            data.write(raw)
    else:
        tensor.raw_data = raw
        path.write_bytes(model.SerializeToString())
    rows = rows_of(models, recipe, "dit", path)
    with pytest.raises(
        GateError, match=rf"(?s)as stored, {LINEAR if LINEAR in name else name}: .*plays no part.*digests"
    ):
        require_gate(rows, "test")
    return [row.output for row in rows if not row.passed]


def one_bit(raw: np.ndarray) -> np.ndarray:
    """The last bit of a code, of an E4M3 scale's or a bf16 weight's mantissa."""
    raw[4] ^= 1
    return raw


def a_hundredth(raw: np.ndarray) -> np.ndarray:
    """Of an fp32 scale, the last bit that bf16 would have, too."""
    raw[2] ^= 1
    return raw


def other_sign(raw: np.ndarray) -> np.ndarray:
    """The last bf16 gets a value it did not have: a bias of zeros, too."""
    raw[-2:] = (raw[-2:].view(np.uint16) ^ np.uint16(0x3F80)).view(np.uint8)
    return raw


def rolled(raw: np.ndarray) -> np.ndarray:
    return np.roll(raw, len(raw) // 6)
