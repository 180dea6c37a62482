"""The reference backend on a real export (one layer, 64 x 64 pixels) against PyTorch, and what damaged files get."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from held_weights import weights_from_models
from shared_graphs import SharedGraphs
from untrained import random_models

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.export.package import export_package
from longtake.formats.recipe import Recipe, recipe_named
from longtake.runtime.backends.base import Backend
from longtake.runtime.backends.reference import ReferenceBackend
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.session import Session
from longtake.runtime.sources import Source, backend_from_source, choose_backend, source_from_name
from longtake.runtime.story import Segment
from longtake.training.models.load import Models
from longtake.training.models.presets import TINY
from longtake.training.models.text.words import tokenize

pytestmark = pytest.mark.slow  # one export, PyTorch to ONNX, for the whole file

SCRIPT = (
    Segment("a green seven drifts left", 2),
    Segment("a red two circles", 2, cut=True),
    Segment("a green seven rises", 2, cut=True),
)


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(replace(TINY, dit=replace(TINY.dit, layers=1), height=64, width=64), seed=4)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_named("tiny_w4a16_sm90")


@pytest.fixture(scope="module")
def exported(models: Models, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / recipe.onnx_name
    graphs = SharedGraphs(models.preset, tmp_path_factory)
    export_package(graphs, recipe, folder, "inputs", lambda words: None, weights_from_models(models))
    return folder


@pytest.fixture(scope="module")
def reference(models: Models, recipe: Recipe, exported: Path) -> Iterator[ReferenceBackend]:
    backend = ReferenceBackend(exported, recipe, preset=models.preset)
    yield backend
    backend.close()


def start(backend: Backend, models: Models, seed: int = 1) -> Session:
    generator = Generator(backend, partial(tokenize, vocabulary=models.vocabulary))
    return generator.session(SCRIPT, seed=seed, steps=2, guidance=2.0)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_each_chunk_agrees_with_pytorch_from_the_same_context(
    reference: ReferenceBackend, models: Models, recipe: Recipe
) -> None:
    """Both continue from the reference's snapshot, so errors cannot add up over chunks. The cache is in 4 bits."""
    ours, oracle = start(reference, models), start(TorchBackend(recipe, models), models)
    for _ in range(5):
        oracle.restore(ours.snapshot())
        chunk, wanted = next(ours), next(oracle)
        assert (chunk.index, chunk.cut, chunk.visible) == (wanted.index, wanted.cut, wanted.visible)
        assert relative_error(chunk.latents, wanted.latents) < recipe.gate.dit
        assert abs(chunk.frames.astype(int) - wanted.frames.astype(int)).mean() < 2.0  # of 255
    assert chunk.visible == (0, 2, 3, 4)
    ours.close(), oracle.close()


def test_only_the_written_slot_changes(reference: ReferenceBackend, models: Models) -> None:
    session = start(reference, models)
    before: dict[str, torch.Tensor] = {}
    for written in (0, 1, 2, 3, 1):
        next(session).frames  # noqa: B018
        now = {name: tensor.clone() for name, tensor in session._state.tensors().items()}
        for name, tensor in now.items():
            changed = [s for s in range(4) if name in before and not torch.equal(tensor[s], before[name][s])]
            assert changed in ([], [written]), (name, changed)
        assert any(not torch.equal(now[n][written], before[n][written]) for n in before) or not before
        before = now
    session.close()


def test_cache_is_four_and_a_half_bits(reference: ReferenceBackend, models: Models) -> None:
    values, scales, amax = list(reference.new_state("dit").tensors.values())[:3]
    elements = 4 * 2 * models.preset.chunk_tokens * 4 * 64
    assert {values.dtype, scales.dtype} == {torch.int8} and amax.shape == (4, 2)
    assert 8 * (values.nbytes + scales.nbytes) / elements == 4.5


def test_save_and_load(reference: ReferenceBackend, models: Models, tmp_path: Path) -> None:
    session = start(reference, models)
    for _ in range(3):
        next(session)
    session.save(tmp_path / "s.st")
    rest = list(session)
    generator = Generator(reference, partial(tokenize, vocabulary=models.vocabulary))
    with generator.load_session(tmp_path / "s.st") as loaded:
        again = list(loaded)
        assert all(torch.equal(a.latents, b.latents) and (a.frames == b.frames).all() for a, b in zip(rest, again))
    assert len(rest) == len(again) == 3
    session.close()


@pytest.mark.parametrize("name", ["dit.ort.onnx", "vae_steady.ort.onnx", "context.ort.onnx"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "swapped"])
def test_damaged_networks_are_refused(
    models: Models, recipe: Recipe, exported: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / recipe.onnx_name
    shutil.copytree(exported, folder)
    path = folder / name
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        shutil.copyfile(folder / "text_encoder.ort.onnx", path)
    with pytest.raises(IntegrityError, match=f"(?s){name}.*fix: .*longtake export"):
        ReferenceBackend(folder, recipe, preset=models.preset)


def test_another_recipes_networks_are_refused(exported: Path) -> None:
    with pytest.raises(LongtakeError, match="of another recipe"):
        ReferenceBackend(exported, recipe_named("tiny_bf16_sm90"))


def test_a_folder_of_exports_is_a_source(exported: Path, models: Models) -> None:
    source = source_from_name(exported)
    assert source.recipe.onnx_name == "tiny_w4a16" and source.engines is None
    assert source.vocabulary == tuple(models.vocabulary)


def test_the_choice_says_why(exported: Path, recipe: Recipe) -> None:
    choice = choose_backend(source_from_name(exported), "auto")
    assert choice.backend == "reference" and choice.reason


@pytest.mark.parametrize("asked", ["fused", "segmented"])
def test_a_backend_that_cannot_be_had_is_an_error(exported: Path, recipe: Recipe, asked: str) -> None:
    with pytest.raises(UnavailableError, match=f"backend {asked} (cannot run|has no plans)"):
        backend_from_source(Source(recipe, exported, None, None), asked, None)


def test_an_unknown_backend(exported: Path, recipe: Recipe) -> None:
    with pytest.raises(LongtakeError, match="unknown backend"):
        backend_from_source(Source(recipe, exported, None, None), "onnx", None)
