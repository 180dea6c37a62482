"""Stage 1: its recurrences against a brute-force one, its whole against diffusers' on the same weights, and chunk by chunk
against a plain reading of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_world import CONFIG, GRID, chunk_of, filled, random_video, run_video
from torch import Tensor

from longtake.plugins.gdn_scan.reference import gdn_scan, gdn_scan_camera
from longtake.training.models.camera_poses import relative_poses
from longtake.training.models.presets import PRESETS
from longtake.training.models.sana_wm.config import Dialect
from longtake.training.models.sana_wm.dit import SanaWMDiT
from longtake.training.models.sana_wm.ffn import FeedForward
from longtake.training.models.sana_wm.keys import our_key, our_tensor
from longtake.training.models.sana_wm.kit import PLAIN
from longtake.training.models.sana_wm.memory import Memory, nothing_carried, plain_attention, seen_chunks
from longtake.training.models.sana_wm.rope import pairs


def close(got: Tensor, wanted: Tensor, limit: float) -> None:
    error = float((got - wanted).norm() / wanted.norm())
    assert error < limit, error


def test_the_published_preset_has_the_published_size() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in SanaWMDiT(PRESETS[name].dit).parameters())
            for name in ("sana-wm", "world-tiny")
        }
    # 2.663 G less what has no use: raymap_embedder, y_embedding, recall_gate, gates of softmax blocks
    assert abs(sizes["sana-wm"] / 2.663e9 - 1) < 2e-3
    assert 4e6 < sizes["world-tiny"] < 6e6


@pytest.mark.parametrize(
    "head, split", [(112, (20, 18, 18)), (56, (10, 9, 9)), (16, (4, 2, 2)), (48, (8, 8, 8)), (2, (1, 0, 0))]
)
def test_pairs_of_any_even_head(head: int, split: tuple[int, int, int]) -> None:
    assert pairs(head) == split


def scan_inputs(frames: int, tokens: int, heads: int, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(frames)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(frames, tokens, heads, size) for _ in range(3))
    q, k = q.relu(), k.relu() / (size * tokens) ** 0.5
    beta, gate = draw(frames, tokens, heads).sigmoid(), (-draw(frames, heads).exp() / 50).exp()
    angle = draw(frames, tokens, size // 2)
    return q, k, v, beta, gate, angle.cos(), angle.sin(), draw(heads, size, size) / 4, draw(heads, size).abs()


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, start: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Token by token: what each frame's tokens see of the frames up to theirs, and of those after it."""
    frames, tokens, heads, _ = k.shape

    def step(state: Tensor, frame: int) -> Tensor:
        decayed = state * gate[frame][:, None, None]
        after = decayed.clone()
        for token in range(tokens):
            for head in range(heads):
                key, value = k[frame, token, head], v[frame, token, head]
                wrong = value - decayed[head].T @ key
                after[head] += beta[frame, token, head] * torch.outer(key, wrong)
        return after

    past, later = [], [torch.zeros_like(start)]
    state = start
    for frame in range(frames):
        state = step(state, frame)
        past.append(state)
    for frame in reversed(range(1, frames)):
        later.insert(0, step(later[0], frame))
    return past, later, state


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_scan_is_the_recurrence(frames: int) -> None:
    q, k, v, beta, gate, cos, sin, state, norm = (x.float().double() for x in scan_inputs(frames, 5, 2, 8))
    out, last, last_norm = gdn_scan(*(x.float() for x in (q, k, v, beta, gate, cos, sin, state, norm)))

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack(
            (a * cos[:, :, None] - b * sin[:, :, None], a * sin[:, :, None] + b * cos[:, :, None]), -1
        ).flatten(-2)

    past, later, wanted_last = brute_force(turn(q), turn(k), v, beta, gate, state)
    sums, later_sums, wanted_norm = brute_force(q, k, torch.ones_like(v[..., :1]), beta, gate, norm[..., None])
    wanted = torch.empty_like(v)
    for f in range(frames):
        top = torch.einsum("phd,hde->phe", turn(q)[f], past[f] + later[f])
        below = torch.einsum("phd,hde->phe", q[f], sums[f] + later_sums[f])
        wanted[f] = top / (below + 1e-8)
    close(out.double(), wanted, 1e-6)
    close(last.double(), wanted_last, 1e-6)
    close(last_norm.double(), wanted_norm[..., 0], 1e-6)

    camera, camera_last = gdn_scan_camera(*(x.float() for x in (turn(q), turn(k), v, beta, gate, state)))
    close(camera_last.double(), wanted_last, 1e-6)
    close(
        camera.double(),
        torch.stack([torch.einsum("phd,hde->phe", turn(q)[f], past[f] + later[f]) for f in range(frames)]),
        1e-6,
    )


