"""A small world exported: its networks in ONNX Runtime against PyTorch, and a video by the reference backend, every state
slot written more than once. One export for the whole file."""

from __future__ import annotations

from pathlib import Path

import pytest
from held_weights import weights_from_models
from worlds import digest, picture

from longtake.accuracy.compare import compare_networks
from longtake.export.package import PlainGraphs, export_package
from longtake.formats.exported import Export
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.reference import ReferenceBackend
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.view import View
from longtake.training.models.load import Models
from longtake.training.models.presets import WorldPreset
from longtake.training.models.text.words import tokenize

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]  # one export, PyTorch to ONNX, of a dozen networks


@pytest.fixture(scope="module")
def exported(models: Models, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / recipe.onnx_name
    weights = weights_from_models(models)
    export_package(PlainGraphs(models.preset), recipe, folder, "inputs", lambda words: None, weights)
    return folder


def test_the_manifest_tells_the_dialect(exported: Path) -> None:
    told = Export.read(exported).recipe
    assert told is not None and isinstance(told.model, WorldPreset)
    assert told.model.dit.dialect.camera_conv_tail and told.model.dit.dialect.ray_clip == "none"


def test_networks_in_onnx_runtime_are_those_in_pytorch(exported: Path, models: Models, recipe: Recipe) -> None:
    rows = list(compare_networks(models, recipe, exported))
    assert {row.network for row in rows} >= {"camera", "context", "dit", "vae_first", "vae_steady"}
    # the view computes in fp32 throughout, and so does the oracle here
    assert max(row.error for row in rows) < 1e-4, max(rows, key=lambda row: row.error)


def test_a_video_is_pytorchs(exported: Path, models: Models, recipe: Recipe) -> None:
    view = View(action="w-30, wa-60")
    ours, theirs = (
        Generator(backend, tokenize).session(["a room"] * 4, seed=2, image=picture(), view=view, steps=2)
        for backend in (ReferenceBackend(exported, recipe), TorchBackend(recipe, models))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.latents - other.latents).norm() / other.latents.norm()) < 1e-3
        assert (
            one.frames.shape == other.frames.shape
            and abs(one.frames.astype(int) - other.frames.astype(int)).mean() < 0.5
        )
    again = digest(ours)
    snapshot = ours.snapshot()
    ours.restore(snapshot)
    assert digest(ours) == again
