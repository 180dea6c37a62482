"""A decoder that fails once is not the end: the session is as it was before the chunk, and the next try is the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.decode import DecodeQueue
from longtake.runtime.session import Session
from longtake.runtime.snapshot import Snapshot, snapshot_from_file
from longtake.runtime.story import Segment
from longtake.runtime.video_model import VideoModel
from longtake.training.models.presets import TINY

STORY = (
    Segment("a red one", 2),
    Segment("a blue two", 2, cut=True),
    Segment("a green three", 3),
    Segment("end", 1, True),
)
Make = Callable[[Any], Any]


def story(toy: Any, make_generator: Make) -> Session:
    return make_generator(toy).session(STORY, seed=3, steps=2, guidance=2.0)


@pytest.fixture
def expected(make_toy: Any, make_generator: Make) -> list[Chunk]:
    with story(make_toy(), make_generator) as session:
        return list(session)


def same(a: Chunk, b: Chunk) -> bool:
    return a.index == b.index and a.prompt == b.prompt and torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)  # fmt: skip


def fail_at(toy: Any, number: int, error: BaseException) -> None:
    """Raise in the `number`-th latent that is decoded from now, once."""
    count = iter(range(1, 1 << 30))

    def on_decode() -> None:
        if next(count) == number:
            raise error

    toy.on_decode = on_decode


def digest(snapshot: Snapshot) -> tuple[Any, ...]:
    """Position and all tensors that the next chunk reads: what its attempts wrote lies in a slot that nobody reads."""
    slots = sorted(snapshot.position.slots.plan(False).inputs["table"])  # type: ignore[arg-type]
    read = [slot for slot in slots if slot >= 0]
    tensors = {k: t if k.startswith("decoder") else t[read] for k, t in snapshot.tensors.items()}
    return snapshot.position, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("latent", [1, 4, 8])
@pytest.mark.parametrize("chunk", [0, 1, 3, 7])
def test_a_chunk_that_cannot_be_decoded_is_as_if_it_had_not_been(
    toy: Any, make_generator: Make, expected: list[Chunk], chunk: int, latent: int
) -> None:
    with story(toy, make_generator) as session:
        made = [next(session) for _ in range(chunk)]
        before = digest(session.snapshot())
        fail_at(toy, latent, RuntimeError("decoder broke"))
        failed = next(session)
        with pytest.raises(RuntimeError, match="decoder broke"):
            failed.frames  # noqa: B018
        assert session.next_index == chunk and session.remaining == 8 - chunk
        assert digest(session.snapshot()) == before and digest(session.snapshot()) == before
        assert all(map(same, [*made, *session], expected))


def test_who_has_not_seen_the_error_is_told_once(toy: Any, make_generator: Make, expected: list[Chunk]) -> None:
    with story(toy, make_generator) as session:
        first = next(session)
        first.frames  # noqa: B018
        fail_at(toy, 3, torch.OutOfMemoryError("CUDA out of memory"))
        next(session).decoding.wait()  # type: ignore[union-attr]
        with pytest.raises(torch.OutOfMemoryError):
            next(session)
        assert session.next_index == 1
        assert all(map(same, [first, *session], expected))


def ahead(toy: Any, session: Session) -> list[Chunk]:
    """Chunks 2 and 3, both committed before the decoding of chunk 2 fails."""
    gate, count = threading.Event(), iter(range(1 << 30))

    def on_decode() -> None:
        gate.wait(10)
        if next(count) == 5:
            raise RuntimeError("decoder broke")

    toy.on_decode = on_decode
    chunks = [next(session), next(session)]
    gate.set()
    for chunk in chunks:
        with pytest.raises(RuntimeError, match="decoder broke"):
            chunk.frames  # noqa: B018
    return chunks


def test_a_chunk_that_others_were_made_after_is_decoded_again(
    toy: Any, make_generator: Make, expected: list[Chunk], tmp_path: Path
) -> None:
    with story(toy, make_generator) as session:
        made = [next(session), next(session)]
        made[1].frames  # noqa: B018
        ahead(toy, session)
        assert session.next_index == 2 and session.remaining == 6
        calls = len(toy.calls)
        session.save(tmp_path / "s.safetensors")
        made.append(next(session))
        assert len(toy.calls) == calls, "its latents were kept: no pass"
        assert all(map(same, [*made, *session], expected))
        assert not session._undecoded.kept and len(session._undecoded.chunks) <= 2
    with story(toy, make_generator) as other:
        other.restore(snapshot_from_file(tmp_path / "s.safetensors"))
        assert all(map(same, list(other), expected[2:]))


def test_what_is_asked_for_meanwhile_is_kept(toy: Any, make_generator: Make, expected: list[Chunk]) -> None:
    with story(toy, make_generator) as session:
        for _ in range(2):
            next(session).frames  # noqa: B018
        ahead(toy, session)
        assert session.change_prompt("something else") == 3, "chunk 2 is made, chunk 3 is not"
        session.extend(2, "more")
        with pytest.raises(LongtakeError, match="chunk 2 has yet to be decoded"):
            session.feed(expected[2].latents, "a clip")
        chunks = list(session)
        assert [c.prompt for c in chunks[:3]] == ["a blue two", "something else", "a green three"]
        assert same(chunks[0], expected[2]) and not torch.equal(chunks[1].latents, expected[3].latents)
        assert [c.index for c in chunks] == list(range(2, 10))


def test_a_prompt_changed_after_a_failure_shapes_that_chunk(toy: Any, make_generator: Make) -> None:
    with story(toy, make_generator) as session:
        fail_at(toy, 2, RuntimeError("decoder broke"))
        with pytest.raises(RuntimeError):
            next(session).frames  # noqa: B018
        assert session.change_prompt("another") == 0 and next(session).prompt == "another"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), MemoryError()])
@pytest.mark.parametrize("where", ["after hand-over", "before the commit"])
def test_frames_are_always_those_of_the_chunk(
    make_toy: Any, make_generator: Make, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def chunk(interrupted: bool) -> tuple[Chunk, Snapshot]:
        with story(make_toy(), make_generator) as session:
            next(session).frames  # noqa: B018
            before = digest(session.snapshot())
            owner: Any = session._decoding if where == "after hand-over" else session
            name = "submit" if where == "after hand-over" else "_commit"
            call = getattr(owner, name)

            def once(*words: Any, **more: Any) -> Any:
                if name == "submit":
                    call(*words).wait()
                monkeypatch.undo()
                raise error

            if interrupted:
                monkeypatch.setattr(owner, name, once)
                with pytest.raises((KeyboardInterrupt, RuntimeError, LongtakeError)):
                    next(session)
                assert digest(session.snapshot()) == before
            session.change_prompt("a red two circles over a sea")
            return next(session), session.snapshot()

    (one, state), (other, again) = chunk(False), chunk(True)
    assert same(one, other) and digest(state) == digest(again)


# ---- the decoder's past ----------------------------------------------------------------------------------------------


class Shifting:
    """A decoder like a VAE's: caches of the last two inputs of each layer, in place, and no more than that."""

    def __init__(self, layers: int = 3) -> None:
        self.caches = [torch.zeros(1, 1, 2, 1, 1) for _ in range(layers)]
        self.started, self.fail = False, -1

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        value, self.started = latent_BCHW.mean(), True
        for i, cache in enumerate(self.caches):
            self.fail -= 1
            past = cache.flatten()
            value, past[0], past[1] = (0.3 * past[0] + 0.7 * past[1] + value).sin(), past[1].clone(), value
            if self.fail == 0:
                raise RuntimeError(f"layer {i} broke")
        return value.expand(3, 4, 128, 128)

    def state(self) -> list[Tensor]:
        return self.caches if self.started else []

    def load_state(self, tensors: list[Tensor]) -> None:
        self.started = bool(tensors)
        for cache, tensor in zip(self.caches, tensors or [torch.zeros(1)] * len(self.caches)):
            cache.copy_(tensor)


