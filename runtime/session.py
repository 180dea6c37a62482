"""A session: one video in the making, chunk by chunk. It generates, then commits.

Legend: B = 1, F latent frames of a chunk, C latent channels, H, W sizes, T video frames.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.runtime.backends.base import Backend, Cache, decode_device_of
from longtake.runtime.clock import StageClock
from longtake.runtime.conditions import Conditioner, Conditions, Tokenize
from longtake.runtime.decode import DecodeQueue, Frames
from longtake.runtime.snapshot import FIRST_LATENT, Identity, Snapshot, check_same, load_tensors, snapshot_to_file
from longtake.runtime.state import Edit, KVState, Position, with_edit
from longtake.runtime.story import Segment, checked_prompt
from longtake.training.models.sampler import UniPC, unipc_steps
from longtake.training.models.wan.prompts import CUT_PREFIX, with_cut_prefix
from longtake.training.models.wan.slots import Plan

MOST_GUIDANCE = 100


class CancelledError(Exception):
    """`Session.cancel` was called while a chunk was being generated; the session is as it was before the chunk."""


@dataclass(frozen=True)
class SessionOptions:
    """How a session samples. guidance 1 turns classifier-free guidance off. endless: go on when the script ends."""

    seed: int = 0
    steps: int = 16
    guidance: float = 1.0
    negative_prompt: str = ""
    shift: float = 5.0
    decode: bool = True
    endless: bool = False

    def __post_init__(self) -> None:
        """Raise LongtakeError for what cannot be sampled."""
        if not 0 <= self.seed < 2**63:
            raise LongtakeError("bad seed", got=self.seed, expected="0 to 2^63 - 1", fix="pass --seed 7")
        if not (math.isfinite(self.guidance) and abs(self.guidance) <= MOST_GUIDANCE):
            raise LongtakeError("bad guidance scale", got=self.guidance, expected=f"at most {MOST_GUIDANCE}, 1 for none",
                                fix="pass --guidance 3")  # fmt: skip
        if self.negative_prompt:
            checked_prompt(self.negative_prompt, "the negative prompt")


@dataclass
class Chunk:
    """One generated chunk. latents: fp32 [1, F, C, H, W], normalized. cut: it begins a shot. visible: blocks it saw."""

    index: int
    prompt: str
    cut: bool
    shot: int
    latents: Tensor
    visible: tuple[int, ...]
    decoding: Frames | None
    stage_ms: dict[str, float]

    @property
    def frames(self) -> np.ndarray:
        """Video frames uint8 [T, H, W, 3]; waits for the decoder, raises its error."""
        if self.decoding is None:
            raise LongtakeError("this session does not decode", fix="make the session with decode=True")
        return self.decoding.result()

    @property
    def finished_at(self) -> float:
        """When the frames were there, on time.perf_counter's clock; waits for them."""
        return self.decoding.finished_at if self.decoding and len(self.frames) else 0.0

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds by stage; "decode" (in parallel with the next chunk) is there once the frames are."""
        decoded = self.decoding is not None and self.decoding.ready
        return {**self.stage_ms, **({"decode": self.decoding.milliseconds} if decoded and self.decoding else {})}


def pin(sample_BCFHW: Tensor, first_BCHW: Tensor | None) -> None:
    """Put the picture that a video starts from over latent frame 0, in place."""
    if first_BCHW is not None:
        sample_BCFHW[:, :, 0].copy_(first_BCHW)


def prompt_text(segment: Segment, first: bool = False) -> str:
    """The text that is encoded for a segment's first chunk: a cut is announced as in training, once.

    The `first` chunk of a video is no cut; as in the reference, its prompt is what was written, prefix and all.
    """
    return segment.prompt if first else with_cut_prefix(segment.prompt.removeprefix(CUT_PREFIX), segment.cut)


class Session:
    """An iterator over chunks. Live changes: `change_prompt`, `cut`, `extend`, `cancel` (from any thread)."""

    def __init__(
        self,
        backend: Backend,
        tokenize: Tokenize,
        script: tuple[Segment, ...],
        options: SessionOptions,
        first_latent: Tensor | None = None,
    ) -> None:
        """`first_latent`: normalized latent of the picture that the video starts from, fp32 [1, C, H, W], or None."""
        self.backend, self.options = backend, options
        self._guided = options.guidance != 1.0
        schedule = unipc_steps(options.steps, options.shift)
        negative = options.negative_prompt if self._guided else None
        self._conditioner = Conditioner(backend, tokenize, options.seed, negative, [s.timestep for s in schedule])
        self._state = KVState(backend, negative=self._guided)
        self._position = Position(script)
        self._first = None if first_latent is None else first_latent.to(backend.device, torch.float32)
        self._decoding = self._new_queue() if options.decode else None
        if self._decoding:
            # A session that is dropped without `close` must not leave its thread (and the decoder's memory) behind.
            weakref.finalize(self, self._decoding.close)
        self._lock = threading.Lock()
        self._busy = False
        self._cancelled = threading.Event()
        self._nothing = torch.tensor([-1], dtype=torch.int32)  # stays on the host, see Backend.dit

    def _new_queue(self) -> DecodeQueue:
        backend = self.backend
        return DecodeQueue(backend.new_decoder(), backend.preset, backend.device, decode_device_of(backend))

    # ---- the chunk loop ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Generate and commit the next chunk. Whatever is raised, the session is as it was."""
        if self._decoding:
            self._decoding.raise_error()
        segment = self._begin()
        if segment is None:
            raise StopIteration
        return self._attempt(segment, None)

    def feed(self, latents_BFCHW: Tensor, prompt: str, cut: bool = False) -> Chunk:
        """Take given latents, fp32 [1, F, C, H, W], as the next chunk: their K/V and the decoder's state, no sampling.

        That is how a video goes on from a clip. The script stays as it is, and live changes wait for the next chunk
        that is generated. Whatever is raised, the session is as it was.

        Raises:
            LongtakeError: the latents are not one chunk of this preset, or the prompt is none.
        """
        preset = self.backend.preset
        wanted = (1, preset.chunk_latents, preset.vae.z_channels, *preset.latent_hw)
        if tuple(latents_BFCHW.shape) != wanted:
            raise LongtakeError("these latents are not a chunk", got=tuple(latents_BFCHW.shape), expected=wanted,
                                fix=f"cut the video into chunks of {preset.chunk_latents} latents")  # fmt: skip
        if self._decoding:
            self._decoding.raise_error()
        segment = Segment(checked_prompt(prompt, "the clip's prompt"), 1, cut and self._position.chunk > 0)
        with self._lock:
            self._busy = True
        given = latents_BFCHW.to(self.backend.device, torch.float32).transpose(1, 2).contiguous()
        return self._attempt(segment, given)

    def _attempt(self, segment: Segment, given_BCFHW: Tensor | None) -> Chunk:
        try:
            return self._generate(segment, given_BCFHW)
        except torch.OutOfMemoryError as error:
            raise LongtakeError(
                f"out of memory in chunk {self._position.chunk}; the session is as it was",
                got=str(error).splitlines()[0],
                fix="free device memory and go on, or turn guidance off (--guidance 1), which halves the cache",
            ) from error
        finally:
            self._busy = False

    @torch.no_grad()
    def _generate(self, segment: Segment, given_BCFHW: Tensor | None) -> Chunk:
        """The stages of one chunk, in order; latents that are given are not sampled."""
        here, clock = self._position, StageClock(self.backend.device)
        plan = self._state.stage(here.slots, segment.cut)
        table = torch.tensor(plan.table, dtype=torch.int32).to(self.backend.device)
        shot = here.shot + segment.cut
        with clock.stage("conditions"):
            conditions = self._conditioner.for_chunk(here.chunk, shot, prompt_text(segment, not here.chunk))
        with clock.stage("denoise"):
            sample = self._denoise(conditions, table) if given_BCFHW is None else given_BCFHW
        with clock.stage("clean"):
            self._write_kv(sample, conditions, table, plan)
        self._synchronize()  # a device fault must show before the commit, not after it
        latents = sample.transpose(1, 2).contiguous()
        frames = self._decoding.submit(here.chunk, latents) if self._decoding else None
        self._commit(segment, plan, scripted=given_BCFHW is None)
        return Chunk(here.chunk, segment.prompt, segment.cut, shot, latents, plan.visible, frames, clock.milliseconds())

    def _denoise(self, conditions: Conditions, table: Tensor) -> Tensor:
        """Noise to latents, fp32 [1, C, F, H, W]. A picture to start from stays latent 0 of chunk 0, at timestep 0."""
        first = self._first if self._position.chunk == 0 else None
        sample, solver = conditions.noise_BCFHW, UniPC(self.options.steps, self.options.shift)
        pin(sample, first)
        for step in solver.schedule:
            sinusoid = self._conditioner.sinusoid(step.timestep, clean_frames=0 if first is None else 1)
            velocity = self._velocity(sample, sinusoid, conditions, table)
            sample = solver.step(velocity, sample)
            pin(sample, first)
        return sample

    def _velocity(self, sample: Tensor, sinusoid: Tensor, conditions: Conditions, table: Tensor) -> Tensor:
        """One denoise step's velocity: it reads the cache and writes nothing. Guided: v = u + s (c - u)."""
        velocity = self._pass(sample, sinusoid, conditions, conditions.context, self._state.positive, table)
        if conditions.negative is None or self._state.negative is None:
            return velocity
        wanted = velocity.clone()  # the next pass may overwrite the backend's output
        base = self._pass(sample, sinusoid, conditions, conditions.negative, self._state.negative, table)
        return torch.lerp(base, wanted, self.options.guidance)

    def _write_kv(self, sample: Tensor, conditions: Conditions, table: Tensor, plan: Plan) -> None:
        """The clean pass, at timestep 0 on the final latents: its purpose is this block's K/V."""
        slot = torch.tensor([plan.write_slot], dtype=torch.int32)
        sinusoid = self._conditioner.sinusoid(0)
        self._pass(sample, sinusoid, conditions, conditions.context, self._state.positive, table, slot)
        if conditions.negative is not None and self._state.negative is not None:
            self._pass(sample, sinusoid, conditions, conditions.negative, self._state.negative, table, slot)

    def _pass(
        self,
        sample: Tensor,
        sinusoid: Tensor,
        conditions: Conditions,
        context: list[Tensor],
        cache: Cache,
        table: Tensor,
        write_slot: Tensor | None = None,
    ) -> Tensor:
        self._raise_if_cancelled()
        cos, sin = conditions.rope_cos, conditions.rope_sin
        slot = self._nothing if write_slot is None else write_slot
        return self.backend.dit(sample, sinusoid, cos, sin, context, cache, table, slot)

    def _begin(self) -> Segment | None:
        with self._lock:
            segment = self._position.upcoming(self.options.endless)
            self._busy = segment is not None
        return segment

    def _commit(self, segment: Segment, plan: Plan, scripted: bool) -> None:
        with self._lock:
            # One assignment: an interrupt leaves either the old position or the new one.
            self._position = self._position.after(segment, plan.after, self._position.edits, scripted)
            self._busy = False

    def _synchronize(self) -> None:
        if self.backend.device.type == "cuda":
            torch.cuda.current_stream(self.backend.device).synchronize()

    # ---- live changes --------------------------------------------------------------------------------------------

    @property
    def next_index(self) -> int:
        """Index of the next chunk to be committed."""
        return self._position.chunk

    @property
    def remaining(self) -> int:
        """Chunks the script still holds."""
        return sum(segment.chunks for segment in self._position.script)

    def change_prompt(self, prompt: str) -> int:
        """Switch the prompt at the next chunk boundary, without a cut. Returns the index of the first chunk it shapes.

        It replaces what is left of the script's current segment; later segments stay.
        """
        return self._edit(checked_prompt(prompt, "the new prompt"), cut=False)

    def cut(self, prompt: str | None = None) -> int:
        """Cut to a new shot at the next chunk boundary, with `prompt` if given. Returns that chunk's index."""
        return self._edit(None if prompt is None else checked_prompt(prompt, "the new shot's prompt"), cut=True)

    def extend(self, chunks: int, prompt: str | None = None, cut: bool = False) -> None:
        """Append `chunks` chunks to the script, of `prompt` or of its last prompt, with or without a cut before them."""
        if chunks < 1:
            raise LongtakeError("bad number of chunks", got=chunks, expected="1 or more")
        with self._lock:
            here = self._position
            last = here.script[-1].prompt if here.script else here.prompt
            text = checked_prompt(prompt or last, "the prompt to go on with")
            self._position = replace(here, script=(*here.script, Segment(text, chunks, cut)))

    def cancel(self) -> None:
        """Stop before the next pass: iteration raises CancelledError once, and nothing of that chunk is committed."""
        self._cancelled.set()

    def _edit(self, prompt: str | None, cut: bool) -> int:
        with self._lock:
            at = self._position.chunk + self._busy
            self._position = replace(self._position, edits=with_edit(self._position.edits, Edit(at, prompt, cut)))
        return at

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            self._cancelled.clear()
            raise CancelledError(f"cancelled before chunk {self._position.chunk} was whole")

    # ---- snapshots -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Identity:
        """What a snapshot of this session fits."""
        recipe, options = self.backend.recipe, self.options
        return Identity(
            preset=self.backend.preset.name, model=recipe.onnx_name, cache=recipe.cache, seed=options.seed,
            steps=options.steps, guidance=options.guidance, negative_prompt=options.negative_prompt,
            shift=options.shift,
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, after everything generated is decoded."""
        decoder = self._decoding.state() if self._decoding else []
        tensors = {name: tensor.detach().clone() for name, tensor in self._state.tensors().items()}
        tensors |= {f"decoder.{i}": tensor for i, tensor in enumerate(decoder)}
        if self._first is not None and self._position.chunk == 0:
            tensors[FIRST_LATENT] = self._first.clone()
        return Snapshot(self.identity, self._position, tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or on) to `snapshot`, also one of another backend of the same model.

        Raises:
            LongtakeError: the snapshot belongs to another preset, model, seed or sampling.
        """
        check_same(snapshot.identity, self.identity)
        decoder = snapshot.decoder_tensors()
        if self._decoding and snapshot.position.chunk and not decoder:
            raise LongtakeError("the snapshot has no decoder state", got="one of a session made with decode=False",
                                fix="restore it into a session made with decode=False")  # fmt: skip
        load_tensors(snapshot, self._state.tensors())
        if self._decoding:
            self._decoding.load_state(decoder)
        first = snapshot.tensors.get(FIRST_LATENT)
        self._first = None if first is None else first.to(self.backend.device, torch.float32)
        self._position = snapshot.position

    def save(self, path: Path | str) -> None:
        """Write a snapshot to `path` (.safetensors), atomically; `Generator.load_session` reads it."""
        snapshot_to_file(self.snapshot(), path)

    def close(self, discard: bool = False) -> None:
        """Finish decoding and end its thread; `discard` drops the chunks that wait to be decoded."""
        if self._decoding:
            self._decoding.close(discard)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(discard=kind is not None)
