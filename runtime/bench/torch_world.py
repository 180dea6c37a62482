"""The world family as plain PyTorch does it best, to stand beside the engines: bf16, attention by a library, state in place.

What the references of ops do as matrix products and pointwise arithmetic stays as it is: scans in fp32 (TF32 on a GPU), ray
transforms, the short convolution. Attention, the depthwise filters, modulation and the writing of state are done anew.

Legend: F latent frames of a chunk, P tokens of a frame, H heads, D head_dim, E text length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.dtypes import DTYPES
from longtake.errors import LongtakeError
from longtake.formats.recipe import Recipe
from longtake.plugins.gdn_scan.reference import gdn_scan, gdn_scan_camera
from longtake.plugins.ray_transform.reference import ray_prepare_gdn, ray_prepare_softmax, ray_restore
from longtake.plugins.short_conv.reference import short_conv
from longtake.plugins.slot_write.reference import slot_write
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.bench.torch_dit import best_attention, gated, modulated
from longtake.runtime.bench.torch_vae import DecoderState
from longtake.training.models.presets import WorldPreset
from longtake.training.models.sana_wm.attention import Camera, Carried
from longtake.training.models.sana_wm.dit import SanaWMDiT, tokens_of
from longtake.training.models.sana_wm.kit import Kit
from longtake.training.models.sana_wm.networks import MASKED
from longtake.training.models.sana_wm.spec import slot_tokens, state_bindings
from longtake.training.models.sana_wm.vae import LTX2VAE
from longtake.training.models.streaming_vae import VAEStep

Past = tuple[Sequence[Tensor], Sequence[Tensor]]  # keys and values of the chunks in view, each [N, H, D]
Fresh = list[tuple[Tensor, Tensor]]  # a chunk's own keys and values, [F, P, H, D]: main branch, camera branch
PARTS = ("state", "norm", "conv", "ffn")


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """q [T, H, D] over k, v [N, H, D], mask [N] added to the scores, to [T, H, D]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k.to(q.dtype), v.to(q.dtype)))
    bias = None if mask is None else mask.to(q.dtype)[None, None, None]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out[0].transpose(0, 1)


