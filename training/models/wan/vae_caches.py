"""Shapes of the VAE's caches, worked out from its configuration: no module is built for them.

A cache is what a causal convolution keeps of its input: PAST frames, of its width, at its resolution. They come in the
order in which the convolutions run, which `vae.py` and `vae_layers.py` fix; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from longtake.training.models.presets import Preset, VAEConfig

PATCH = 2  # pixel unshuffle before the encoder, pixel shuffle after the decoder
PAST = 2  # frames that a convolution over three sees of the past

Cache = tuple[int, int, int]  # channels, frames, how many times smaller than the pixels on each side


def decoder_cache_shapes(preset: Preset, ops: bool = False, ranks: int = 1) -> list[tuple[int, ...]]:
    """Shapes of the decoder's caches, in binding order: [1, C, T, H, W], or [T, H, W, C] as `ops` have them; or a rank's,
    whose rows below the lowest resolution are its own and ghost rows."""
    shapes = _shapes(_decoder_caches(preset.vae), preset, ops)
    if ranks == 1:
        return shapes
    return [(t, rank_rows(preset, h, ranks), w, c) for t, h, w, c in shapes]


def rank_rows(preset: Preset, rows: int, ranks: int) -> int:
    """Rows of a frame that one of `ranks` has where the whole has `rows`: of the lowest resolution all, of others a share and
    on either side as many ghost rows as `ghost_rows` says."""
    return rows // ranks + 2 * ghost if (ghost := ghost_rows(preset, rows)) else rows


def ghost_rows(preset: Preset, rows: int) -> int:
    """One at the first resolution that ranks share, which upsampling doubles; 0 where they do not share."""
    return rows // (2 * preset.latent_hw[0])


def rows_divide(preset: Preset, ranks: int) -> bool:
    """Whether `ranks` can share the decoder's rows evenly from the first upsampling on."""
    return 2 * preset.latent_hw[0] % ranks == 0 and len(preset.vae.temporal_down) > 0


def encoder_cache_shapes(preset: Preset) -> list[tuple[int, ...]]:
    """Shapes of the encoder's caches, in binding order, [1, C, T, H, W]."""
    return _shapes(_encoder_caches(preset.vae), preset, False)


def _shapes(caches: Iterable[Cache], preset: Preset, ops: bool) -> list[tuple[int, ...]]:
    sizes = ((c, t, preset.height // scale, preset.width // scale) for c, t, scale in caches)
    return [(t, h, w, c) if ops else (1, c, t, h, w) for c, t, h, w in sizes]


def _decoder_caches(config: VAEConfig) -> Iterator[Cache]:
    dims = [config.decoder_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    times, scale = tuple(reversed(config.temporal_down)), PATCH << len(config.temporal_down)
    yield config.z_channels, PAST, scale
    yield from _blocks(dims[0], dims[0], 2, scale)
    for i, (a, b) in enumerate(zip(dims, dims[1:])):
        yield from _blocks(a, b, config.res_blocks + 1, scale)
        if i < len(times):
            if times[i]:
                yield b, PAST, scale
            scale //= 2
    yield dims[-1], PAST, scale


def _encoder_caches(config: VAEConfig) -> Iterator[Cache]:
    dims, scale = [config.encoder_dim * m for m in (1, *config.dim_mult)], PATCH
    yield 3 * PATCH**2, PAST, scale
    for i, (a, b) in enumerate(zip(dims, dims[1:])):
        yield from _blocks(a, b, config.res_blocks, scale)
        if i < len(config.temporal_down):
            scale *= 2
            if config.temporal_down[i]:
                yield b, 1, scale
    yield from _blocks(dims[-1], dims[-1], 2, scale)
    yield dims[-1], PAST, scale


def _blocks(before: int, width: int, count: int, scale: int) -> Iterator[Cache]:
    """Of residual blocks at one resolution: two convolutions each; the first one reads what comes from before."""
    for channels in (before, *[width] * (2 * count - 1)):
        yield channels, PAST, scale
