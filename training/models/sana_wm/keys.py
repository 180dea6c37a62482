"""Keys of published DiTs: the publisher's own, and diffusers', to those of `dit.SanaWMDiT`.

1x1 convolutions are linears here, and a short convolution's filter has no middle axis. What the network has no use for is
dropped by name; whatever else is extra, missing or of another shape is refused by whoever loads the weights.
"""

from __future__ import annotations

import re

from torch import Tensor

RENAMED = (
    (re.compile(r"^t_embedder\.linear_1\."), "t_embedder.mlp.0."),  # diffusers
    (re.compile(r"^t_embedder\.linear_2\."), "t_embedder.mlp.2."),
)
UNUSED = re.compile(
    r"^(pos_embed|y_embedder\.y_embedding|raymap_embedder\.proj\.(weight|bias)|blocks\.\d+\.attn\.recall_gate)$"
)
OF_SOFTMAX = re.compile(r"^blocks\.(\d+)\.attn\.((beta|gate)_proj\.(weight|bias)|A_log|dt_bias)$")
FLAT = re.compile(r"(embedder\.proj|inverted_conv\.conv|point_conv\.conv)\.weight$")


def our_key(key: str, softmax: frozenset[int] | set[int]) -> str | None:
    """The name here of a published weight; None for one that has no use. softmax: blocks of softmax attention."""
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    gates = OF_SOFTMAX.match(key)
    if UNUSED.match(key) or (gates and int(gates[1]) in softmax):
        return None
    return key


def our_tensor(key: str, tensor: Tensor) -> Tensor:
    """A published weight in the shape that it has here; one that does not have the published shape comes as it is."""
    if FLAT.search(key) and tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:]):
        return tensor.flatten(1)
    if key.endswith(("conv_k.weight", "conv_k_cam.weight")) and tensor.ndim == 3 and tensor.shape[1] == 1:
        return tensor.squeeze(1)
    return tensor


def our_vae_key(key: str) -> str:
    """The name here of a published weight of the VAE, by the publisher or by diffusers."""
    return {"latents_mean": "latent_mean", "latents_std": "latent_std"}.get(key, key)
