"""Plain PyTorch as a backend, so that the same session drives it and the engines.

Legend: S slots, T tokens of a chunk, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.bench.torch_dit import PlainDiT
from longtake.runtime.bench.torch_vae import DecoderState, PlainDecoder
from longtake.training.models.wan.vae import CausalVAE


class PlainTorchBackend(Backend):
    """The state of layer i is key_i and value_i, each [S, T, H, D] in the weights' dtype."""

    def __init__(
        self, recipe: Recipe, name: str, dit: PlainDiT | None, vae: CausalVAE | None, device: torch.device
    ) -> None:
        self.recipe, self.preset, self.device = recipe, recipe.model, device
        self.name, self.reason = name, f"PyTorch {torch.__version__}"
        self._dit, self._decoder = dit, PlainDecoder(vae) if vae is not None else None
        convs = vae.decoder.modules() if vae is not None else ()
        self.vae_conv = {"bf16": many} if (many := sum(isinstance(layer, nn.Conv3d) for layer in convs)) else {}
        self._table: tuple[Tensor | None, tuple[int, int]] = (None, (0, 0))

    def has(self, network: str) -> bool:
        """See Backend.has."""
        vae = network in ("vae_first", "vae_steady") and self._decoder is not None
        return vae or (network in ("context", "dit") and self._dit is not None)

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        if network == "vae_steady":
            return DecoderState()
        config, preset = self.preset.dit, self.preset
        shape = (preset.window_chunks, preset.chunk_tokens, config.heads, config.head_dim)
        names = [f"{part}_{layer}" for layer in range(config.layers) for part in ("key", "value")]
        dtype = self._module.dit.dtype
        return State({name: torch.zeros(shape, dtype=dtype, device=self.device) for name in names})

    @torch.no_grad()
    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run. Every pass writes its K and V into the slot that no entry of the table names.

        That slot is the one the clean pass is to fill, so slots stay contiguous and nothing is gathered or copied.
        """
        if network == "context":
            layers = self._module.dit.context(inputs["embeddings"][0])
            return {f"context_{i}": layer for i, layer in enumerate(layers)}
        if isinstance(state, DecoderState):
            if self._decoder is None:
                raise LongtakeError("this side was opened without the VAE", fix="--networks vae")
            return {"frames": self._decoder.decode(inputs["latent"], state, first=network == "vae_first")}
        if network != "dit" or state is None:
            raise LongtakeError(f"plain PyTorch has no {network} here")
        slots, own = self._slots(inputs["table"])
        tensors = list(state.tensors.values())
        cache = list(zip(tensors[::2], tensors[1::2], strict=True))
        context = [inputs[f"context_{i}"] for i in range(len(cache))]
        latents, sinusoid = inputs["latents"][0], inputs["timestep_sinusoid"]
        cos, sin = inputs["rope_cos"], inputs["rope_sin"]
        return {"velocity": self._module(latents, sinusoid, cos, sin, context, cache, slots, own)[None]}

    @property
    def _module(self) -> PlainDiT:
        if self._dit is None:
            raise LongtakeError("this side was opened without the DiT", fix="--networks dit")
        return self._dit

    def _slots(self, table: Tensor) -> tuple[int, int]:
        """(slots attended to, the one this chunk writes); read from the device once a chunk, not once a pass."""
        if self._table[0] is not table:
            read = [slot for slot in table.tolist() if slot >= 0]
            self._table = table, (len(read) + 1, min(set(range(self.preset.window_chunks)) - set(read)))
        return self._table[1]

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes: what torch's allocator reserved at most."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        """See Backend.close."""
        self._dit = self._decoder = None
