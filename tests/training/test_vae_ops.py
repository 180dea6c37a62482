"""The VAE decoder with its streams extended by ops: the same frames and caches, and a graph that is cut at the ops."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from longtake.engines.segment import segments_from_onnx
from longtake.export import package
from longtake.export.package import PlainGraphs
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Recipe, recipe_named
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN
from longtake.runtime.backends.segments.arena import memory_layout, storage_bytes
from longtake.runtime.backends.segments.planner import planned_steps
from longtake.runtime.backends.segments.vae_first import first_steps
from longtake.runtime.budget.recorded_steps import library_decoder_steps
from longtake.training.models.presets import TINY
from longtake.training.models.wan.spec import network_spec
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, DecoderSteady
from longtake.training.models.wan.vae_caches import decoder_cache_shapes
from longtake.training.models.wan.vae_layers import channels_last
from longtake.training.models.wan.vae_library import LibrarySteady, library_ops


@pytest.fixture()
def recipe() -> Recipe:
    return replace(recipe_named("tiny_bf16_sm90"), vae_ops="library")


@torch.no_grad()
@pytest.mark.parametrize("count", (1, 2))
@pytest.mark.parametrize("in_place", (False, True))
def test_a_decoder_of_ops_gives_the_same_frames_and_caches(count: int, in_place: bool) -> None:
    torch.manual_seed(0)
    vae = CausalVAE(TINY.vae).eval()
    latents = torch.randn(1, TINY.vae.z_channels, 1 + 3 * count, 4, 4)
    wanted, *plain = DecoderFirst(vae)(latents[:, :, :1])
    got, *caches = DecoderFirst(vae, ops=True)(latents[:, :, :1])
    assert torch.equal(got, wanted)
    for start in range(1, latents.shape[2], count):
        step = latents[:, :, start : start + count]
        wanted, *plain = DecoderSteady(vae)(step, *plain)
        got, *new = LibrarySteady(vae, in_place)(step, *caches)
        assert all(a is b for a, b in zip(new, caches)) == in_place
        caches = new
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(caches, plain, strict=True):
            torch.testing.assert_close(ours, channels_last(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_a_decoder_of_ops_leaves_an_engine_its_ends_and_attention(recipe: Recipe, tmp_path: Path) -> None:
    package._export_network(PlainGraphs(TINY), recipe, "vae_steady", tmp_path, lambda words: None, None)
    cut = segments_from_onnx(read_onnx(tmp_path / "vae_steady.onnx", "small"), "vae_steady")
    ops = Counter(step.name for step in cut.graph.steps if step.kind == "op")
    assert ops == library_ops(CausalVAE(TINY.vae))
    for model in cut.models.values():
        onnx.checker.check_model(model)
        assert all(node.domain != DOMAIN for node in model.graph.node)
    assert len(cut.graph.segments) == 3 == sum(step.kind == "segment" for step in cut.graph.steps)
    weights = {step.inputs[1] for step in cut.graph.steps if step.kind == "op" and op_named(step.name).kernel_size}
    inside = {name for step in cut.graph.steps if step.kind == "segment" for name in step.inputs}
    assert weights <= set(cut.graph.weights) and not weights & inside
    recorded, scratch = library_decoder_steps(TINY), {segment.name: 0 for segment in cut.graph.segments}
    assert [(s.kind, s.name) for s in recorded.steps] == [(s.kind, s.name) for s in cut.graph.steps]
    assert planned_steps(recorded, scratch).layout(scratch)[2] == planned_steps(cut.graph, scratch).layout(scratch)[2]
    sizes = [plan.layout(scratch)[2] for g in (recorded, cut.graph) if (plan := getattr(first_steps(g), "plan", None))]
    assert len(sizes) == 2 and sizes[0] == sizes[1], "the first step can be had from both"
    _, _, size = memory_layout(cut.graph, {*cut.graph.inputs, *cut.graph.outputs, *cut.graph.weights})
    largest = sorted((storage_bytes(cut.graph.tensors[n]) for s in cut.graph.steps for n in s.outputs), reverse=True)
    assert size < 4 * largest[0], "what nobody reads any more gives its place away"


def test_both_networks_have_the_same_caches(recipe: Recipe) -> None:
    first, steady = (network_spec(TINY, recipe, name) for name in ("vae_first", "vae_steady"))
    shapes = decoder_cache_shapes(TINY, True)
    assert [b.shape for b in first.outputs[1:]] == [b.shape for b in steady.inputs[1:]] == shapes
    ops = library_ops(CausalVAE(TINY.vae))
    assert len(steady.aliases) == len(shapes) == sum(ops[name] for name in ("norm_silu_extend", "stream_extend"))
    assert not steady.carried and len(first.carried) == len(shapes)
    plain = [t for _, *t in decoder_cache_shapes(TINY)]
    assert [(c, t, h, w) for t, h, w, c in shapes] == [tuple(s) for s in plain]
