"""What chunks leave for later ones, held in plain tensors: for training, tests, and as the rule that slots follow.

Legend: F latent frames of a chunk, P tokens of a frame, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.training.models.sana_wm.attention import Carried
from longtake.training.models.sana_wm.config import CONV_TAIL, SanaWMConfig
from longtake.training.models.sana_wm.kit import full_precision


def seen_chunks(chunk: int, window: int, sink: bool = True) -> tuple[int, ...]:
    """The earlier chunks that softmax attention of `chunk` sees, of a window of `window` earlier ones; -1: all.

    With the sink, chunk 0 is one of them.
    """
    if window < 0 or chunk <= window:
        return tuple(range(chunk))
    near = range(chunk - window + sink, chunk)
    return (0, *near) if sink else tuple(near)


def nothing_carried(
    config: SanaWMConfig, tokens: int, batch: tuple[int, ...] = (), like: Tensor | None = None
) -> list[Carried]:
    """What each block has before chunk 0; `tokens` of a frame. `like`: whose device and dtype, of what is no state."""
    device, dtype = (like.device, like.dtype) if like is not None else (None, torch.float32)
    heads, size, dim = config.heads, config.head_dim, config.dim

    def zeros(*shape: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.zeros(*batch, *shape, dtype=dtype, device=device)

    carried = []
    for layer in range(config.layers):
        kept = Carried(zeros(tokens, dim))
        if not config.softmax(layer):
            kept.state = zeros(2, heads, size, size, dtype=torch.float32)
            kept.norm = zeros(heads, size, dtype=torch.float32)
            kept.conv = zeros(config.conv_tails, CONV_TAIL, tokens, dim)
        carried.append(kept)
    return carried


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v in fp32: q [..., F,P,H,D], k and v [..., N,H,D]."""
    rows = q.flatten(-4, -3).transpose(-3, -2).float()
    keys, values = (x.transpose(-3, -2).float() for x in (k, v))
    with full_precision(q):
        out = torch.softmax(rows @ keys.mT * scale, -1) @ values
    return out.transpose(-3, -2).reshape(q.shape).to(q.dtype)


class Memory:
    """What a video's chunks have left so far. A pass reads it; `commit` after the clean pass moves on by a chunk.

    window: earlier chunks that softmax attention sees, -1: all; sink: whether chunk 0 is always one of them.
    """

    def __init__(
        self,
        config: SanaWMConfig,
        tokens: int,
        window: int = 2,
        sink: bool = True,
        batch: tuple[int, ...] = (),
        like: Tensor | None = None,
    ) -> None:
        self.config, self.window, self.sink = config, window, sink
        self.carried = nothing_carried(config, tokens, batch, like)
        self.chunks = 0
        self._held: dict[tuple[int, bool], list[tuple[Tensor, Tensor]]] = {}
        self._staged: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, camera: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of a softmax block: q, k, v [..., F,P,H,D]; the chunk's own K and V are kept aside until it is committed."""
        self._staged[layer, camera] = k, v
        past = self._held.get((layer, camera), [])
        seen = [past[i] for i in seen_chunks(self.chunks, self.window, self.sink)] + [(k, v)]
        keys, values = (torch.cat([pair[i].flatten(-4, -3) for pair in seen], -3) for i in (0, 1))
        return plain_attention(q, keys, values, self.config.score_scale(camera))

    def commit(self, kept: list[Carried]) -> None:
        """Take what the last pass left."""
        self.carried = kept
        for name, pair in self._staged.items():
            self._held.setdefault(name, []).append(pair)
        self.chunks += 1