def diffusers_model(config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "SanaWMTransformer3DModel"):
        pytest.skip("this diffusers has no SANA-WM")
    return diffusers.SanaWMTransformer3DModel(
        in_channels=config.channels, num_layers=config.layers, hidden_size=config.dim, num_attention_heads=config.heads,
        softmax_every_n=config.softmax_every, linear_head_dim=config.head_dim, caption_channels=config.text_dim,
        chunk_plucker_channels=config.plucker_channels, chunk_plucker_post_attn_blocks=config.layers,
        mlp_ratio=config.ffn_dim / config.dim,
    ).eval()  # fmt: skip


def test_the_whole_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dialect is bidirectional, clips every ray and pads camera heads; and it rounds softmax blocks to bf16, which is a
    defect that nobody repeats."""
    config = replace(CONFIG, dialect=Dialect((0, 128), True, "all"))
    theirs = diffusers_model(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(
                torch.randn(parameter.shape, generator=generator) * 0.2 / max(1, parameter[0].numel()) ** 0.5
            )
    dit = SanaWMDiT(config).eval()
    softmax = {i for i in range(config.layers) if config.softmax(i)}
    given = {our_key(k, softmax): our_tensor(k, t) for k, t in theirs.state_dict().items()}
    given.pop(None, None)
    dit.load_state_dict(given)

    video = random_video(7)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    times = torch.tensor([0.0, *[727.0] * 6])
    mask = torch.ones(1, config.text_len)
    mask[:, 5:] = 0
    with torch.no_grad():
        wanted = theirs(
            video.latents[None], times[None, None], video.text[None, None], encoder_attention_mask=mask,
            camera_conditions=video.conditions[None],
            chunk_plucker=video.maps(0, 7)[None], return_dict=False,
        )[0][0]  # fmt: skip
        memory = Memory(config, GRID[0] * GRID[1])
        bias = torch.where(mask[0] > 0, 0.0, -1e4)
        got, _ = dit(
            video.latents, video.sinusoid(times), dit.context(video.text), bias, chunk_of(dit, video, memory, 0, 7)
        )
    close(got, wanted, 2e-5)


CHUNKS = (4, 3, 3)


def by_chunk(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNKS)


def whole_scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk-causal scan over all frames at once: forwards without a break, backwards inside each chunk."""
    eye = torch.eye(k.shape[-1])
    wk = k * beta[..., None]
    keep = eye - torch.einsum("fphd,fphe->fhde", wk, k)
    add = torch.einsum("fphd,fphe->fhde", wk, v)
    seen, state = [], start
    for f in range(len(k)):
        state = gate[f][:, None, None] * (keep[f] @ state) + add[f]
        seen.append(state)
    edges = [sum(CHUNKS[: i + 1]) - 1 for i in range(len(CHUNKS))]
    back = torch.zeros_like(start)
    for f in reversed(range(len(k))):
        back = torch.zeros_like(start) if f in edges else gate[f + 1][:, None, None] * (keep[f + 1] @ back) + add[f + 1]
        seen[f] = seen[f] + back
    return torch.einsum("fphd,fhde->fphe", q, torch.stack(seen)), state


def whole_kit() -> Any:
    """The ops of a whole sequence that is looked at chunk by chunk, written another way."""

    def short_conv(k: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        frames = len(k)
        chunk_of_frame = [i for i, n in enumerate(CHUNKS) for _ in range(n)]
        out = torch.zeros_like(k)
        for to in range(frames):
            for source in range(frames):
                apart = abs(to - source)
                if apart <= 3 and (source <= to or chunk_of_frame[source] == chunk_of_frame[to]):
                    out[to] += k[source] * weight[:, 3 - apart]
        return out

    def scan(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, cos: Tensor, sin: Tensor, *start: Tensor
    ) -> Any:
        def turn(x: Tensor) -> Tensor:
            return torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)[:, :, None]
            ).flatten(-2)

        top, state = whole_scan(turn(q), turn(k), v, beta, gate, start[0])
        below, norm = whole_scan(q, k, torch.ones_like(v[..., :1]), beta, gate, start[1][..., None])
        return top / (below + 1e-8), state, norm[..., 0]

    return PLAIN._replace(short_conv=short_conv, gdn_scan=scan, gdn_scan_camera=whole_scan)


