"""The end of a long roll-out as the scores see it: the chunks that are learnt on, and what they see of those before.

A roll-out may be minutes long, of which only the last chunks are learnt on. Those see a window of the past, so the scores
are shown no more than that: the blocks that the first learnt chunk sees, and the learnt ones. A dropped block never comes
back, so the later ones see nothing else. Positions are those of the whole video, so gaps between blocks stay gaps. What
the blocks of the past themselves have seen is cut off, as far as it is not among these.

Legend: B stories, N chunks of the video, K of these, F latent frames of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longtake.training.distill.scene import Scene
from longtake.training.models.presets import Preset
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.objective.teacher_forcing import Clips


def places_of(cuts: Sequence[Sequence[bool]], window: int, learnt: int) -> Tensor:
    """Of each story the learnt chunks and those that the first of them sees, oldest first, int64 [B, K]."""
    total = len(cuts[0])
    first = total - learnt
    return torch.tensor([[*visible_blocks(story, window)[first][:-1], *range(first, total)] for story in cuts])


def scored_chunks(chunks: int, window: int, learnt: int) -> int:
    """K: the learnt chunks, and the past of a window."""
    return learnt + min(chunks - learnt, window - 1)


def scored(preset: Preset, scene: Scene, video: Tensor) -> tuple[Clips, Tensor, Tensor]:
    """Clips for the scores, the prompts' embeddings [B, K, E, text_dim], and `video`'s part of it, fp32 [B, K F, C, h, w].

    Only frames of learnt chunks count in the clips' losses. The clips' latents are the part without its gradient.
    """
    if scene.learnt >= scene.clips.chunks:
        return replace(scene.clips, latents=video.detach()), scene.story.embeddings, video
    frames, device = preset.chunk_latents, video.device
    places = places_of(scene.story.cuts, preset.window_chunks, scene.learnt).to(device)
    rows, own = torch.arange(len(places), device=device)[:, None], torch.arange(places.shape[1], device=device)
    first = scene.clips.chunks - scene.learnt

    def taken(x_BN: Tensor) -> Tensor:
        return x_BN[rows, places]

    def of_frames(x_BF: Tensor) -> Tensor:
        return taken(x_BF.unflatten(1, (-1, frames))).flatten(1, 2)

    part, offsets = of_frames(video), scene.clips.offsets
    gaps = (places - own) * frames
    history = scene.clips.history[rows[..., None], places[:, :, None], places[:, None]]
    given = scene.clips.given
    clips = Clips(
        latents=part.detach(),
        tokens=taken(scene.clips.tokens),
        history=history,
        offsets=gaps if offsets is None else taken(offsets) + gaps,
        given=None if given is None else of_frames(given),
        valid=(places >= first).repeat_interleave(frames, 1),
    )
    return clips, taken(scene.story.embeddings), part
