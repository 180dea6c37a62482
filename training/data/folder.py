"""A folder of captioned clips as a data set: consecutive shots, cut into the segments that chunks are made of.

The clips of one sample are the shots of one film, in order; where nothing says that clips belong together, each is a
sample of its own (see `found.py` for the layouts). All frame numbers here count at the preset's rate.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.training.data.base import Batch, Take, chunk_frames, chunk_starts, item_generator
from longtake.training.data.clips import (
    MEMORY,
    REASONS_SHOWN,
    Clip,
    ClipReader,
    clips_from_folder,
    listed,
    one_line,
    summary,
)
from longtake.training.data.facts import Facts
from longtake.training.data.order import permutation
from longtake.training.data.shards import key_of
from longtake.training.models.presets import Preset
from longtake.training.models.wan.prompts import with_cut_prefix

log = logging.getLogger(__name__)

HELD_OUT_EVERY = 5  # every fifth sample is for evaluation, unless a number of them is asked for
TRIES = 100
CUT_SHARE = 0.25  # of the VAE's clips have a cut inside


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of one clip. `cut`: a shot begins here, and not at the start of the video."""

    clip: Clip
    start: int
    frames: int
    cut: bool


def plan(
    clips: Sequence[Clip], first: int, start: int, sizes: Sequence[int], most: int, skip: int
) -> list[Segment] | None:
    """Segments of `sizes` frames from frame `start` of clip `first` on; None if the clips end before.

    A clip is used until it cannot supply a full segment, or `most` (> 0) segments in a row: then `skip` frames are
    left out and the same clip goes on as a new shot.
    """
    segments: list[Segment] = []
    row = 0
    for size in sizes:
        if most and row == most:
            start, row = start + skip, 0
        while first < len(clips) and start + size > clips[first].frames:
            first, start, row = first + 1, 0, 0
        if first == len(clips):
            return None
        segments.append(Segment(clips[first], start, size, cut=bool(segments) and row == 0))
        start, row = start + size, row + 1
    return segments


@dataclass(frozen=True)
class Starts:
    """Where a story can begin in a sample: at frames 0..counts[i]-1 of clip i."""

    clips: Sequence[Clip]
    counts: Sequence[int]


