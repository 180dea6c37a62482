"""The usable clips of a data set (`found.py` says where it looks), and a reader that decodes only what is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longtake.errors import LongtakeError, some
from longtake.training.data.facts import Facts
from longtake.training.data.found import Found, found_in
from longtake.training.models.presets import Preset
from longtake.video_span import frames_between, look_at

LAYOUT = (
    "clip.mp4 beside clip.txt; or a table (metadata.csv, .jsonl, .parquet) of file_name and caption; or "
    'video/<sample>/<n>.mp4 beside caption/<sample>/<n>.json, which holds {"caption": "..."}; or tars of the first'
)
REASONS_SHOWN = 5
MEMORY = 1 << 30  # bytes of decoded clips kept
SHORT = 16 << 20  # bytes; a clip that is more when decoded is never decoded or kept as a whole
PROBES = 8  # clips looked at side by side: it is waiting for the disk, mostly


@dataclass(frozen=True)
class Clip:
    """A shot: its file, its caption, its length in frames at the preset's rate, its size (h, w) and its own rate."""

    path: Path
    caption: str
    frames: int
    size: tuple[int, int] = field(default=(0, 0), compare=False)
    rate: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Index:
    """The usable clips of each sample, in shot order, and why others were skipped (path: reason).

    ignored: why what lies beside them is no clip at all.
    """

    samples: dict[str, list[Clip]]
    skipped: dict[Path, str]
    ignored: dict[Path, str]


def clips_from_folder(root: Path, preset: Preset) -> Index:
    """Look at every clip of a folder, a table or a tar.

    Raises:
        LongtakeError: no clip is usable; says why.
    """
    samples: dict[str, list[Clip]] = {}
    skipped: dict[Path, str] = {}
    finds = found_in(root)
    with ThreadPoolExecutor(PROBES) as pool:
        looked = pool.map(lambda found: _clip_or_error(found, preset), finds.films)
        bar = tqdm(looked, total=len(finds.films), unit="clip", desc=f"look at {root.name}", disable=None, leave=False)
        for found, clip in zip(finds.films, bar):
            if isinstance(clip, LongtakeError):
                skipped[found.path] = one_line(clip)
            else:
                samples.setdefault(found.sample, []).append(clip)
    if not samples:
        raise _nothing(root, skipped, finds.ignored)
    return Index(samples, skipped, finds.ignored)


def summary(clips: Sequence[Clip], preset: Preset, fit: str) -> str:
    """How many clips, how long, and how large before they are brought to the preset's size."""
    seconds = [clip.frames / preset.fps for clip in clips]
    sizes = sorted(
        {f"{clip.size[1]}x{clip.size[0]}" for clip in clips}, key=lambda size: tuple(map(int, size.split("x")))
    )
    shown = ", ".join(sizes[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
    own = f"{preset.width}x{preset.height}"
    brought = "" if sizes == [own] else f" to {own} ({fit})"
    span = (
        f"{min(seconds):.1f}"
        if f"{min(seconds):.1f}" == f"{max(seconds):.1f}"
        else f"{min(seconds):.1f} to {max(seconds):.1f}"
    )
    return f"{len(clips)} clip{'s' * (len(clips) > 1)}, {sum(seconds):.0f} s ({span} s each), {shown}{brought}"


def listed(ignored: dict[Path, str]) -> str:
    """The first of some ignored files, and why."""
    shown = [f"{path.parent.name}/{path.name} ({why})" for path, why in ignored.items()]
    return some(shown, REASONS_SHOWN)


def one_line(error: LongtakeError) -> str:
    """What happened and what was found, without the rest."""
    return error.what if error.got is None else f"{error.what} ({error.got})"


class ClipReader:
    """Decodes parts of clips at the preset's size and rate, and keeps the latest short clips in memory as a whole.

    fit: what becomes of another shape of picture, see `video_span.frames_between`.
    """

    def __init__(self, preset: Preset, fit: str = "crop", memory: int = MEMORY) -> None:
        self.preset, self.fit, self.memory, self._bytes = preset, fit, memory, 0
        self.facts = Facts()
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()

    def read(self, clip: Clip, start: int, frames: int) -> np.ndarray:
        """Frames start..start+frames of a clip, uint8 [frames,H,W,3].

        Raises:
            LongtakeError: the clip is broken, or ends before that.
        """
        self.facts.require(clip.path, start + frames)
        if clip.frames * self.preset.height * self.preset.width * 3 > SHORT:
            got = self._decoded(clip, start, frames)
        else:
            got = self._whole(clip)[start : start + frames]
        if len(got) < frames:
            usable = start + len(got)
            error = LongtakeError(f"{clip.path} ends early", got=f"{usable} frames", expected=clip.frames)
            self.facts.note_short(clip.path, usable, one_line(error))
            raise error
        return got

    def forget(self) -> None:
        """Free the decoded clips."""
        self._kept.clear()
        self._bytes = 0

    def _whole(self, clip: Clip) -> np.ndarray:
        if clip.path in self._kept:
            self._kept.move_to_end(clip.path)
            return self._kept[clip.path]
        frames = self._kept[clip.path] = self._decoded(clip, 0, clip.frames)
        self._bytes += frames.nbytes
        while self._bytes > self.memory and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return frames

    def _decoded(self, clip: Clip, start: int, frames: int) -> np.ndarray:
        size = self.preset.height, self.preset.width
        try:
            return frames_between(clip.path, start, frames, size, self.preset.fps, self.fit)
        except LongtakeError as error:
            self.facts.note_short(clip.path, start, one_line(error))
            raise


def _clip_or_error(found: Found, preset: Preset) -> Clip | LongtakeError:
    try:
        look = look_at(found.path, preset.fps)
        return Clip(found.path, found.caption(), look.frames, (look.height, look.width), look.rate)
    except LongtakeError as error:
        return error


def _nothing(root: Path, skipped: dict[Path, str], ignored: dict[Path, str]) -> LongtakeError:
    if not skipped:
        got = "no film with a caption" + (f"; ignored: {listed(ignored)}" if ignored else "")
        return LongtakeError(f"no clips in {root}", got=got, expected=LAYOUT, fix="check --data")
    shown = [f"    {reason}" for reason in list(skipped.values())[:REASONS_SHOWN]]
    if len(skipped) > REASONS_SHOWN:
        shown.append(f"    and {len(skipped) - REASONS_SHOWN} more")
    got = "\n".join([f"{len(skipped)} clips, none of them usable:", *shown])
    return LongtakeError(f"no usable clip in {root}", got=got, expected=LAYOUT, fix="repair these files")
