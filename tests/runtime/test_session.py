"""Sessions on the toy backend: what they yield, live changes, failures, snapshots, long runs."""

from __future__ import annotations

import gc
import json
import re
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longtake.errors import IntegrityError, LongtakeError
from longtake.runtime.chunk import Chunk
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session
from longtake.runtime.snapshot import _digest
from longtake.runtime.story import Segment
from longtake.training.models.presets import TINY
from longtake.training.models.sampler import noise_for_chunk
from longtake.training.models.wan.rope import frame_positions
from longtake.training.models.wan.slots import visible_blocks
from longtake.training.models.wan.window import shot_offsets

STORY = (
    Segment("a red one", 2),
    Segment("a blue two", 2, cut=True),
    Segment("a green three", 3),
    Segment("end", 1, True),
)
Make = Callable[[Any], Any]


@pytest.fixture
def session(toy: Any, make_generator: Make) -> Session:
    """Eight chunks, three steps, guided."""
    return make_generator(toy).session(STORY, seed=3, steps=3, guidance=2.0)


def same(a: list[Chunk], b: list[Chunk]) -> bool:
    return len(a) == len(b) and all(
        x.index == y.index and torch.equal(x.latents, y.latents) and np.array_equal(x.frames, y.frames)
        for x, y in zip(a, b)
    )


def whole(toy: Any, make_generator: Make) -> list[Chunk]:
    with make_generator(toy).session(STORY, seed=3, steps=3, guidance=2.0) as session:
        return list(session)


def test_chunks_follow_the_script(session: Session) -> None:
    chunks = list(session)
    assert [c.prompt for c in chunks] == ["a red one"] * 2 + ["a blue two"] * 2 + ["a green three"] * 3 + ["end"]
    assert [c.cut for c in chunks] == [i in (2, 7) for i in range(8)]
    assert [c.shot for c in chunks] == [0, 0, 1, 1, 1, 1, 1, 2]
    assert [c.frames.shape for c in chunks] == [(29, 128, 128, 3)] + [(32, 128, 128, 3)] * 7
    assert chunks[0].frames.dtype == np.uint8 and chunks[0].latents.shape == (1, 8, 16, 8, 8)
    assert [c.visible for c in chunks] == visible_blocks([c.cut for c in chunks], TINY.window_chunks)
    assert set(chunks[0].timings) == {"conditions", "denoise", "clean", "decode"}


def test_passes_of_a_chunk(toy: Any, make_generator: Make) -> None:
    """Three guided steps and the clean pass: eight passes; only the last two write, all read the same table."""
    session = make_generator(toy).session(STORY, seed=3, steps=3, guidance=2.0)
    next(session), next(session)
    toy.calls.clear()
    next(session)
    assert [call["write_slot"] for call in toy.calls] == [[-1]] * 6 + [[2]] * 2
    assert {tuple(call["table"]) for call in toy.calls} == {(0, 1, -1)}


def test_without_guidance_there_is_one_cache(toy: Any, make_generator: Make) -> None:
    list(make_generator(toy).session(STORY, steps=2, guidance=1.0))
    assert len(toy.states) == 1 and len(toy.calls) == 8 * 3