def gated_filters(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See the reference of `gated_ffn`: in x's dtype, on frames [F, Y, X, 2 C], which are channels last as they are."""
    frames = functional.silu(x).flatten(0, -4).permute(0, 3, 1, 2)
    filters = weight.reshape(-1, 1, 3, 3)
    mixed = (
        functional.conv2d(frames, filters, bias, padding=1, groups=len(filters)).permute(0, 2, 3, 1).reshape(x.shape)
    )
    a, b = mixed.chunk(2, -1)
    return a * functional.silu(b)


def _elsewhere(*_: Any) -> Any:
    raise NotImplementedError("attention is called by the block, with the window's keys")


RAYS = (ray_prepare_gdn, ray_prepare_softmax, ray_restore)
KIT = Kit(short_conv, gdn_scan, gdn_scan_camera, *RAYS, gated_filters, _elsewhere, slot_write)


def world_block(
    block: Any,
    x: Tensor,
    e6: Tensor,
    context: Tensor,
    mask: Tensor,
    plucker: Tensor,
    rope: tuple[Tensor, Tensor],
    camera: tuple[Tensor, ...],
    carried: dict[str, Tensor],
    pasts: tuple[Past, Past],
    grid: tuple[int, int],
) -> tuple[Tensor, dict[str, Tensor], Fresh]:
    """x [F, P, dim] through one block: x, what the next chunk gets, and the chunk's own keys and values. `block` is not asked
    for its layer, so that one graph serves all of a kind. See dit.Block.forward."""
    config, frames = block.attn.config, x.shape[0]
    m = (block.scale_shift_table + e6).unbind(-2)
    fresh: Fresh = []

    def attend(of_camera: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = pasts[of_camera]
        fresh.append((k, v))
        k, v = (torch.cat((*past, own.flatten(0, 1))) for past, own in ((keys, k), (values, v)))
        return attended(q.flatten(0, 1), k, v, scale=config.score_scale(of_camera)).unflatten(0, q.shape[:2])

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated(x.flatten(0, 1), block.eps, scale, shift).unflatten(0, (frames, -1))

    def added(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return gated(x.flatten(0, 1), y.flatten(0, 1), gate).unflatten(0, (frames, -1))

    rays = Camera(camera[0], camera[1], (camera[2], camera[3]))
    y, kept = block.attn(norm(x, m[0], m[1]), rope, rays, attend, Carried(**carried), KIT)
    x = added(x, y, m[2]) + plucker.to(x.dtype)
    cross = block.cross_attn
    q = cross.q_norm(cross.q_linear(x.flatten(0, 1))).unflatten(-1, (cross.heads, -1))
    x = x + cross.proj(attended(q, context[0], context[1], mask).flatten(1)).unflatten(0, x.shape[:2])
    y, kept.ffn = block.mlp(norm(x, m[3], m[4]), carried["ffn"], grid, KIT)
    left = {part: value for part in PARTS if (value := getattr(kept, part)) is not None}
    return added(x, y, m[5]), left, fresh


class PlainWorldBackend(Backend):
    """State, slots and inputs as the family's spec names them. compile: keyword arguments of torch.compile, None for eager."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        dit: SanaWMDiT | None,
        vae: LTX2VAE,
        device: torch.device,
        compile: dict[str, Any] | None = None,
    ) -> None:
        assert isinstance(recipe.model, WorldPreset)
        self.recipe, self.preset, self.device = recipe, recipe.model, device
        self.name, self.reason, self.library = name, f"PyTorch {torch.__version__}", "cudnn"
        self._dit, self._vae = dit, {encoder: VAEStep(vae, encoder) for encoder in (False, True)}
        self.vae_conv = {"bf16": sum(isinstance(layer, nn.Conv3d) for layer in vae.decoder.modules())}
        self._lengths = slot_tokens(recipe.model)
        self._names = [tuple(b.name for b in state_bindings(recipe.model, i)) for i in range(recipe.model.dit.layers)]
        self._slots: tuple[Tensor | None, list[int], int] = (None, [], 0)
        self._block: Callable[..., tuple[Tensor, dict[str, Tensor], Fresh]] = world_block
        if compile is not None:
            torch._dynamo.config.recompile_limit = 64
            self._block = torch.compile(world_block, dynamic=False, **compile)

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return network.startswith("vae_") or (network in ("context", "camera", "dit") and self._dit is not None)

    def new_state(self, network: str) -> State:
        """See Backend.new_state."""
        if network.startswith("vae_"):
            return DecoderState()
        spec, dit = self.specs[network], self._transformer
        dtypes = {"bf16": dit.dtype, "fp32": torch.float32}
        kept = [b for b in spec.inputs if b.name in spec.kept.values()]
        assert {b.dtype for b in kept} <= dtypes.keys() <= DTYPES.keys()
        return State(
            {b.name: torch.zeros([int(n) for n in b.shape], dtype=dtypes[b.dtype], device=self.device) for b in kept}
        )

    @torch.no_grad()
    def run(
        self, network: str, inputs: Mapping[str, Tensor], state: State | None = None, commit: bool = True
    ) -> Mapping[str, Tensor]:
        """See Backend.run."""
        spec = self.specs[network]
        first, outputs = inputs[spec.inputs[0].name], [binding.name for binding in spec.outputs]
        if isinstance(state, DecoderState):
            pasts = () if network.endswith("first") else state.tensors.values()
            result, *tails = self._vae["encoder" in network](first.to(self.device), *pasts)
            state.tensors = {str(i): tail for i, tail in enumerate(tails)}
            return {outputs[0]: result}
        if network == "context":
            mask = torch.where(first[0].abs().amax(-1) > 0, 0.0, MASKED)
            return dict(zip(outputs, (mask, *self._transformer.context(first[0])), strict=True))
        if network == "camera":
            return dict(zip(outputs, self._transformer.plucker(first[0]), strict=True))
        if network != "dit" or state is None:
            raise LongtakeError(f"plain PyTorch has no {network} here")
        return {outputs[0]: self._velocity({**inputs, **state.tensors}, state, commit)[None]}

    def _velocity(self, given: Mapping[str, Tensor], state: State, commit: bool) -> Tensor:
        """One pass; `commit` writes what it leaves into its slot."""
        dit, latents = self._transformer, given["latents"][0]
        seen, read = self._in_view(given["table"], given["read_slot"])
        grid = latents.shape[-2], latents.shape[-1]
        rope = given["rope_cos"], given["rope_sin"]
        camera = tuple(given[name] for name in ("rays", "inverse_rays", "camera_rope_cos", "camera_rope_sin"))
        context, plucker = (
            (b.name for b in self.specs["context"].outputs),
            (b.name for b in self.specs["camera"].outputs),
        )
        mask, *text = (given[name] for name in context)
        with best_attention(self.library):
            e, e6 = dit.time(given["timestep_sinusoid"])
            x = dit.x_embedder(tokens_of(latents.to(dit.dtype)))
            for layer, (block, own, maps) in enumerate(zip(dit.blocks, text, plucker, strict=True)):
                carried = {part: given[name][read] for part in PARTS if (name := f"{part}_{layer}") in given}
                pasts = self._past(given, layer, seen, ""), self._past(given, layer, seen, "camera_")
                x, left, fresh = self._block(block, x, e6, own, mask, given[maps], rope, camera, carried, pasts, grid)
                if commit:
                    self._write(state, layer, int(given["write_slot"]), left, fresh)
            head = dit.final_layer
            m = (head.scale_shift_table + e.unsqueeze(-2)).unbind(-2)
            out = head.linear(modulated(x.flatten(0, 1), head.eps, m[1], m[0])).float()
        return out.unflatten(0, (len(x), *grid)).movedim(-1, -4)

    def _past(self, given: Mapping[str, Tensor], layer: int, seen: list[int], prefix: str) -> Past:
        """Views of the slots in view, each as long as it is."""
        if f"{prefix}keys_{layer}" not in given:
            return (), ()
        keys, values = given[f"{prefix}keys_{layer}"], given[f"{prefix}values_{layer}"]
        return [keys[slot, : self._lengths[slot]] for slot in seen], [
            values[slot, : self._lengths[slot]] for slot in seen
        ]

    @staticmethod
    def _write(state: State, layer: int, slot: int, left: dict[str, Tensor], fresh: Fresh) -> None:
        values = {f"{part}_{layer}": value for part, value in left.items()}
        for prefix, own in zip(("", "camera_"), fresh):
            values |= {f"{prefix}{kind}_{layer}": x.flatten(0, 1) for kind, x in zip(("keys", "values"), own)}
        for name, value in values.items():
            held = state.tensors[name]
            held[slot % len(held)][: len(value)].copy_(value)

    def _in_view(self, table: Tensor, read_slot: Tensor) -> tuple[list[int], int]:
        """The slots attended to and the one read from; taken from the device once a chunk, not once a pass."""
        if self._slots[0] is not table:
            self._slots = table, [slot for slot in table.tolist() if slot >= 0], int(read_slot)
        return self._slots[1], self._slots[2]

    @property
    def _transformer(self) -> Any:
        if self._dit is None:
            raise LongtakeError("this side was opened without the DiT", fix="--networks dit")
        return self._dit

    def peak_bytes(self) -> int:
        """See Backend.peak_bytes: what torch's allocator reserved at most."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        """See Backend.close."""
        self._dit, self._vae = None, {}
