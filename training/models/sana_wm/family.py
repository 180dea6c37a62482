"""The SANA-WM family: a world that one walks through, with cameras for every frame and no cuts."""

from __future__ import annotations

from torch import Tensor

from longtake.training.models.presets import Preset, WorldPreset
from longtake.training.models.sana_wm.camera import chunk_maps
from longtake.training.models.sana_wm.dit import SanaWMDiT
from longtake.training.models.sana_wm.linears import quantized_linears
from longtake.training.models.sana_wm.networks import network_module
from longtake.training.models.sana_wm.rope import tables
from longtake.training.models.sana_wm.slots import Turns, turns_from_json
from longtake.training.models.sana_wm.spec import network_spec, networks_of
from longtake.training.models.sana_wm.vae import LTX2VAE, largest_activation
from longtake.training.models.wan.rope import timestep_sinusoid


class SanaWM:
    """See training/models/family.py for what each member is."""

    name = "sana_wm"
    solver = "euler"
    keys: tuple[str, ...] = ("sana", "diffusers")
    can = frozenset({"camera"})

    networks = staticmethod(networks_of)
    spec = staticmethod(network_spec)
    module = staticmethod(network_module)
    linears = staticmethod(quantized_linears)
    marker = staticmethod(turns_from_json)

    def network_of(self, parameter: str) -> str:
        if parameter.startswith("plucker_embedder") or ".plucker_proj" in parameter:
            return "camera"
        text = ("y_embedder", "attention_y_norm")
        own = (".cross_attn.kv_linear", ".cross_attn.k_norm")
        return "context" if parameter.startswith(text) or any(part in parameter for part in own) else "dit"

    def widest(self, preset: Preset) -> int:
        return preset.frames_of(0) * preset.frame_tokens * 2 * preset.dit.ffn_dim

    def largest(self, preset: Preset) -> int:
        assert isinstance(preset, WorldPreset)
        return largest_activation(preset.vae, preset.height, preset.width)

    def dit(self, preset: Preset) -> SanaWMDiT:
        assert isinstance(preset, WorldPreset)
        return SanaWMDiT(preset.dit)

    def vae(self, preset: Preset) -> LTX2VAE:
        assert isinstance(preset, WorldPreset)
        return LTX2VAE(preset.vae)

    def start(self, preset: Preset) -> Turns:
        return Turns(preset.window_chunks)

    def chunk_inputs(self, preset: Preset, chunk: int, shot: int) -> dict[str, Tensor]:
        dit, first = preset.dit, preset.first_frame(chunk)
        frames = range(first, first + preset.frames_of(chunk))
        cos, sin = tables(dit.head_dim, frames, preset.grid_hw, dit.rope_theta)
        camera_cos, camera_sin = tables(dit.head_dim, frames, preset.grid_hw, dit.rope_theta, dit.head_dim // 2)
        return {"rope_cos": cos, "rope_sin": sin, "camera_rope_cos": camera_cos, "camera_rope_sin": camera_sin}

    def camera_inputs(self, preset: Preset, chunk: int, poses: Tensor, intrinsics: Tensor) -> dict[str, Tensor]:
        """Of the cameras of a chunk's frames, poses [N,4,4] and intrinsics [N,4] in latent pixels: what the transformer, and
        network "camera", read of it."""
        first = preset.first_frame(chunk)
        latents, stride = range(first, first + preset.frames_of(chunk)), preset.vae.stride[0]
        start = stride * (first - 1) + 1 if first else 0
        rays, inverse, maps = chunk_maps(poses, intrinsics, latents, stride, preset.grid_hw, start)
        return {"rays": rays, "inverse_rays": inverse, "plucker": maps[None]}

    def pass_inputs(self, preset: Preset, frames: int, timestep: float, clean_frames: int) -> dict[str, Tensor]:
        times = [0.0] * clean_frames + [float(int(timestep))] * (frames - clean_frames)
        return {"timestep_sinusoid": timestep_sinusoid(times, preset.dit.freq_dim)}

    def prompt(self, caption: str, cut: bool, first: bool = False) -> str:
        return caption
