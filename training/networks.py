"""The networks that become engines: flat, positional modules around the models, one a name in engines/spec.py.

Legend: C latent channels, F latent frames of a chunk, T tokens of a chunk, E text length, W window length.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.plugins.nvfp4.weight_format import UNRECORDED, WeightFormats, formats_from_meta
from longtake.plugins.spec import QK_NORM_EPS, cache_tensors
from longtake.runtime.errors import IntegrityError, LongtakeError
from longtake.runtime.places import REPOSITORY
from longtake.training.dit import Attention, CausalDiT, Rope, dense_cross_attention
from longtake.training.fused_block import fused_blocks
from longtake.training.presets import Preset
from longtake.training.text_encoder import AnyTextEncoder, text_encoder_for
from longtake.training.vae import CausalVAE, DecoderFirst, DecoderSteady, VAEEncoderFirst, VAEEncoderSteady
from longtake.training.vae_library import LibrarySteady

logger = logging.getLogger(__name__)

Amax = dict[str, dict[str, float]]


@dataclass
class Models:
    """A preset's three models with their weights.

    amax: linear name -> {"input": amax of its input, "weight": amax of its weight}; empty when never calibrated.
    precision: what `apply_precision` made of them; "bf16" means untouched weights.
    formats: how each linear's weight becomes 4 bits.
    """

    preset: Preset
    dit: CausalDiT
    vae: CausalVAE
    text: AnyTextEncoder
    amax: Amax = field(default_factory=dict)
    precision: str = "bf16"
    formats: WeightFormats = UNRECORDED

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The text encoder's words, in token order; none where a tokenizer's file holds them."""
        return self.text.vocabulary


class TextStep(nn.Module):
    """tokens int32 [1, E] -> embeddings fp32 [1, E, text_dim]."""

    def __init__(self, text: AnyTextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.text(tokens),)


class ContextStep(nn.Module):
    """embeddings fp32 [1, E, text_dim] -> each layer's cross-attention K and V, [2, E, H, D] in compute dtype."""

    def __init__(self, dit: CausalDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.dit.context(embeddings[0]))


