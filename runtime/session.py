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

import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.out_of_memory import is_out_of_memory
from longtake.runtime.camera import CameraPosition, cameras_of, require_cuts, steered
from longtake.runtime.chunk import Chunk
from longtake.runtime.clock import StageClock
from longtake.runtime.conditions import Conditioner
from longtake.runtime.decode import DecodeQueue
from longtake.runtime.sampling import ChunkSampler, OnStep
from longtake.runtime.session_inputs import OWN, SessionInputs, Tokenize
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.snapshot import FIRST_LATENT, Identity, Snapshot, check_same, load_tensors, snapshot_to_file
from longtake.runtime.state import Edit, Position, SessionState, with_edit
from longtake.runtime.story import Segment, checked_chunks, checked_prompt
from longtake.runtime.undecoded import HandedOver, Undecoded
from longtake.runtime.video_model import NetworkDecoder, VideoModel
from longtake.training.models.family import Plan
from longtake.training.models.sana_wm.actions import Walk


class Session:
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
        self.model, self.options, self.inputs = model, options, inputs
        negative = options.negative_prompt if options.guided else None
        embedding, noise = inputs.embedding_of(model, tokenize), inputs.noise_of(model.preset, options.seed)
        self._conditioner = Conditioner(model, embedding, noise, negative, options.schedule.timesteps)
        self._state = SessionState(model, negative=options.guided)
        self._cancelled = threading.Event()
        self._sampler = ChunkSampler(model, self._conditioner, self._state, options, self._cancelled, on_step)
        self._position = Position(script, model.family.start(model.preset), camera=camera)
        self._first = None if first_latent is None else first_latent.to(model.device, torch.float32)
        self._decoding = self._new_queue() if options.decode else None
        if self._decoding:
            # A session that is dropped without `close` must not leave its thread (and the decoder's memory) behind.
            weakref.finalize(self, self._decoding.close)
        self._undecoded = Undecoded()
        self._lock = threading.Lock()  # of the position, held for a moment
        self._using = threading.Lock()  # held while a chunk is made: its state has one user
        self._busy = self._scripted = self._closed = False

    def __repr__(self) -> str:
        here, state = self._position, "closed" if self._closed else "open"
        return f"<Session {state}: chunk {here.chunk} is next, {self.remaining} left, prompt {here.prompt!r:.60}>"

    def _new_queue(self) -> DecodeQueue:
        model = self.model
        decoder = model.decoder()
        past = decoder.past_latents if isinstance(decoder, NetworkDecoder) else None
        return DecodeQueue(decoder, model.preset, model.device, model.backend.decode_device, past)

    # ---- the chunk loop ------------------------------------------------------------------------------------------

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
            raise LongtakeError(f"the session is busy with chunk {self.next_index}", got=f"a call for {wanted}",
                                expected="one caller at a time",
                                fix="wait for the chunk, or give each thread a session of its own")  # fmt: skip
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
            raise LongtakeError(f"the {'session' if self._closed else 'generator'} is closed", got=f"a call for {wanted}",
                                expected="an open one", fix="load the saved session, or start a new one")  # fmt: skip

    def feed(self, latents_BFCHW: Tensor, prompt: str, cut: bool = False) -> Chunk:
        """Take given latents, fp32 [1, F, C, H, W], as the next chunk: their K/V and the decoder's state, no sampling.

        That is how a video goes on from a clip. The script stays as it is, and live changes wait for the next chunk
        that is generated. Whatever is raised, the session is as it was.

        Raises:
            LongtakeError: the latents are not one chunk of this preset, or the prompt is none.
        """
        preset = self.model.preset
        frames = preset.frames_of(self._position.chunk)
        wanted = (1, frames, preset.vae.z_channels, *preset.latent_hw)
        if tuple(latents_BFCHW.shape) != wanted:
            raise LongtakeError("these latents are not a chunk", got=tuple(latents_BFCHW.shape), expected=wanted,
                                fix=f"cut the video into chunks of {frames} latents")  # fmt: skip
        with self._turn("a chunk that is given"):
            if self._position.chunk in self._undecoded.kept:
                raise LongtakeError(
                    f"chunk {self._position.chunk} has yet to be decoded",
                    got="another one for its place",
                    expected="a call for the next chunk",
                    fix="call next(session) first",
                )
            segment = Segment(checked_prompt(prompt, "the clip's prompt"), 1, cut and self._position.chunk > 0)
            with self._lock:
                self._busy, self._scripted = True, False
            given = latents_BFCHW.to(self.model.device, torch.float32).transpose(1, 2).contiguous()
            return self._attempt(segment, given)

    def _attempt(self, segment: Segment, given_BCFHW: Tensor | None) -> Chunk:
        try:
            return self._generate(segment, given_BCFHW)
        except (RuntimeError, MemoryError) as error:  # ONNX Runtime's errors are RuntimeErrors, torch's are
            if not is_out_of_memory(error):
                raise
            raise LongtakeError(
                f"out of memory in chunk {self._position.chunk}; the session is as it was",
                got=(str(error).splitlines() or [type(error).__name__])[0],
                fix="free device memory and go on, or turn guidance off (--guidance 1), which halves the cache",
            ) from error
        finally:
            self._busy = False

    @torch.no_grad()
    def _generate(self, segment: Segment, given_BCFHW: Tensor | None) -> Chunk:
        """The stages of one chunk, in order; latents that are given are not sampled."""
        here, clock = self._position, StageClock(self.model.device)
        plan = here.slots.plan(segment.cut)
        slots = self.model.slots(plan)
        shot = here.shot + segment.cut
        first = self._first if here.chunk == 0 else None
        kept = self._undecoded.kept.get(here.chunk)
        with clock.stage("conditions"):
            prompt = self.model.family.prompt(segment.prompt, segment.cut, first=not here.chunk)
            cameras, walk = cameras_of(here.camera, self.model.preset, here.chunk)
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
        self._commit(segment, plan, latents, generated=given_BCFHW is None, walk=walk)
        return chunk

    def _begin(self) -> Segment | None:
        with self._lock:
            segment = self._position.upcoming(self.options.endless)
            self._busy, self._scripted = segment is not None, bool(self._position.script)
        return segment

    def _commit(self, segment: Segment, plan: Plan, latents: Tensor, generated: bool, walk: Walk | None) -> None:
        """What was handed over counts from here on; until then, the next turn takes it back."""
        with self._lock:
            after = self._position.after(segment, plan.after, generated, self._scripted, walk)
            if self._decoding:
                self._undecoded.add(HandedOver(self._position, after, latents))
            # One assignment: an interrupt leaves either the old position or the new one.
            self._position = after
            self._busy = False

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    # ---- live changes --------------------------------------------------------------------------------------------

    @property
    def next_index(self) -> int:
        """Index of the next chunk to be committed."""
        self._look_back()
        return self._position.chunk

    @property
    def remaining(self) -> int:
        """Chunks the script still holds."""
        self._look_back()
        return self._position.left

    def change_prompt(self, prompt: str) -> int:
        """Switch the prompt at the next chunk boundary, without a cut. Returns the index of the first chunk it shapes.

        It replaces what is left of the script's current segment; later segments stay.

        Raises:
            LongtakeError: the prompt is none, the session is closed, or its script ends before that chunk.
        """
        return self._edit(checked_prompt(prompt, "the new prompt"), cut=False)

    def cut(self, prompt: str | None = None) -> int:
        """Cut to a new shot at the next chunk boundary, with `prompt` if given. Returns that chunk's index.

        Raises what `change_prompt` does.
        """
        require_cuts(self.model.family.can, "a cut")
        return self._edit(None if prompt is None else checked_prompt(prompt, "the new shot's prompt"), cut=True)

    def steer(
        self, action: str | None = None, pose: object = None, velocity: object = None, from_chunk: int | None = None
    ) -> int:
        """Steer the camera, in one of the ways of `camera.steered`. Returns the index of the first chunk it shapes: the next,
        or `from_chunk`. Raises LongtakeError if the model has no camera, or what is asked for cannot be."""
        self._look_back()
        with self._lock:
            self._require_open("a live change")
            at = max(self._position.chunk + self._busy, self._undecoded.first_free)
            camera, first = steered(self._position.camera, at, from_chunk, action, pose, velocity)
            self._position = replace(self._position, camera=camera)
        return first

    def extend(self, chunks: int, prompt: str | None = None, cut: bool = False) -> None:
        """Append `chunks` chunks to the script, of `prompt` or of its last prompt, with or without a cut before them."""
        chunks = checked_chunks(chunks)
        self._look_back()
        with self._lock:
            self._require_open("more chunks")
            here = self._position
            last = here.script[-1].prompt if here.script else here.prompt
            text = checked_prompt(prompt or last, "the prompt to go on with")
            self._position = replace(here, script=(*here.script, Segment(text, chunks, cut)))

    def cancel(self) -> None:
        """Stop before the next pass: iteration raises CancelledError once, and nothing of that chunk is committed."""
        self._cancelled.set()

    def _edit(self, prompt: str | None, cut: bool) -> int:
        self._look_back()
        with self._lock:
            self._require_open("a live change")
            at = max(self._position.chunk + self._busy, self._undecoded.first_free)
            before = at - self._position.chunk - (self._busy and not self._scripted)
            if self._position.left <= before and not self.options.endless:
                raise LongtakeError(f"the script ends before chunk {at}", got="a live change that nothing would show",
                                    expected="a chunk still to come",
                                    fix="call extend first, or start the session with endless=True")  # fmt: skip
            self._position = replace(self._position, edits=with_edit(self._position.edits, Edit(at, prompt, cut)))
        return at

    # ---- snapshots -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """What a snapshot of this session fits."""
        recipe, options = self.model.recipe, self.options
        return Identity(
            preset=self.model.preset.name, model=recipe.onnx_name, cache=recipe.cache, seed=options.seed,
            steps=options.steps, guidance=options.guidance, negative_prompt=options.negative_prompt,
            shift=options.shift, family=self.model.family.name, weights=dict(self.model.backend.weights),
            solver=options.solver, timesteps=options.timesteps,
            noise="seed" if self.inputs.noise is None else "given",
            embeddings="prompts" if self.inputs.embeddings is None else "given",
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, after everything generated is decoded."""
        with self._turn("a snapshot", closed=True):
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        decoder = self._decoding.state() if self._decoding else []
        tensors = {name: tensor.detach().clone() for name, tensor in self._state.tensors().items()}
        tensors |= {f"decoder.{i}": tensor for i, tensor in enumerate(decoder)}
        tensors |= self._undecoded.tensors()
        if self._first is not None and self._position.chunk == 0:
            tensors[FIRST_LATENT] = self._first.clone()
        return Snapshot(self.identity, self._position, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or on) to `snapshot`, also one of another backend of the same model.

        Raises:
            LongtakeError: the snapshot belongs to another preset, model, seed or sampling, or the session is closed or busy.
        """
        check_same(snapshot.identity, self.identity)
        decoder = snapshot.decoder_tensors()
        if self._decoding and snapshot.position.chunk and not decoder:
            raise LongtakeError("the snapshot has no decoder state", got="one of a session made with decode=False",
                                fix="restore it into a session made with decode=False")  # fmt: skip
        with self._turn("another state", decoder_error=False):
            load_tensors(snapshot, self._state.tensors())
            if self._decoding:
                self._decoding.load_state(decoder)
            first = snapshot.tensors.get(FIRST_LATENT)
            self._first = None if first is None else first.to(self.model.device, torch.float32)
            self._undecoded.load(snapshot.tensors)
            with self._lock:
                self._position = snapshot.position

    def save(self, path: Path | str) -> None:
        """Write a snapshot to `path` (.safetensors), atomically; `Generator.load_session` reads it."""
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
