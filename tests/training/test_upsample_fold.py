from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longtake.training.presets import TINY, WAN22_TI2V_5B
from longtake.training.upsample_fold import FoldedUpConv, fold_upsampling
from longtake.training.vae import CausalVAE, DecoderSteady, decoder_cache_shapes
from longtake.training.vae_layers import UpConv


@pytest.mark.parametrize("shape", [(1, 6, 1, 1, 1), (1, 6, 2, 1, 5), (2, 6, 3, 4, 7)])
def test_folded_convolution_is_the_same_function(shape: tuple[int, ...]) -> None:
    """Borders included, where zero padding meets the upsampled picture: hence sizes down to one pixel."""
    torch.manual_seed(0)
    plain = UpConv(6).double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    folded = FoldedUpConv(plain).double()
    # Weights are summed in fp32, so equality is fp32's.
    torch.testing.assert_close(folded(x), plain(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_folded_decoder_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = CausalVAE(TINY.vae).eval()
    latents = torch.randn(1, 3, TINY.vae.z_channels, 4, 4)
    wanted = vae.decode(latents)
    folded = copy.deepcopy(vae)
    assert fold_upsampling(folded.decoder) == 3 and fold_upsampling(folded.decoder) == 0
    assert folded.state_dict().keys() == vae.state_dict().keys()
    got = folded.decode(latents)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert vae.decode(latents).equal(wanted)  # the original is untouched


def test_it_saves_a_thirteenth_of_the_large_decoder() -> None:
    """Counted on the meta device at 704x1280: 66.4 TFLOP a latent, of which 9.0 become 4.0."""
    preset = WAN22_TI2V_5B
    with torch.device("meta"):
        vae = CausalVAE(preset.vae).requires_grad_(False)
        inputs = [torch.empty(1, preset.vae.z_channels, 1, *preset.latent_hw)]
        inputs += [torch.empty(shape) for shape in decoder_cache_shapes(preset)]
    flops = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            DecoderSteady(vae)(*inputs)
        flops.append(counter.get_total_flops() / 1e12)
        fold_upsampling(vae)
    assert flops == pytest.approx([66.4, 61.4], abs=0.1)
