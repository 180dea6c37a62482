"""The networks that become engines: flat, positional modules around the models, one a name in `sana_wm.spec`.

Legend: C latent channels, F latent frames of a chunk, P tokens of a frame, H heads, D head_dim, E text length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.training.models.family import ModelSet, Precision
from longtake.training.models.network_spec import NETWORKS
from longtake.training.models.presets import WorldPreset
from longtake.training.models.sana_wm.attention import Camera, Carried
from longtake.training.models.sana_wm.dit import Chunk, SanaWMDiT
from longtake.training.models.sana_wm.kit import PLAIN, Kit, registered
from longtake.training.models.sana_wm.spec import dit_spec, slot_tokens, state_bindings
from longtake.training.models.streaming_vae import VAEStep
from longtake.training.models.text.words import TextStep

MASKED = -10000.0  # added to the scores of padding, as the publisher does: not minus infinity
FIXED_INPUTS = 11  # of the transformer, before what a prompt gives


class ContextStep(nn.Module):
    """embeddings fp32 [1, E, text_dim] -> the mask of their positions, then each block's K and V, [2, E, H, D].

    Rows of zeros are padding."""

    def __init__(self, dit: SanaWMDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        there = embeddings[0].abs().amax(-1) > 0
        return (torch.where(there, 0.0, MASKED), *self.dit.context(embeddings[0]))


class CameraStep(nn.Module):
    """Maps fp32 [1, 6 * stride, F, h, w] of a chunk -> what each block adds of them, [F, P, dim]."""

    def __init__(self, dit: SanaWMDiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, plucker: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.dit.plucker(plucker[0]))


class DiTStep(nn.Module):
    """One pass over one chunk with its state in slots; inputs and outputs as in `spec.dit_spec`."""

    def __init__(self, dit: SanaWMDiT, preset: WorldPreset, kit: Kit) -> None:
        super().__init__()
        self.dit, self.kit = dit, kit
        self.lengths = slot_tokens(preset)
        self.names = [[b.name for b in state_bindings(preset, layer)] for layer in range(preset.dit.layers)]
        self.state_at = next(i for i, b in enumerate(dit_spec(preset).inputs) if b.name == self.names[0][0])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        layers = len(self.dit.blocks)
        latents, sinusoid, cos, sin, camera_cos, camera_sin, rays, inverse, table, read_slot, write_slot = inputs[:11]
        mask, *rest = inputs[FIXED_INPUTS : self.state_at]
        state = dict(zip([name for layer in self.names for name in layer], inputs[self.state_at :]))
        written: dict[str, Tensor] = {}

        def write(name: str, value: Tensor) -> None:
            old = state[name]
            written[name] = self.kit.slot_write(value.flatten(), old.flatten(1), write_slot).reshape(old.shape)

        def attend(layer: int, camera: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            names = [f"{'camera_' if camera else ''}{part}_{layer}" for part in ("keys", "values")]
            for name, value in zip(names, (k, v)):
                write(name, value)
            scale = self.dit.config.score_scale(camera) * self.dit.config.head_dim**0.5
            q = q if scale == 1 else (q.float() * scale).to(q.dtype)
            lengths = torch.tensor(self.lengths, dtype=torch.int32, device=q.device)
            # The slot that is written is never one that is read, so it does not matter which of the two comes first.
            return self.kit.frame_attention(q, k, v, *(written[name] for name in names), lengths, table)

        carried = [Carried(**self._read(state, layer, read_slot)) for layer in range(layers)]
        camera = Camera(rays, inverse, (camera_cos, camera_sin))
        chunk = Chunk((cos, sin), camera, rest[layers:], attend, carried, self.kit)
        velocity, kept = self.dit(latents[0], sinusoid, rest[:layers], mask, chunk)
        for layer, left in enumerate(kept):
            for part in ("state", "norm", "conv", "ffn"):
                value = getattr(left, part)
                if value is not None:
                    write(f"{part}_{layer}", value)
        return (velocity[None], *(written[name] for name in state))

    def _read(self, state: dict[str, Tensor], layer: int, read_slot: Tensor) -> dict[str, Tensor]:
        parts = ("state", "norm", "conv", "ffn")
        return {
            part: state[f"{part}_{layer}"].index_select(0, read_slot).squeeze(0)
            for part in parts
            if f"{part}_{layer}" in state
        }


def network_module(models: ModelSet, recipe: Precision, name: str, exported: bool = False) -> nn.Module:
    """The module of network `name`, in eval mode; it shares `models`' parameters. See `Family.module`."""
    preset = models.preset
    assert isinstance(preset, WorldPreset)
    if name == "text_encoder":
        return TextStep(models.text).eval()
    if name == "context":
        return ContextStep(models.dit).eval()
    if name == "camera":
        return CameraStep(models.dit).eval()
    if name == "dit":
        return DiTStep(models.dit, preset, registered() if exported else PLAIN).eval()
    if name in NETWORKS:
        return VAEStep(models.vae, encoder="encoder" in name).eval()
    raise LongtakeError("unknown network", got=name, expected=", ".join(NETWORKS))
