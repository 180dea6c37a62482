"""Long sessions: nothing drifts, nothing moves, nothing grows.

Ten thousand chunks of the tiny preset are 80,000 latent frames, 3.7 hours of video; the bookkeeping runs through the
real session over a backend that keeps a ledger instead of computing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from engines_here import engines_of, on_engines
from torch import Tensor
from untrained import random_models

from longtake.formats.recipe import recipe_named
from longtake.runtime.backends.base import Backend, State
from longtake.runtime.backends.trt.engine import device_bytes_used
from longtake.runtime.generator import Generator
from longtake.runtime.session import Session
from longtake.runtime.video_model import Tensors
from longtake.training.models.presets import TINY
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.models.wan.networks import DiTStep
from longtake.training.models.wan.rope import rope_tables, timestep_sinusoid

RECIPE = "tiny_w4a16_sm90"
CHUNKS, STEPS = 10_000, 1
CUTS = {chunk for chunk in range(1, CHUNKS) if chunk % 11 == 3 or chunk % 97 in (40, 41)}  # some right after another


@dataclass
class Seen:
    """What the passes of one chunk were given, and the slot its K/V went to."""

    first_sample: float
    angles: list[tuple[float, float]]  # cos and sin of the fastest pair, which turns by its position, of each frame
    blocks: list[int]  # what lay in the slots of the table when it was read, -1 for the current block
    passes: int
    written: int | None


class Ledger(Backend):
    """A backend double. A cache slot holds the number of the chunk that wrote it, so reading one says whose it is."""

    name, reason, flavour = "ledger", "made for tests", ""

    def __init__(self) -> None:
        self.device, self.preset, self.recipe = torch.device("cpu"), TINY, recipe_named("tiny_bf16_sm90")
        self.chunks: list[Seen] = []
        self.frames = self.encoded = 0
        self._open = False

    def has(self, network: str) -> bool:
        return not network.startswith("vae_encoder")

    def new_state(self, network: str) -> State:
        return State({"slots": torch.full((4,), -7.0)})

    def run(self, network: str, inputs: Tensors, state: State | None = None, commit: bool = True) -> Tensors:
        if network == "text_encoder":
            self.encoded += 1
            return {"embeddings": torch.zeros(1, 32, 128)}
        if network == "context":
            return {"context_0": torch.zeros(1)}
        if network == "dit":
            assert state is not None
            self._note(inputs, state.tensors["slots"], commit)
            return {"velocity": inputs["latents"]}
        count = 1 if network == "vae_first" else 4
        self.frames += count
        return {"frames": torch.zeros(1, 3, count, 1, 1)}  # one pixel, counted

    def _note(self, inputs: Tensors, slots: Tensor, commit: bool) -> None:
        table, slot = inputs["table"].tolist(), int(inputs["write_slot"])
        blocks = [-1 if entry < 0 else int(slots[entry]) for entry in table]
        if not self._open:
            frames = slice(0, None, TINY.frame_tokens)
            angles = list(zip(inputs["rope_cos"][frames, 0].tolist(), inputs["rope_sin"][frames, 0].tolist()))
            self.chunks.append(Seen(float(inputs["latents"][0, 3, 5, 1, 2]), angles, blocks, 0, None))
        now = self.chunks[-1]
        assert now.blocks == blocks  # every pass of a chunk reads the same
        now.passes += 1
        self._open = not commit
        assert slot not in table
        if commit:
            now.written = slot
            slots[slot] = len(self.chunks) - 1

    def peak_bytes(self) -> int:
        return 0


def ledger_session(backend: Ledger, decode: bool) -> Session:
    def tokenize(texts: list[str], length: int) -> Tensor:
        return torch.zeros(len(texts), length, dtype=torch.int32)

    return Generator(backend, tokenize).session(["a"], seed=5, steps=STEPS, guidance=1.0, decode=decode, endless=True)


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """Ten thousand chunks; cuts and prompt changes arrive live."""
    backend = Ledger()
    session = ledger_session(backend, decode=False)
    sizes = []
    for index in range(CHUNKS):
        if index in CUTS:
            assert session.cut(f"shot {index % 5}") == index
        elif index % 13 == 6:
            assert session.change_prompt(f"prompt {index % 3}") == index
        chunk = next(session)
        assert (chunk.index, chunk.cut) == (index, index in CUTS)
        if index % 1000 == 999:
            sizes.append(len(json.dumps(session._position.as_json())))
    assert session.next_index == CHUNKS and session._position.shot == len(CUTS)
    assert max(sizes) - min(sizes) < 40  # a few digits: no script, edit or block is left behind
    session.close()
    return backend


def test_ten_thousand_chunks_take_their_passes(ledger: Ledger) -> None:
    assert len(ledger.chunks) == CHUNKS and {seen.passes for seen in ledger.chunks} == {STEPS + 1}
    assert ledger.encoded < CHUNKS / 2  # a prompt is encoded when it changes, not for each chunk


def test_every_frame_is_decoded_once() -> None:
    """Decoding runs in its own thread; how many frames a chunk has doesn't depend on how many came before."""
    backend = Ledger()
    session = ledger_session(backend, decode=True)
    counts = [len(next(session).frames) for _ in range(100)]
    session.close()
    assert counts == [29] + [32] * 99 and sum(counts) == backend.frames == 1 + 4 * (8 * 100 - 1)