def test_the_cut_prefix_is_encoded_at_cuts_only(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    original = session._conditioner.for_chunk
    monkeypatch.setattr(session._conditioner, "for_chunk", lambda c, s, p: (texts.append(p), original(c, s, p))[1])
    list(session)
    assert texts[2:4] == ["The scene transitions. a blue two", "a blue two"] and texts[0] == "a red one"


def test_a_prefix_in_the_first_prompt_is_encoded_and_no_cut(
    toy: Any, make_generator: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    prefix = "The scene transitions. "
    session = make_generator(toy).session([prefix + "a red one", "a red one", prefix + "a blue two"], steps=1)
    original = session._conditioner.for_chunk
    monkeypatch.setattr(session._conditioner, "for_chunk", lambda c, s, p: (texts.append(p), original(c, s, p))[1])
    chunks = list(session)
    assert texts == [prefix + "a red one", "a red one", prefix + "a blue two"]
    assert [chunk.cut for chunk in chunks] == [False, False, True]


def test_noise_depends_on_seed_and_index_only() -> None:
    first = noise_for_chunk(TINY, 5, 2)
    assert first.shape == (1, 8, 16, 8, 8) and torch.equal(first, noise_for_chunk(TINY, 5, 2))
    assert not torch.equal(first, noise_for_chunk(TINY, 5, 3)) and not torch.equal(first, noise_for_chunk(TINY, 6, 2))
    assert float(first.mean().abs()) < 0.05 and float((first.std() - 1).abs()) < 0.05


def test_positions_are_absolute_and_gapped_by_shots() -> None:
    assert frame_positions(TINY, 0, 0) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert frame_positions(TINY, 3, 2)[0] == 3 * 8 + 2 * 8
    assert frame_positions(TINY, 10**9, 0)[1] == 8 * 10**9 + 1  # no limit, no rounding


def test_positions_are_those_of_training() -> None:
    cuts = [False, False, True, False, True, True]
    shots = [sum(cuts[: i + 1]) for i in range(len(cuts))]
    offsets = shot_offsets(cuts, TINY.shot_rope_offset)
    assert [frame_positions(TINY, i, shots[i])[0] for i in range(6)] == [8 * i + offsets[i] for i in range(6)]


def test_same_seed_same_video_another_seed_another(make_toy: Any, make_generator: Make) -> None:
    assert same(whole(make_toy(), make_generator), whole(make_toy(), make_generator))
    other = make_generator(make_toy()).session(STORY, seed=4, steps=3, guidance=2.0)
    assert not torch.equal(next(other).latents, whole(make_toy(), make_generator)[0].latents)


# ---- live changes ----------------------------------------------------------------------------------------------------


def test_prompt_change_is_acknowledged_with_its_chunk(session: Session) -> None:
    next(session)
    assert session.change_prompt("a white nine") == 1
    chunks = list(session)
    assert [c.prompt for c in chunks[:3]] == ["a white nine", "a blue two", "a blue two"]
    assert not chunks[0].cut


def test_live_cut_rebinds_the_shot_sink(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"] * 8, steps=1, guidance=1.0)
    for _ in range(3):
        next(session)
    assert session.cut("y") == 3
    chunks = [next(session) for _ in range(5)]
    assert [c.prompt for c in chunks] == ["y", "x", "x", "x", "x"] and [c.cut for c in chunks] == [True] + [False] * 4
    assert chunks[-1].visible == (0, 3, 6, 7)


def test_change_during_a_chunk_takes_effect_at_the_next(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"] * 3, steps=2, guidance=1.0)
    acknowledged: list[int] = []

    def hook(call: int) -> None:
        if not acknowledged:
            acknowledged.append(session.change_prompt("y"))

    toy.hook = hook
    assert [c.prompt for c in session] == ["x", "y", "x"] and acknowledged == [1]


def test_two_changes_before_one_boundary(session: Session) -> None:
    next(session)
    assert session.cut("first") == session.change_prompt("second") == 1
    chunk = next(session)
    assert chunk.prompt == "second" and chunk.cut


def test_extend_and_endless(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0)
    assert len(list(session)) == 1
    session.extend(2)
    session.extend(1, "y")
    assert [c.prompt for c in session] == ["x", "x", "y"]
    endless = make_generator(toy).session(["x"], steps=1, guidance=1.0, endless=True)
    assert [next(endless).index for _ in range(5)] == [0, 1, 2, 3, 4]
    endless.change_prompt("z")
    assert [next(endless).prompt for _ in range(2)] == ["z", "z"]


@pytest.mark.parametrize("text", ["", "  \n", "x" * 5000, "\udcff"])
def test_bad_live_prompts(session: Session, text: str) -> None:
    with pytest.raises(LongtakeError, match="the new prompt is (empty|too long|not UTF-8 text)"):
        session.change_prompt(text)
    assert next(session).prompt == "a red one"


# ---- generate, then commit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_failure_at_any_pass_leaves_the_session_as_it_was(make_toy: Any, make_generator: Make, error: Any) -> None:
    """Chunk 4 evicts a block. Fail at each of its network calls in turn, retry, and compare with an undisturbed run."""
    expected = whole(make_toy(), make_generator)
    toy = make_toy()
    session = make_generator(toy).session(STORY, seed=3, steps=3, guidance=2.0)
    chunks = [next(session) for _ in range(4)]
    for number in range(1, 13):  # two prompts encoded (4 calls), 3 guided steps (6), the clean pass (2)
        session._conditioner.forget()  # so that every attempt encodes its prompts anew
        toy.fail_at(number, error)
        with pytest.raises((RuntimeError, KeyboardInterrupt, LongtakeError)):
            next(session)
        assert session.next_index == 4
    assert toy.calls[-1]["write_slot"] == [1]  # the last failure hit a pass that had half-written its slot
    session._conditioner.forget()
    toy.fail_at(13, error)  # one more call than the chunk makes: this time it is not reached
    chunks.append(next(session))
    toy.hook = lambda call: None
    assert same(chunks + list(session), expected)


def test_out_of_memory_is_a_clear_error(toy: Any, session: Session) -> None:
    toy.fail_at(3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    with pytest.raises(LongtakeError, match="out of memory in chunk 0; the session is as it was"):
        next(session)


def test_cancel_is_seen_between_passes(toy: Any, make_generator: Make, make_toy: Any) -> None:
    expected = whole(make_toy(), make_generator)
    session = make_generator(toy).session(STORY, seed=3, steps=3, guidance=2.0)
    chunks = [next(session)]
    before = toy.count
    toy.hook = lambda call: session.cancel() if call == before + 4 else None
    with pytest.raises(CancelledError, match="before chunk 1"):
        next(session)
    assert toy.count == before + 4
    assert same(chunks + list(session), expected)


def test_edit_survives_a_failed_chunk(toy: Any, session: Session) -> None:
    next(session)
    session.cut("kept")
    toy.fail_at(2, RuntimeError("boom"))
    with pytest.raises(RuntimeError):
        next(session)
    chunk = next(session)
    assert chunk.index == 1 and chunk.prompt == "kept" and chunk.cut


def test_a_decode_error_reaches_the_caller(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"] * 6, steps=1, guidance=1.0)
    first = next(session)
    snapshot = session.snapshot()

    def fail() -> None:
        raise RuntimeError("decoder broke")

    toy.on_decode = fail
    second = next(session)
    with pytest.raises(RuntimeError, match="decoder broke"):
        second.frames  # noqa: B018
    again = next(session)
    with pytest.raises(RuntimeError, match="decoder broke"):
        again.frames  # noqa: B018
    assert again.index == 1 and first.frames.shape[0] == 29  # what was finished stays
    toy.on_decode = lambda: None
    session.restore(snapshot)
    assert next(session).frames.shape[0] == 32
    session.close()


def test_decoding_is_bounded_and_in_order(toy: Any, make_generator: Make) -> None:
    gate, running = threading.Event(), threading.Event()

    def wait() -> None:
        running.set()
        assert gate.wait(10)

    toy.on_decode = wait
    session = make_generator(toy).session(["x"] * 10, steps=1, guidance=1.0)
    chunks: list[Chunk] = []
    worker = threading.Thread(target=lambda: chunks.extend(session))
    worker.start()
    assert running.wait(10)
    worker.join(0.5)
    assert worker.is_alive() and len(toy.calls) <= 2 * 4  # one decoding, one queued, one waiting to be queued
    gate.set()
    worker.join(20)
    assert [c.index for c in chunks] == list(range(10)) and all(len(c.frames) for c in chunks)
    session.close()


# ---- snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_restore_goes_on_bit_for_bit(make_toy: Any, make_generator: Make, at: int) -> None:
    expected = whole(make_toy(), make_generator)
    session = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    for _ in range(at):
        next(session)
    snapshot = session.snapshot()
    assert same(list(session), expected[at:])
    session.restore(snapshot)
    assert same(list(session), expected[at:])
    other = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    other.restore(snapshot)
    assert same(list(other), expected[at:])


def test_save_and_load(make_toy: Any, make_generator: Make, tmp_path: Path) -> None:
    expected = whole(make_toy(), make_generator)
    session = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    for _ in range(3):
        next(session)
    session.change_prompt("pending")
    session.save(tmp_path / "s.safetensors")
    loaded = make_generator(make_toy()).load_session(tmp_path / "s.safetensors")
    assert loaded.next_index == 3 and next(loaded).prompt == "pending"
    session._position = session._position.__class__(**{**vars(session._position), "edits": ()})
    session.save(tmp_path / "s.safetensors")
    assert same(list(make_generator(make_toy()).load_session(tmp_path / "s.safetensors")), expected[3:])
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_session_saved_by_version_1_goes_on(make_toy: Any, make_generator: Make, tmp_path: Path) -> None:
    """Its tensors were numbered by layer, and it named no family."""
    expected = whole(make_toy(), make_generator)
    session = make_generator(make_toy()).session(STORY, seed=3, steps=3, guidance=2.0)
    for _ in range(3):
        next(session)
    snapshot = session.snapshot()
    tensors = {re.sub(r"layer_(\d)", r"\1.0", name): tensor for name, tensor in snapshot.tensors.items()}
    assert {"positive.0.0", "negative.1.0"} < set(tensors)
    identity = {key: value for key, value in asdict(snapshot.identity).items() if key != "family"}
    about = {"version": 1, "noise": 1, "identity": identity, "position": snapshot.position.as_json()}
    text = json.dumps(about)
    header = {"format": "longtake-session", "session": text, "sha256": _digest(text, tensors)}
    save_file(tensors, str(tmp_path / "old.safetensors"), metadata=header)
    assert same(list(make_generator(make_toy()).load_session(tmp_path / "old.safetensors")), expected[3:])


def test_damaged_and_foreign_saves_are_refused(
    session: Session, toy: Any, make_generator: Make, tmp_path: Path
) -> None:
    next(session)
    path = tmp_path / "s.safetensors"
    session.save(path)
    good = path.read_bytes()
    generator = make_generator(toy)
    cases = {
        "altered after it was saved": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "no readable saved session": good[: len(good) // 2],
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=message):
            generator.load_session(path)
    path.write_bytes(b"\x80\x04\x95 a pickle")
    with pytest.raises(IntegrityError, match="no readable saved session"):
        generator.load_session(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(IntegrityError, match="is not a saved session"):
        generator.load_session(path)
    with pytest.raises(LongtakeError, match="does not exist"):
        generator.load_session(tmp_path / "missing")


def test_restoring_what_does_not_fit_is_refused(session: Session, toy: Any, make_generator: Make) -> None:
    next(session)
    snapshot = session.snapshot()
    for change in ({"seed": 9}, {"steps": 5}, {"guidance": 1.0}, {"negative_prompt": "ugly"}):
        options = {"seed": 3, "steps": 3, "guidance": 2.0, **change}
        other = make_generator(toy).session(STORY, **options)
        with pytest.raises(LongtakeError, match=f"the saved session has another {next(iter(change))}"):
            other.restore(snapshot)
        other.close()


# ---- long runs -------------------------------------------------------------------------------------------------------


def test_a_thousand_chunks_move_no_buffer_and_grow_nothing(toy: Any, make_generator: Make) -> None:
    generator = make_generator(toy)
    session = generator.session(["x"], steps=1, guidance=1.0, decode=False, endless=True)
    addresses = [t.data_ptr() for t in session._state.tensors().values()]

    def go(chunks: int) -> None:
        for index in range(chunks):
            if index % 7 == 3:
                session.cut(f"shot {index % 5}")
            next(session)
            toy.calls.clear()

    go(100)
    gc.collect()
    tracemalloc.start()
    go(20)
    gc.collect()
    early = tracemalloc.get_traced_memory()[0]
    go(880)
    gc.collect()
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert session.next_index == 1000
    assert [t.data_ptr() for t in session._state.tensors().values()] == addresses
    assert late - early < 64 * 1024


def test_a_dropped_session_ends_its_thread(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], steps=1, guidance=1.0)
    next(session).frames  # noqa: B018
    thread = session._decoding._thread  # type: ignore[union-attr]
    del session
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
