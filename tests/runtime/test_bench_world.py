"""PyTorch's side of the benchmark of a world: it computes what the family's own modules do, and yields every figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longtake.formats.recipe import Recipe, recipe_named
from longtake.runtime.backends.base import Backend
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.bench import torch_side
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.torch_world import PlainWorldBackend
from longtake.runtime.generator import Generator
from longtake.runtime.story import Segment
from longtake.training.models.families import family_of
from longtake.training.models.load import Models
from longtake.training.models.presets import PRESETS, Preset
from longtake.training.models.random_weights import fill

from .world.worlds import picture, small_preset

CPU = torch.device("cpu")
CHUNKS = 4  # the sink, and later ones until the window is full


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    return small_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture
def recipe(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """world-tiny's, of the small preset, for as long as the test runs."""
    monkeypatch.setitem(PRESETS, "world-tiny", preset)
    return recipe_named("world-tiny_bf16_sm90")


def models_of(preset: Preset) -> Models:
    family = family_of(preset)
    with torch.device("meta"):
        dit, vae = family.dit(preset), family.vae(preset)
    text = torch.nn.Identity()  # whose embeddings are given
    text.vocabulary = ()  # type: ignore[assignment]
    return Models(preset, fill(dit, CPU, torch.float32), fill(vae, CPU, torch.float32), text)


def latents_of(backend: Backend) -> list[torch.Tensor]:
    """What a session makes with a prompt given as embeddings."""
    generator = Generator(backend, lambda texts, length: torch.ones(len(texts), length, dtype=torch.int32))
    with generator.session((Segment("a room", CHUNKS),), 3, steps=2, decode=False, image=picture()) as session:
        return [chunk.latents.clone() for chunk in session]


class Embedded(PlainWorldBackend):
    """With random embeddings in the text encoder's place."""

    def has(self, network: str) -> bool:
        return network == "text_encoder" or super().has(network)

    def run(self, network, inputs, state=None, commit=True):  # type: ignore[no-untyped-def]
        if network == "text_encoder":
            return embeddings(self)
        return super().run(network, inputs, state, commit)


def embeddings(backend: Backend) -> dict[str, torch.Tensor]:
    text = backend.preset.text
    values = torch.randn(1, text.length, text.dim, generator=torch.Generator().manual_seed(5))
    values[:, text.length // 2 :] = 0  # padding
    return {backend.specs["text_encoder"].outputs[0].name: values}


@pytest.mark.parametrize("compile", [None, {"backend": "eager", "fullgraph": True}], ids=["eager", "one graph"])
def test_the_plain_world_is_our_world(preset: Preset, recipe: Recipe, compile: dict | None) -> None:
    """fp32, until the window is full: softmax and delta blocks, camera branch, slots, and the picture's latent. `fullgraph`
    fails where the compiler would have to break a block in two."""
    models = models_of(preset)
    plain = Embedded(recipe, "torch", models.dit, models.vae, CPU, compile)
    ours = TorchBackend(recipe, models)
    monkey = ours.run
    ours.run = lambda network, *rest, **more: (  # type: ignore[method-assign]
        embeddings(ours) if network == "text_encoder" else monkey(network, *rest, **more)
    )
    for got, expected in zip(latents_of(plain), latents_of(ours), strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-5
        assert float(expected.std()) > 1e-3


def test_its_decoder_streams_as_ours_does(preset: Preset, recipe: Recipe) -> None:
    models = models_of(preset)
    plain = PlainWorldBackend(recipe, "torch_vae", None, models.vae, CPU)
    latents = torch.randn(3, 1, preset.vae.z_channels, *preset.latent_hw, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = models.vae.decode(latents.transpose(0, 1))
    state, got = plain.new_state("vae_steady"), []
    for i, latent in enumerate(latents):
        name = "vae_steady" if i else "vae_first"
        got.append(plain.run(name, {"latent": latent[:, :, None]}, state)["frames"])
    assert torch.allclose(torch.cat(got, 2), expected, atol=1e-5)
    assert plain.vae_conv["bf16"] > 10 and not plain.has("dit")


@pytest.mark.parametrize("part", ["torch", "torch_vae"])
def test_a_world_yields_every_figure(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    options = BenchOptions(recipe="world-tiny_bf16_sm90", steps=1, quick=True, device="cpu", against="torch")
    monkeypatch.setattr(torch_side, "fastest_attention", lambda preset, device: ("cudnn", {"cudnn": 1.0}))
    figures = torch_side.measure_torch(part, options, lambda figures: None)
    assert figures["vae_conv"]["bf16"] > 10
    if part == "torch":
        assert {"dit", "vae", "serial", "end_to_end"} == set(figures["fps"]) and min(figures["fps"].values()) > 0
        assert {"camera", "picture", "denoise_pass", "clean_pass", "latent"} <= {
            *figures["stage_ms"],
            *figures["first_chunk_ms"],
        }
    else:
        assert figures["fps"]["vae_best"] >= figures["fps"]["vae"] > 0
    assert np.isfinite(figures.get("sample", [0.0])).all()