def test_chunks_are_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten frames in chunks of 4, 3, 3 with state, against one pass over all of them whose ops know where chunks end."""
    dit, tokens, video = filled(SanaWMDiT(CONFIG).eval()), GRID[0] * GRID[1], random_video(10)
    chunked = run_video(dit, video, Memory(CONFIG, tokens, window=-1))

    def attend(layer: int, camera: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = [sum(CHUNKS[: i + 1]) for i in range(len(CHUNKS))]
        parts = [
            plain_attention(mine, k[:end].flatten(0, 1), v[:end].flatten(0, 1), CONFIG.score_scale(camera))
            for mine, end in zip(by_chunk(q), ends)
        ]
        return torch.cat(parts)

    along_time = FeedForward.along_time

    def whole_along_time(self: FeedForward, y: Tensor, tail: Tensor) -> Tensor:
        parts = by_chunk(y)
        tails = [tail, *(part[-1] for part in parts)]
        return torch.cat([along_time(self, part, before) for part, before in zip(parts, tails)])

    monkeypatch.setattr(FeedForward, "along_time", whole_along_time)
    chunk = chunk_of(dit, video, Memory(CONFIG, tokens), 0, 10)
    chunk = replace(chunk, attend=attend, kit=whole_kit())
    with torch.no_grad():
        whole, _ = dit(video.latents, video.sinusoid(torch.zeros(10)), dit.context(video.text), torch.zeros(8), chunk)
    close(chunked, whole, 2e-6)


def test_what_softmax_blocks_see() -> None:
    table = {
        (2, True): [(), (0,), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)],
        (3, True): [(), (0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5)],
        (2, False): [(), (0,), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
        (-1, True): [tuple(range(c)) for c in range(7)],
    }
    for (window, sink), rows in table.items():
        assert [seen_chunks(chunk, window, sink) for chunk in range(7)] == rows


@pytest.mark.parametrize(
    "dialect, same",
    [(Dialect((128, 0)), 0), (Dialect((0, 128)), 0), (Dialect((0, 0), False), 4), (Dialect(ray_clip="softmax"), 0)],
)
def test_each_switch_of_the_dialect_is_read(dialect: Dialect, same: int) -> None:
    """`same`: leading frames that do not differ: without a chunk before, there is no tail to leave out."""
    dit, other = (filled(SanaWMDiT(replace(CONFIG, dialect=d)).eval()) for d in (Dialect(), dialect))
    other.load_state_dict(dit.state_dict())
    tokens, video = GRID[0] * GRID[1], random_video(7)
    one, two = (run_video(d, video, Memory(d.config, tokens)) for d in (dit, other))
    assert torch.equal(one[:, :same], two[:, :same])
    assert float((one - two)[:, same:].norm() / one.norm()) > 1e-4


@pytest.mark.parametrize("what", ["state", "norm", "conv", "ffn", "history"])
def test_each_kind_of_state_is_read(what: str) -> None:
    dit = filled(SanaWMDiT(CONFIG).eval())
    video, memory = random_video(7), Memory(CONFIG, GRID[0] * GRID[1])
    whole = run_video(dit, video, memory)[:, 4:]

    forgotten = Memory(CONFIG, GRID[0] * GRID[1])
    run_video(dit, video, forgotten, chunks=1)
    blank = nothing_carried(CONFIG, GRID[0] * GRID[1])
    for kept, none in zip(forgotten.carried, blank):
        if what != "history" and getattr(kept, what) is not None:
            setattr(kept, what, getattr(none, what))
    if what == "history":
        forgotten.window = 0
        forgotten.sink = False
    error = float((run_video(dit, video, forgotten, first=1) - whole).norm() / whole.norm())
    assert error > 1e-3


def test_a_rigid_motion_of_the_world_changes_nothing_once_poses_are_relative() -> None:
    video = random_video(4)
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.2], [0.3, 0, -0.5], [-0.2, 0.5, 0]], dtype=torch.float64))
    move = torch.eye(4, dtype=torch.float64)
    move[:3, :3], move[:3, 3] = turn, torch.tensor([1.0, -2.0, 3.0])
    one, other = (relative_poses(poses.numpy()) for poses in (video.poses, move @ video.poses))
    assert (one[0] == np.eye(4)).all()
    assert float(np.abs(one - other).max()) < 1e-6
