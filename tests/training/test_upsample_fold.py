from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longtake.export.package import PlainGraphs
from longtake.formats.recipe import recipe_named
from longtake.training.models.presets import TINY, WAN22_TI2V_5B
from longtake.training.models.wan.vae import CausalVAE, DecoderFirst, DecoderSteady, decoder_cache_shapes
from longtake.training.models.wan.vae_layers import UpConv


@pytest.mark.parametrize("shape", [(1, 6, 1, 1, 1), (1, 6, 2, 1, 5), (2, 6, 3, 4, 7)])
def test_folded_convolution_is_the_same_function(shape: tuple[int, ...]) -> None:
    """Borders included, where zero padding meets the upsampled picture: hence sizes down to one pixel."""
    torch.manual_seed(0)
    conv = UpConv(6).double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(conv(x, fold=True), conv(x, fold=False), rtol=0, atol=1e-13)


@torch.no_grad()
def test_folded_decoder_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = CausalVAE(TINY.vae).eval()
    latents = torch.randn(1, TINY.vae.z_channels, 2, 4, 4)
    frames: dict[bool, torch.Tensor] = {}
    for fold in (False, True):
        first, *caches = DecoderFirst(vae, fold=fold)(latents[:, :, :1])
        frames[fold] = torch.cat([first, DecoderSteady(vae, fold=fold)(latents[:, :, 1:], *caches)[0]], 2)
    assert (frames[True] - frames[False]).abs().max() <= 1e-5 * frames[False].abs().max()
    assert not frames[True].equal(frames[False])  # or nothing was folded


def test_a_recipe_turns_it_on_without_touching_weights() -> None:
    graphs, recipe = PlainGraphs(TINY), recipe_named("tiny_bf16_sm90")
    plain, folded = (graphs.graph("vae_steady", r) for r in (recipe, replace(recipe, vae_fold_upsampling=True)))

    def weights(model: onnx.ModelProto) -> dict[str, list[int]]:
        return {t.name: list(t.dims) for t in model.graph.initializer if t.name.startswith("decoder.")}

    def kernels(model: onnx.ModelProto) -> int:
        """Convolutions whose kernel is a weight as it is."""
        return sum(node.op_type == "Conv" and node.input[1] in weights(model) for node in model.graph.node)

    assert weights(plain) == weights(folded) and len(weights(plain)) > 50
    assert kernels(plain) - kernels(folded) == 3


def test_it_saves_a_thirteenth_of_the_large_decoder() -> None:
    """Counted on the meta device at 704x1280: 66.4 TFLOP a latent, of which 9.0 become 4.0."""
    preset = WAN22_TI2V_5B
    with torch.device("meta"):
        vae = CausalVAE(preset.vae).requires_grad_(False)
        inputs = [torch.empty(1, preset.vae.z_channels, 1, *preset.latent_hw)]
        inputs += [torch.empty(shape) for shape in decoder_cache_shapes(preset)]
    flops = []
    for fold in (False, True):
        with FlopCounterMode(display=False) as counter:
            DecoderSteady(vae, fold=fold)(*inputs)
        flops.append(counter.get_total_flops() / 1e12)
    assert flops == pytest.approx([66.4, 61.4], abs=0.1)