def latents(seed: int) -> Tensor:
    return torch.randn(1, 8, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("past", [None, 6, 60])
@pytest.mark.parametrize("restored", [False, True])
def test_every_way_back_gives_the_same_bits(past: int | None, restored: bool) -> None:
    cpu = torch.device("cpu")
    plain, broken = DecodeQueue(Shifting(), TINY, cpu), DecodeQueue(Shifting(), TINY, cpu, past_latents=past)
    for index in range(12):
        wanted = plain.submit(index, latents(index)).result()
        if index == 5 and restored:
            broken.load_state([tensor.clone() for tensor in broken.state()])
        if index in (0, 1, 6, 11):
            broken.decoder.fail = 8  # type: ignore[attr-defined]
            with pytest.raises(RuntimeError, match="layer 1 broke"):
                broken.submit(index, latents(index)).result()
            broken.rewind(index)
        if index == 7:  # decoded for nothing
            broken.submit(index, latents(99)).result()
        assert np.array_equal(broken.submit(index, latents(index)).result(), wanted), index
        assert all(map(torch.equal, broken.state(), plain.state())), index
    for queue in (plain, broken):
        queue.close()


@pytest.mark.slow
def test_a_real_decoder_depends_on_no_more_latents_than_it_says() -> None:
    """Two pasts that have only the last so many latents in common leave the same bits in every cache."""
    from longtake.formats.recipe import recipe_named
    from longtake.runtime.backends.torch_oracle import TorchBackend

    backend = TorchBackend(recipe_named("tiny_bf16_sm90"), device=torch.device("cpu"))
    backend.decode_device = torch.device("cuda", 0)  # as if: the number is asked for there only
    first, second = VideoModel(backend).decoder(), VideoModel(backend).decoder()
    backend.decode_device = torch.device("cpu")
    past = _past(first, backend)
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(1, 16, 8, 8, generator=generator) for _ in range(past + 1)]
    first.decode(torch.randn(1, 16, 8, 8, generator=generator))
    second.decode(frames[0])
    for tensor in second.state():
        tensor.zero_()
    for frame in frames[1:]:
        first.decode(frame)
        second.decode(frame)
    assert past < 100 and all(map(torch.equal, first.state(), second.state()))


def _past(decoder: Any, backend: Any) -> int:
    backend.decode_device = torch.device("cuda", 0)
    past = decoder.past_latents
    backend.decode_device = torch.device("cpu")
    assert past is not None and decoder.past_latents is None
    return int(past)


def test_an_error_that_shows_while_the_next_chunk_is_handed_over_is_not_forgotten(
    toy: Any, make_generator: Make, expected: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, raise_error = threading.Event(), DecodeQueue.raise_error

    def break_once() -> None:
        gate.wait(10)
        toy.on_decode = lambda: None
        raise RuntimeError("decoder broke")

    def look(queue: DecodeQueue) -> None:
        """Chunk 1 fails just after `submit` has looked at earlier errors."""
        raise_error(queue)
        if not gate.is_set():
            gate.set()
            second.decoding.wait()  # type: ignore[union-attr]

    with story(toy, make_generator) as session:
        first = next(session)
        first.frames  # noqa: B018
        toy.on_decode = break_once
        second = next(session)
        monkeypatch.setattr(DecodeQueue, "raise_error", look)
        third = next(session)
        for chunk in (second, third):
            with pytest.raises(RuntimeError, match="decoder broke"):
                chunk.frames  # noqa: B018
        assert session.next_index == 1
        assert all(map(same, [first, *session], expected))
