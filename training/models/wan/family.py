"""The Wan family: Wan 2.2's transformer and VAE, made causal, with LongLive 2.0's window and cuts."""

from __future__ import annotations

from torch import Tensor

from longtake.training.models.presets import Preset
from longtake.training.models.wan.dit import CausalDiT
from longtake.training.models.wan.linears import quantized_linears
from longtake.training.models.wan.networks import network_module
from longtake.training.models.wan.prompts import CUT_PREFIX, with_cut_prefix
from longtake.training.models.wan.rope import frame_positions, rope_tables, timestep_sinusoid
from longtake.training.models.wan.slots import SlotTable, slots_from_json
from longtake.training.models.wan.spec import network_spec, networks_of
from longtake.training.models.wan.vae import CausalVAE


class Wan:
    """See training/models/family.py for what each member is."""

    name = "wan"
    solver = "unipc"
    can = frozenset({"cut"})
    keys: tuple[str, ...] = ("wan", "diffusers")  # training/convert/dit_keys.py, vae_keys.py, text_keys.py

    networks = staticmethod(networks_of)
    spec = staticmethod(network_spec)
    module = staticmethod(network_module)
    linears = staticmethod(quantized_linears)
    marker = staticmethod(slots_from_json)

    def network_of(self, parameter: str) -> str:
        text = parameter.startswith("text_embedding") or ".cross_attn.norm_k" in parameter
        return "context" if text or ".cross_attn.k" in parameter or ".cross_attn.v" in parameter else "dit"

    def widest(self, preset: Preset) -> int:
        return preset.chunk_tokens * preset.dit.ffn_dim

    def largest(self, preset: Preset) -> int:
        """It enters the last level: full size of the pixel patches, width of the level before."""
        frames, width = preset.vae.stride[0], preset.vae.decoder_dim * preset.vae.dim_mult[1]
        return width * frames * (preset.height // 2) * (preset.width // 2)

    def dit(self, preset: Preset) -> CausalDiT:
        return CausalDiT(preset.dit)

    def vae(self, preset: Preset) -> CausalVAE:
        return CausalVAE(preset.vae)

    def start(self, preset: Preset) -> SlotTable:
        return SlotTable(preset.window_chunks)

    def chunk_inputs(self, preset: Preset, chunk: int, shot: int) -> dict[str, Tensor]:
        cos, sin = rope_tables(preset.dit, frame_positions(preset, chunk, shot), preset.grid_hw)
        return {"rope_cos": cos, "rope_sin": sin}

    def pass_inputs(self, preset: Preset, frames: int, timestep: float, clean_frames: int) -> dict[str, Tensor]:
        times = [0.0] * clean_frames + [float(timestep)] * (frames - clean_frames)
        return {"timestep_sinusoid": timestep_sinusoid(times, preset.dit.freq_dim)}

    def prompt(self, caption: str, cut: bool, first: bool = False) -> str:
        """A cut is announced as in training, once. A video's first chunk is no cut: as in the reference, its prompt is what
        was written, prefix and all."""
        return caption if first else with_cut_prefix(caption.removeprefix(CUT_PREFIX), cut)
