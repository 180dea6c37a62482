"""A session: one video in the making, chunk by chunk. It generates, then commits.

One caller at a time: a second thread that wants a chunk, feeds, restores or takes a snapshot meanwhile is refused. Live
changes may come from any thread.

Legend: B = 1, F latent frames of a chunk, C latent channels, H, W sizes, T video frames.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.out_of_memory import is_out_of_memory
from longtake.outputs import claim_outputs
from longtake.runtime.camera import CameraPosition, cameras_of
from longtake.runtime.chunk import Chunk, finite, given_chunk
from longtake.runtime.clock import StageClock
from longtake.runtime.conditions import OWN, Conditioner, SessionInputs, Tokenize
from longtake.runtime.decode import DecodeQueue, decode_queue
from longtake.runtime.live_changes import LiveChanges
from longtake.runtime.retake import Take, retaken
from longtake.runtime.sampling import ChunkSampler, OnStep
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.snapshot import (
    FIRST_LATENT,
    Identity,
    Snapshot,
    check_same,
    identity_of,
    load_tensors,
    snapshot_to_file,
)
from longtake.runtime.state import HandedOver, Position, SessionState, Undecoded
from longtake.runtime.story import Segment, checked_prompt
from longtake.runtime.video_model import VideoModel
from longtake.training.models.family import Plan
from longtake.training.models.sana_wm.actions import Walk


class Session(LiveChanges):
    """An iterator over chunks. Live changes: `change_prompt`, `cut`, `extend`, `cancel` (from any thread)."""

    def __init__(
        self,
        model: VideoModel,
        tokenize: Tokenize,
        script: tuple[Segment, ...],
        options: SessionOptions,
        first_latent: Tensor | None = None,
        inputs: SessionInputs = OWN,
        on_step: OnStep | None = None,
        camera: CameraPosition | None = None,
    ) -> None:
        """`first_latent`: normalized latent of the picture that the video starts from, fp32 [1, C, H, W], or None.
        `camera`: of a model with cameras."""
        self.model, self.options, self.inputs, self.tokenize = model, options, inputs, tokenize
        embedding, noise = inputs.embedding_of(model, tokenize), inputs.noise_of(model.preset, options.seed)
        self._conditioner = Conditioner(model, embedding, noise, options.negative, options.schedule.timesteps)
        self._state = SessionState(model, negative=options.guided)
        self._cancelled = threading.Event()
        self._sampler = ChunkSampler(model, self._conditioner, self._state, options, self._cancelled, on_step)
        self._position = Position(script, model.family.start(model.preset), camera=camera)
        self.told: dict[str, Any] = {}  # what a report says of its start
        self._first = None if first_latent is None else first_latent.to(model.device, torch.float32)
        self._decoding = decode_queue(model) if options.decode else None
        if self._decoding:
            # A session that is dropped without `close` must not leave its thread (and the decoder's memory) behind.
            weakref.finalize(self, self._decoding.close)
        self._undecoded = Undecoded()
        self._lock = threading.Lock()  # of the position, held for a moment
        self._using = threading.Lock()  # held while a chunk is made: its state has one user
        self._busy = self._scripted = self._closed = False
        self._takes: list[Take] | None = [] if options.retakes else None  # every chunk so far, for `retake`

    def __repr__(self) -> str:
        here, state = self._position, "closed" if self._closed else "open"
        return f"<Session {state}: chunk {here.chunk} is next, {self.remaining} left, prompt {here.prompt!r:.60}>"

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Generate and commit the next chunk. Whatever is raised, the session is as it was.

        Raises:
            LongtakeError: the session is closed, or another thread is using it.
        """
        with self._turn("the next chunk"):
            segment = self._begin()
            if segment is None:
                raise StopIteration
            return self._attempt(segment, None)

    @contextmanager
    def _turn(self, wanted: str, closed: bool = False, decoder_error: bool = True) -> Iterator[None]:
        """Be the session's only user. `closed`: it may be closed. `decoder_error`: one that nobody was told is raised."""
        if not self._using.acquire(blocking=False):
            what = f"the session is busy with chunk {self.next_index}"
            fix = "wait for the chunk, or give each thread a session of its own"
            raise LongtakeError(what, got=f"a call for {wanted}", expected="one caller at a time", fix=fix)
        try:
            if not closed:
                self._require_open(wanted)
            if self._decoding:
                self._settle(self._decoding, decoder_error)
            yield
        finally:
            self._using.release()

    def _settle(self, decoding: DecodeQueue, tell: bool) -> None:
        """Go back to before a chunk that could not be decoded, or that was handed over but not committed; then `tell`
        the decoder's error, if nobody was told of it."""
        if (failed := decoding.failed) is not None:
            with self._lock:
                self._position = self._undecoded.position_before(failed.index, self._position)
        self._undecoded.settle(decoding.decoded, self._position)
        decoding.rewind(self._position.chunk)
        if failed is not None and tell and not failed.told:
            failed.raise_error()

    def _look_back(self) -> None:
        """`_settle` if a decoder's error was told, unless the session is in use."""
        failed = self._decoding.failed if self._decoding else None
        if failed is not None and failed.told and self._using.acquire(blocking=False):
            try:
                self._settle(self._decoding, tell=False)  # type: ignore[arg-type]
            finally:
                self._using.release()

    def _require_open(self, wanted: str) -> None:
        if self._closed or self.model.closed:
            what, got = f"the {'session' if self._closed else 'generator'} is closed", f"a call for {wanted}"
            raise LongtakeError(what, got=got, expected="an open one", fix="load the saved session, or start a new one")

    def feed(self, latents_BFCHW: Tensor | np.ndarray[Any, Any], prompt: str, cut: bool = False) -> Chunk:
        """Take given latents, [1, F, C, H, W], as the next chunk: their K/V and the decoder's state, no sampling.

        That is how a video goes on from a clip. The script stays as it is, and live changes wait for the next chunk
        that is generated. Whatever is raised, the session is as it was.

        Raises:
            LongtakeError: the latents are not one chunk of this preset, or not finite, or the prompt is none.
        """
        given = finite(given_chunk(latents_BFCHW, self.model.preset, self._position.chunk), "these latents")
        given = given.to(self.model.device)
        self.inputs.require_noise(self.model.preset, self._position.whole + 1)
        with self._turn("a chunk that is given"):
            if self._position.chunk in self._undecoded.kept:
                what, got = f"chunk {self._position.chunk} has yet to be decoded", "another one for its place"
                expected, fix = "a call for the next chunk", "call next(session) first"
                raise LongtakeError(what, got=got, expected=expected, fix=fix)
            segment = Segment(checked_prompt(prompt, "the clip's prompt"), 1, cut and self._position.chunk > 0)
            return self._attempt(segment, given)

    def replay(self, latents_BFCHW: Tensor, after: Position) -> Chunk:
        """Take latents that a session made before as the next chunk, without sampling; the position is then `after`.

        So a video that was kept chunk by chunk goes on as if nothing had happened. Whatever is raised, the session is as it was.

        Raises:
            LongtakeError: these are no latents of a chunk, or `after` is not where this session is after one more chunk.
        """
        given = given_chunk(latents_BFCHW, self.model.preset, self._position.chunk).to(self.model.device)
        with self._turn("a chunk that is replayed"):
            here = self._position
            segment = Segment(after.prompt, 1, after.shot > here.shot)
            if after.chunk != here.chunk + 1 or here.slots.plan(segment.cut).after != after.slots:
                got, wanted = f"what leads to chunk {after.chunk}", f"chunk {here.chunk}"
                raise LongtakeError("this chunk does not follow on the session", got=got, expected=wanted)
            return self._attempt(segment, given, after)

    def _attempt(self, segment: Segment, given_BCFHW: Tensor | None, after: Position | None = None) -> Chunk:
        try:
            if given_BCFHW is not None:
                with self._lock:
                    self._busy, self._scripted = True, False
            return self._generate(segment, given_BCFHW, after)
        except (RuntimeError, MemoryError) as error:  # ONNX Runtime's errors are RuntimeErrors, torch's are
            if not is_out_of_memory(error):
                raise
            raise LongtakeError(
                f"out of memory in chunk {self._position.chunk}; the session is as it was",
                got=(str(error).splitlines() or [type(error).__name__])[0],
                fix="free device memory and go on, or turn guidance off (guidance=1, --guidance 1), which halves the cache",
            ) from error
        finally:
            self._busy = False

    @torch.no_grad()
    def _generate(self, segment: Segment, given_BCFHW: Tensor | None, after: Position | None) -> Chunk:
        """The stages of one chunk, in order; latents that are given are not sampled. after: the position then, if known."""
        here, clock = self._position, StageClock(self.model.device)
        plan = here.slots.plan(segment.cut)
        slots = self.model.slots(plan)
        shot = here.shot + segment.cut
        first = self._first if here.chunk == 0 else None
        kept = self._undecoded.kept.get(here.chunk)
        with clock.stage("conditions"):
            prompt = self.model.family.prompt(segment.prompt, segment.cut, first=not here.chunk)
            camera = here.camera and here.camera.as_in(after.camera if after else None)
            cameras, walk = cameras_of(camera, self.model.preset, here.chunk) if camera else ((), None)
            conditions = self._conditioner.for_chunk(here.chunk, shot, prompt, *cameras)
        with clock.stage("denoise"):
            sample = kept.transpose(1, 2) if kept is not None else given_BCFHW
            if sample is None:
                sample = self._sampler.denoise(here.chunk, conditions, slots, first)
        with clock.stage("clean"):
            if kept is None:  # else its K/V are written already
                self._sampler.commit(here.chunk, sample, conditions, slots)
        self._synchronize()  # a device fault must show before the commit, not after it
        latents = sample.transpose(1, 2).contiguous()
        frames = self._decoding.submit(here.chunk, latents) if self._decoding else None
        times = clock.milliseconds()
        chunk = Chunk(here.chunk, segment.prompt, segment.cut, shot, latents, plan.visible, frames, times)
        if self._takes is not None:
            take = Take(latents.to("cpu", copy=True), replace(segment, chunks=1), shot, plan.after, here.camera)
            self._takes[here.chunk :] = [take]
        self._commit(segment, plan, latents, given_BCFHW is None, after, walk)
        return chunk

    def _begin(self) -> Segment | None:
        with self._lock:
            segment = self._position.upcoming(self.options.endless)
            self._busy, self._scripted = segment is not None, bool(self._position.script)
        return segment

    def _commit(
        self, segment: Segment, plan: Plan, latents: Tensor, generated: bool, after: Position | None, walk: Walk | None
    ) -> None:
        """What was handed over counts from here on; until then, the next turn takes it back."""
        with self._lock:
            after = after or self._position.after(segment, plan.after, generated, self._scripted, walk)
            if self._decoding:
                self._undecoded.add(HandedOver(self._position, after, latents))
            # One assignment: an interrupt leaves either the old position or the new one.
            self._position = after
            self._busy = False

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    def adopt(self, position: Position) -> None:
        """Take over script and live changes of `position`, which is where the session stands.

        Raises:
            LongtakeError: it is another place.
        """
        with self._turn("another script"), self._lock:
            if (position.chunk, position.slots) != (self._position.chunk, self._position.slots):
                raise LongtakeError("this is another position", got=position.chunk, expected=self._position.chunk)
            self._position = position

    def retake(self, from_chunk: int, seed: int | None = None) -> Session:
        """A session that shares this one's chunks before `from_chunk` and makes the rest again, with another seed if given.

        Changes to what follows are live changes of the new session, before its first chunk: `change_prompt`, `cut`. Without
        any, and with the same seed, it makes the same chunks. The shared ones are not sampled again, and not yielded.

        Raises:
            LongtakeError: the session was not made with `retakes=True`, or has no such chunk.
        """
        return retaken(self, self._takes, self._first, from_chunk, seed)

    @property
    def identity(self) -> Identity:
        """What a snapshot of this session fits."""
        inputs = self.inputs
        return identity_of(self.model, self.options, noise=inputs.noise is None, embeddings=inputs.embeddings is None)

    @property
    def state_bytes(self) -> int:
        """Bytes of what a snapshot copies, but for latents."""
        return self._state.bytes + (self._decoding.state_bytes if self._decoding else 0)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, after everything generated is decoded; any thread may read it."""
        with self._turn("a snapshot", closed=True):
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        decoder = self._decoding.state() if self._decoding else []
        tensors = {name: tensor.detach().clone() for name, tensor in self._state.whole().items()}
        tensors |= {f"decoder.{i}": tensor for i, tensor in enumerate(decoder)}
        tensors |= self._undecoded.tensors()
        if self._first is not None and self._position.chunk == 0:
            tensors[FIRST_LATENT] = self._first.clone()
        self._synchronize()
        return Snapshot(self.identity, self._position, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or on) to `snapshot`, also one of another backend of the same model.

        Raises:
            LongtakeError: the snapshot belongs to another preset, model, seed or sampling, or the session is closed or busy.
        """
        check_same(snapshot.identity, self.identity)
        decoder = snapshot.decoder_tensors()
        if self._decoding and snapshot.position.chunk and not decoder:
            what, got = "the snapshot has no decoder state", "one of a session made with decode=False"
            raise LongtakeError(what, got=got, fix="restore it into a session made with decode=False")
        self.inputs.require_noise(self.model.preset, snapshot.position.whole, self.options.endless)
        with self._turn("another state", decoder_error=False):
            load_tensors(snapshot, self._state)
            if self._decoding:
                self._decoding.load_state(decoder)
            first = snapshot.tensors.get(FIRST_LATENT)
            self._first = None if first is None else first.to(self.model.device, torch.float32)
            self._undecoded.load(snapshot.tensors)
            with self._lock:
                self._position = snapshot.position

    def save(self, path: Path | str) -> None:
        """Write a snapshot to `path` (.safetensors), atomically; `Generator.load_session` reads it.

        Raises:
            LongtakeError: a file is there that longtake did not write.
        """
        claim_outputs({"the session": Path(path)})
        snapshot_to_file(self.snapshot(), path)

    def close(self, discard: bool = False) -> None:
        """Finish decoding and end its thread; `discard` drops the chunks that wait to be decoded.

        A chunk that another thread is generating is cancelled. What has been generated can still be saved.
        """
        self._closed = True
        if self._busy:
            self._cancelled.set()
        if self._decoding:
            self._decoding.close(discard)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(discard=kind is not None)