class Folder:
    """The clips of a folder. See `data.base.Dataset`.

    fit: of pictures of another shape, see `video_span.frames_between`. held_out: samples for evaluation, one in five if None.
    max_chunks_per_shot: after this many chunks of one clip one second is skipped and a cut is announced; 0 is never.
    max_bad_share: of all clips, how many may turn out unusable before it stops. skipped: why clips were left out.
    """

    def __init__(
        self,
        root: Path,
        preset: Preset,
        split: str = "train",
        max_chunks_per_shot: int = 0,
        max_bad_share: float = 1.0,
        fit: str = "crop",
        held_out: int | None = None,
    ) -> None:
        self.root, self.preset, self.split, self.most = root, preset, split, max_chunks_per_shot
        self.max_bad_share = max_bad_share
        index = clips_from_folder(root, preset)
        self.skipped = index.skipped
        self.found = sum(map(len, index.samples.values()))
        samples = list(index.samples.values())
        self.for_evaluation = self._held_out(len(samples), held_out)
        self.samples = self._of_split(samples)
        self._reader = ClipReader(preset, fit)
        self.line = self._line([clip for clips in samples for clip in clips], index.ignored)
        self._starts: dict[tuple[int, ...], list[Starts]] = {}
        self._named: set[str] = set()
        self._report()
        self._check_share()

    @property
    def facts(self) -> Facts:
        """What decoding has shown about the clips so far."""
        return self._reader.facts

    def lacking(self, chunks: int = 0, frames: int = 0) -> str:
        """What is too short for stories of so many chunks, or clips of so many frames. Raises LongtakeError if all is."""
        sizes = self._sizes(chunks) if chunks else (frames,)
        used = {id(place.clips) for place in self._places(sizes)}
        short = [clips[0] for clips in self.samples if id(clips) not in used]
        if not short:
            return ""
        named = ", ".join(f"{clip.path.name} ({clip.frames / self.preset.fps:.1f} s)" for clip in short[:REASONS_SHOWN])
        more = f" and {len(short) - REASONS_SHOWN} more" if len(short) > REASONS_SHOWN else ""
        needed = f"{sum(sizes) / self.preset.fps:.1f} s"
        return f"{len(short)} of {len(self.samples)} for {self.split} are shorter than {needed} and are never used: {named}{more}"

    @property
    def captions(self) -> list[str]:
        """The caption of each clip."""
        return [clip.caption for clips in self.samples for clip in clips]

    def share_memory(self, processes: int) -> None:
        """Keep only this process's share of decoded clips in memory, and for now none: a copy travels lighter."""
        self._reader.memory = MEMORY // processes
        self._reader.forget()

    def learn(self, facts: Facts) -> None:
        """Take over what another process found out; clips that turned out broken are named.

        Raises:
            LongtakeError: too many are.
        """
        self.facts.merge(facts)
        self._note_broken()

    def take(self, index: int, seed: int, chunks: int, known: Container[str] = ()) -> Take:
        """Story `index` of `seed`: of sample after sample in an order drawn anew when all have had their turn.

        Raises:
            LongtakeError: no sample is long enough, or hardly any clip can be decoded.
        """
        sizes, generator = self._sizes(chunks), item_generator(seed, index)
        turn, place = divmod(index, len(self._places(sizes)))
        first = int(permutation(len(self._places(sizes)), seed, turn)[place])
        before = set(self.facts.short)
        segments, key, frames = self._usable(generator, sizes, first, known)
        found = Facts(
            {str(s.clip.path): self.facts.digests[str(s.clip.path)] for s in segments},
            {path: why for path, why in self.facts.short.items() if path not in before},
        )
        cuts = [segment.cut for segment in segments]
        return Take(key, frames, [with_cut_prefix(s.clip.caption, s.cut) for s in segments], cuts, found)

    def _usable(
        self, generator: torch.Generator, sizes: tuple[int, ...], first: int, known: Container[str]
    ) -> tuple[list[Segment], str, np.ndarray | None]:
        """A plan in sample `first`, or in one drawn after it, that can be decoded (or is known), its key and its frames."""
        error: LongtakeError | None = None
        for attempt in range(TRIES):
            segments = self._random_plan(generator, sizes, None if attempt else first)
            try:
                for segment in segments:
                    self.facts.require(segment.clip.path, segment.start + segment.frames)
                key = self._key(segments)
                return segments, key, None if key in known else self._read(segments)
            except LongtakeError as broken:
                error = broken
        raise self._hopeless(error)

    def _key(self, segments: list[Segment]) -> str:
        shown = [(self.facts.digest(s.clip.path), s.start, s.frames) for s in segments]
        fit = self._reader.fit
        return key_of(f"folder by time, {fit}", self.preset.height, self.preset.width, self.preset.fps, shown)

    def _read(self, segments: list[Segment]) -> np.ndarray:
        return np.concatenate([self._reader.read(s.clip, s.start, s.frames) for s in segments])

    def _sizes(self, chunks: int) -> tuple[int, ...]:
        """Frames of each segment of a story."""
        ends = [*chunk_starts(self.preset, chunks)[1:], chunk_frames(self.preset, chunks)]
        return tuple(end - begin for begin, end in zip([0, *ends], ends))

    def sample(self, generator: torch.Generator, chunks: int, batch: int, device: torch.device) -> Batch:
        """Draw `batch` videos of `chunks` chunks; for evaluation they begin where a clip begins.

        Raises:
            LongtakeError: no sample is long enough, or hardly any clip can be decoded.
        """
        sizes = self._sizes(chunks)
        drawn = [self._draw(generator, sizes) for _ in range(batch)]
        prompts = [[with_cut_prefix(segment.clip.caption, segment.cut) for segment in story] for story, _ in drawn]
        cuts = [[segment.cut for segment in story] for story, _ in drawn]
        return Batch(_video([frames for _, frames in drawn], device), prompts, cuts)

    def clips(self, generator: torch.Generator, frames: int, batch: int, device: torch.device) -> Tensor:
        """Draw `batch` clips of `frames` frames, fp32 [B,3,frames,H,W] in [-1,1]; one in four has a cut.

        A cut falls between two latents, as it does in a story.
        """
        drawn, stride = [], self.preset.vae.stride[0]
        for _ in range(batch):
            sizes = [frames]
            if frames > stride and torch.rand((), generator=generator) < CUT_SHARE:
                begin = 1 + stride * int(torch.randint((frames - 1) // stride, (), generator=generator))
                sizes = [begin, frames - begin]
            drawn.append(np.concatenate([self._draw(generator, (size,))[1] for size in sizes]))
        return _video(drawn, device)

    def _draw(self, generator: torch.Generator, sizes: tuple[int, ...]) -> tuple[list[Segment], np.ndarray]:
        """A random story of segments of `sizes` frames, and its frames, uint8 [T,H,W,3]."""
        error: LongtakeError | None = None
        for _ in range(TRIES):
            segments = self._random_plan(generator, sizes)
            try:
                return segments, self._read(segments)
            except LongtakeError as broken:  # drawn again, so that the draws do not depend on what was read before
                error = broken
                self._note_broken()
        raise self._hopeless(error)

    def _hopeless(self, error: LongtakeError | None) -> LongtakeError:
        what = f"hardly any clip in {self.root} can be decoded"
        return LongtakeError(what, got=error and one_line(error), expected="playable mp4 files", fix="make them again")

    def _note_broken(self) -> None:
        """Name, once each, the clips that turned out broken, and stop if they are too many."""
        for path in self.facts.short.keys() - self._named:
            self._named.add(path)
            log.warning("skipped a clip that turned out broken: %s", self.facts.short[path][2])
        self._check_share()

    def _check_share(self) -> None:
        """Raise LongtakeError if more than `max_bad_share` of the clips cannot be used."""
        bad, total = len(self.skipped) + len(self.facts.short), self.found + len(self.skipped)
        if bad > self.max_bad_share * total:
            reasons = [*self.skipped.values(), *(why for _, _, why in self.facts.short.values())]
            raise LongtakeError(
                f"too many clips in {self.root} cannot be used",
                got=f"{bad} of {total}, such as: {'; '.join(reasons[:3])}",
                expected=f"at most {100 * self.max_bad_share:g} % (--max-bad-share)",
                fix="repair or remove these clips, or allow for more of them",
            )

    def _places(self, sizes: tuple[int, ...]) -> list[Starts]:
        if sizes not in self._starts:
            self._starts[sizes] = self._find_starts(sizes)
        return self._starts[sizes]

    def _random_plan(
        self, generator: torch.Generator, sizes: tuple[int, ...], sample: int | None = None
    ) -> list[Segment]:
        """Segments from a random place of a sample, a random one unless it is given."""
        places = self._places(sizes)
        place = places[int(torch.randint(len(places), (), generator=generator)) if sample is None else sample]
        start = int(torch.randint(sum(place.counts), (), generator=generator))
        first = 0
        while start >= place.counts[first]:
            start, first = start - place.counts[first], first + 1
        return self._plan(place.clips, first, start, sizes) or []

    def _plan(self, clips: Sequence[Clip], first: int, start: int, sizes: Sequence[int]) -> list[Segment] | None:
        return plan(clips, first, start, sizes, self.most, skip=self.preset.fps)

    def _find_starts(self, sizes: tuple[int, ...]) -> list[Starts]:
        """Where stories of these sizes can begin, for each sample that has room for one."""
        places = [Starts(clips, [self._count(clips, i, sizes) for i in range(len(clips))]) for clips in self.samples]
        places = [place for place in places if sum(place.counts)]
        if not places:
            longest = max(sum(clip.frames for clip in clips) for clips in self.samples)
            raise LongtakeError(
                f"no sample in {self.root} ({self.split}) is long enough",
                got=f"the longest has {longest} frames at {self.preset.fps} fps, in clips of their own lengths",
                expected=f"room for segments of {', '.join(map(str, sizes))} frames, none across two clips",
                fix="use longer clips, or shorter stories (--chunks)",
            )
        return places

    def _count(self, clips: Sequence[Clip], first: int, sizes: Sequence[int]) -> int:
        """How many frames of clip `first` a story can begin at: if it fits at one, it does at all before it."""
        room = max(0, clips[first].frames - sizes[0] + 1)
        count = bisect.bisect_left(range(room), True, key=lambda start: self._plan(clips, first, start, sizes) is None)
        return min(count, 1) if self.split == "eval" else count

    def _held_out(self, count: int, asked: int | None) -> int:
        """How many of so many samples are for evaluation. Raises LongtakeError if none is left to train on."""
        if asked is not None and asked >= count:
            what, got = "nothing is left to train on", f"{count} clips or films, --held-out {asked}"
            expected, fix = f"at most {count - 1}", "--held-out 0"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
        return count // HELD_OUT_EVERY if asked is None else asked

    def _of_split(self, samples: list[list[Clip]]) -> list[list[Clip]]:
        """The samples of this split: the held-out ones are spread evenly; without any, evaluation is on those of training."""
        count = self.for_evaluation
        if not count:
            if self.split == "eval":
                log.warning("%s: nothing is held out for evaluation, which is on training clips", self.root)
            return samples
        held = {(number + 1) * len(samples) // count - 1 for number in range(count)}
        return [clips for i, clips in enumerate(samples) if (i in held) == (self.split == "eval")]

    def _line(self, clips: list[Clip], ignored: dict[Path, str]) -> str:
        """What there is, in one line."""
        left = {**{path: why.removeprefix(f"{path} ") for path, why in self.skipped.items()}, **ignored}
        parts = [f"{summary(clips, self.preset, self._reader.fit)}", f"{self.for_evaluation} held out"]
        parts += [f"{len(left)} ignored: {listed(left)}"] if left else []
        line = f"{self.root}: " + ", ".join(parts)
        if len(clips) > 1 and len({clip.caption for clip in clips}) == 1:
            line += (
                f"\nall {len(clips)} captions are the same, so prompts will make no difference: {clips[0].caption!r}"
            )
        if len(clips) == 1:
            line += "\na model that is trained on one clip makes that clip of every prompt"
        return line

    def _report(self) -> None:
        """Log what is there, once (for the training split)."""
        if self.split == "train":
            log.info("%s", self.line)
            for reason in self.skipped.values():
                log.info("skipped a clip: %s", reason)


def _video(stories: list[np.ndarray], device: torch.device) -> Tensor:
    """uint8 [T,H,W,3] each to fp32 [B,3,T,H,W] in [-1,1]."""
    frames_BTHWC = torch.from_numpy(np.stack(stories)).to(device)
    return frames_BTHWC.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1).contiguous()