def fused_norm_rope(own: Attention, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """`dit.plain_norm_rope` as one op of ours: from these nodes TensorRT makes kernels that carry fp32 copies along."""
    weights = (norm.weight.to(q.dtype) for norm in (own.norm_q, own.norm_k))
    return torch.ops.longtake.qk_norm_rope(own.split(q), own.split(k), *weights, *rope)


class DiTStep(nn.Module):
    """One pass over one chunk through the cache ops; inputs and outputs as in `engines.spec.dit_spec`.

    fused: whether ops of ours do what lies between the blocks' linears."""

    def __init__(self, dit: CausalDiT, cache: str, fused: bool = False) -> None:
        super().__init__()
        import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

        self.dit = dit
        self.cache = cache
        self.blocks = fused_blocks if fused else None
        self.per_layer = len(cache_tensors(cache))
        self.write = getattr(torch.ops.longtake, f"kv_cache_write_{cache}")
        self.read = getattr(torch.ops.longtake, f"sink_attention_{cache}")
        if dit.config.eps != QK_NORM_EPS:
            raise LongtakeError("the op qk_norm_rope has another eps", got=dit.config.eps, expected=QK_NORM_EPS)

    def forward(
        self,
        latents: Tensor,
        timestep_sinusoid: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        table: Tensor,
        write_slot: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """`tensors`: each layer's context, then each layer's cache tensors. Returns velocity, then the caches."""
        layers = len(self.dit.blocks)
        context, caches = list(tensors[:layers]), list(tensors[layers:])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = slice(layer * self.per_layer, (layer + 1) * self.per_layer)
            # Write first: the slot written is never one that is read, and TensorRT builds a write in place only if
            # nothing else reads the cache as it was before.
            written = self.write(k, v, *caches[own], write_slot)
            caches[own] = [written] if isinstance(written, Tensor) else list(written)
            return self.read(q, k, v, *caches[own], table)

        rope = (rope_cos, rope_sin)
        velocity = self.dit(
            latents[0], timestep_sinusoid, rope, context, attend, cross=dense_cross_attention,
            norm_rope=fused_norm_rope, blocks=self.blocks,
        )  # fmt: skip
        return (velocity[None], *caches)


VAE_STEPS = {
    "vae_first": DecoderFirst,
    "vae_steady": DecoderSteady,
    "vae_encoder_first": VAEEncoderFirst,
    "vae_encoder_steady": VAEEncoderSteady,
}


def network_module(
    models: Models,
    name: str,
    cache: str = "nvfp4",
    fold: bool = False,
    vae_ops: str = "engine",
    linears: str = "engine",
) -> nn.Module:
    """The module of network `name` (see engines.spec.NETWORKS), in eval mode; it shares `models`' parameters.

    `cache` is the cache format ("nvfp4" or "bf16"); only the DiT step depends on it. `fold`: compute the VAE's
    upsampling in its folded form (see `upsample_fold`). `vae_ops`: "plugin" has the VAE decoder extend its streams by
    our ops, "library" runs nearly all of it as ops (a recipe's field). `linears`: "library" has the DiT do all that lies
    between the blocks' linears by our ops (a recipe's field, too).
    """
    if name == "text_encoder":
        return TextStep(models.text).eval()
    if name == "context":
        return ContextStep(models.dit).eval()
    if name == "dit":
        return DiTStep(models.dit, cache, fused=linears == "library").eval()
    if name in VAE_STEPS:
        if vae_ops == "library" and name == "vae_steady":
            return LibrarySteady(models.vae).eval()
        return VAE_STEPS[name](models.vae, fold=fold, ops=vae_ops != "engine" and "encoder" not in name).eval()
    known = ["text_encoder", "context", "dit", *VAE_STEPS]
    raise LongtakeError("unknown network", got=name, expected=", ".join(known))


def quantized_linears(dit: nn.Module) -> list[str]:
    """Names of the linears that recipes quantize: blocks.N.{self_attn,cross_attn}.{q,k,v,o}, blocks.N.ffn.{0,2}."""
    layers = len(dit.blocks)  # type: ignore[arg-type]
    own = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    return [f"blocks.{i}.{name}" for i in range(layers) for name in own]


def weight_amax(dit: nn.Module, name: str) -> float:
    """max |W| of one linear."""
    return float(dit.get_submodule(name).weight.detach().abs().amax())  # type: ignore[union-attr, operator]


def random_models(preset: Preset, seed: int = 0) -> Models:
    """Untrained models whose outputs are not degenerate, with plausible amax: for tests and dry runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = CausalDiT(preset.dit)
        nn.init.xavier_uniform_(dit.head.head.weight)
        models = Models(preset, dit.eval(), CausalVAE(preset.vae).eval(), text_encoder_for(preset).eval())
    models.amax = {n: {"input": 5.0, "weight": weight_amax(dit, n)} for n in quantized_linears(dit)}
    return models


LARGE = 10**9  # parameters; a model with more keeps the dtype of its files, where a smaller one is worked on in fp32


def load_models(preset: Preset, folder: Path | None = None, dtype: torch.dtype | None = None) -> Models:
    """Load vae, text_encoder and dit of `preset` from `folder` (the shipped checkpoints if None), in eval mode.

    Weights stay in the mapped files until they are read; only those that change their dtype are copied.

    Args:
        dtype: of all weights. None: fp32, or as stored for a preset of more than `LARGE` parameters.

    Raises:
        LongtakeError: a file is missing, or its keys or shapes don't fit the preset.
        IntegrityError: a file is damaged or is not safetensors.
    """
    from longtake.training.checkpoint import map_into

    folder = Path(folder) if folder is not None else REPOSITORY / preset.checkpoints
    words = load_meta(folder / "text_encoder.safetensors", "text_encoder", preset).get("vocabulary")
    with torch.device("meta"):
        text = text_encoder_for(preset, words, folder)
        vae, dit = CausalVAE(preset.vae), CausalDiT(preset.dit)
    modules: dict[str, nn.Module] = {"text_encoder": text, "vae": vae, "dit": dit}
    dtype = dtype or weights_dtype(*modules.values())
    metas = {}
    for name, module in modules.items():
        metas[name] = map_into(module, folder / f"{name}.safetensors", kind=name, preset=preset.name)
        module.to(dtype=dtype).eval()
    return Models(preset, dit, vae, text, metas["dit"].get("amax") or {}, formats=formats_from_meta(metas["dit"]))


def weights_dtype(*modules: nn.Module) -> torch.dtype | None:
    """fp32, or None (leave it as stored) when the modules together have more than `LARGE` parameters."""
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return None if count > LARGE else torch.float32


def load_meta(path: Path, kind: str, preset: Preset) -> dict:
    """The checked JSON side file of a checkpoint; that of a text encoder of words holds its vocabulary."""
    from longtake.training.checkpoint import RETRAIN, read_side_file

    meta = read_side_file(path, kind=kind, preset=preset.name)
    if kind != "text_encoder" or preset.text.kind != "words":
        return meta
    words = meta.get("vocabulary")
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise IntegrityError(f"the side file of checkpoint {path} has no vocabulary", got=repr(words)[:80],
                             expected='"vocabulary": a list of words', fix=RETRAIN)  # fmt: skip
    return meta


def apply_precision(models: Models, precision: str) -> Models:
    """A copy of `models` that computes as a recipe of `precision` does.

    "bf16": weights as they are. "w4a16": the listed linears' weights replaced by what their NVFP4 form decodes to
    (weight amax = max |W|, or what they were packed with). "nvfp4" and "fp8": ModelOpt fake-quant of weights and activations with the stored
    amax, the accuracy oracle of native W4A4 and of 8-bit floats.
    """
    if precision not in ("bf16", "w4a16", "nvfp4", "fp8"):
        raise LongtakeError("unknown precision", got=precision, expected="bf16, w4a16, nvfp4 or fp8")
    dit = copy.deepcopy(models.dit)
    if precision == "w4a16":
        fold_weights(dit, models.formats)
    elif precision != "bf16":
        from longtake.training.quantize import restore_quantizers

        dit = restore_quantizers(dit, models.amax, precision, models.formats)
    return replace(models, dit=dit, precision=precision)


def fold_weights(dit: CausalDiT, formats: WeightFormats = UNRECORDED) -> None:
    """Replace each listed linear's weight by its NVFP4 round trip (static_6, ModelOpt's order, if not told otherwise)."""
    for name in quantized_linears(dit):
        weight = dit.get_parameter(f"{name}.weight")
        formats.of(name).round_trip_(weight, formats.of(name).amax_of(weight))