def test_ten_thousand_chunks_read_the_right_blocks(ledger: Ledger) -> None:
    """By the rule in words: [first block, shot's first block once nothing is between, newest blocks], four in all."""
    shot: int | None = None
    held: list[int] = []
    for index, seen in enumerate(ledger.chunks):
        if len(held) == 4:
            del held[2 if shot is not None and held[1] == shot else 1]
        assert seen.blocks == [*held, -1] and len(seen.blocks) <= 4, index
        assert seen.written in range(4)
        held.append(index)
        shot = index if index in CUTS else shot


def test_ten_thousand_chunks_turn_their_keys_without_drift(ledger: Ledger) -> None:
    """The fastest pair turns one radian a position: its tables are those of the exact integer, to fp32's last bit."""
    shots = 0
    for index, seen in enumerate(ledger.chunks):
        shots += index in CUTS
        for frame, (cos, sin) in enumerate(seen.angles):
            position = index * 8 + shots * 8 + frame
            assert abs(cos - math.cos(position)) < 2**-24 and abs(sin - math.sin(position)) < 2**-24, (index, frame)
    assert position > 88_000


def test_ten_thousand_chunks_draw_their_own_noise(ledger: Ledger) -> None:
    """It depends on seed and chunk only, so any chunk's can be drawn again, and no two are alike."""
    for index in (0, 1, 4_999, CHUNKS - 1):
        noise = noise_for_chunk(TINY, 5, index).transpose(1, 2)
        assert float(noise[0, 3, 5, 1, 2]) == ledger.chunks[index].first_sample
    firsts = torch.tensor([seen.first_sample for seen in ledger.chunks], dtype=torch.float64)
    assert len(set(firsts.tolist())) > 0.99 * CHUNKS  # single fp32 numbers may coincide, whole chunks can't
    assert abs(firsts.mean()) < 0.04 and abs(firsts.std() - 1) < 0.03  # four standard errors


@torch.no_grad()
def test_the_model_sees_no_difference_ten_thousand_chunks_on() -> None:
    """Attention depends on distances in time only, so the tiny DiT's velocity is the same 80,000 frames later."""
    models = random_models(TINY)
    step = DiTStep(models.dit, "bf16")
    latents, context = torch.randn(2, 1, 16, 8, 8, 8), list(models.dit.context(torch.randn(32, 128)))

    def second_chunk(start: int) -> Tensor:
        caches = [torch.zeros(4, 2, TINY.chunk_tokens, 4, 64) for _ in range(TINY.dit.layers)]
        for i, (timestep, table, slot) in enumerate(((0.0, [-1], 0), (624.0, [0, -1], -1))):
            cos, sin = rope_tables(TINY.dit, [start + 8 * i + frame for frame in range(8)], TINY.grid_hw)
            velocity, *caches = step(
                latents[i], timestep_sinusoid([timestep] * 8, 256), cos, sin,
                torch.tensor(table, dtype=torch.int32), torch.tensor([slot], dtype=torch.int32), *context, *caches,
            )  # fmt: skip
        return velocity

    near, far = second_chunk(0), second_chunk(8 * CHUNKS)
    assert (near - far).norm() <= 1e-5 * near.norm()
    assert (near - second_chunk(0)).norm() == 0


@on_engines
def test_a_thousand_chunks_move_no_buffer_and_take_no_more_memory() -> None:
    session = Generator.from_engines(engines_of(RECIPE), backend="segmented").session(
        ["a green seven drifts left over a sea background, soft light"],
        steps=1,
        guidance=1.0,
        decode=False,
        endless=True,
    )
    addresses = [t.data_ptr() for t in session._state.tensors().values()]

    def used_after(chunks: int) -> int:
        for index in range(chunks):
            if index % 7 == 3:
                session.cut(f"a red {index % 5} circles over a forest background, soft light")
            next(session)
        torch.cuda.synchronize()
        return device_bytes_used(torch.device("cuda"))

    early = used_after(50)
    assert used_after(950) - early < 1 << 20
    assert session.next_index == 1000
    assert [t.data_ptr() for t in session._state.tensors().values()] == addresses
