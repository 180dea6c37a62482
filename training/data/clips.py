"""Find the usable clips of a folder laid out as video/<sample>/<n>.mp4 and caption/<sample>/<n>.json.

mp4 stands for any of `video.SUFFIXES`, and suffixes may be in any case.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longtake.errors import LongtakeError, some
from longtake.files import read_json
from longtake.training.data.facts import Facts
from longtake.training.models.presets import Preset
from longtake.video import SUFFIXES, count_frames, frames_from_video

LAYOUT = 'video/<sample>/<n>.mp4 beside caption/<sample>/<n>.json, which holds {"caption": "..."}'
REASONS_SHOWN = 5
MEMORY = 1 << 30  # bytes of decoded clips kept
PROBES = 8  # clips looked at side by side: it is waiting for the disk, mostly


@dataclass(frozen=True)
class Clip:
    """A shot: its file, its caption, and its length in frames at the preset's rate."""

    path: Path
    caption: str
    frames: int


@dataclass(frozen=True)
class Index:
    """The usable clips of each sample, in shot order, and why others were skipped (path: reason).

    ignored: why what lies beside them is no clip at all.
    """

    samples: dict[str, list[Clip]]
    skipped: dict[Path, str]
    ignored: dict[Path, str]


def clips_from_folder(root: Path, preset: Preset) -> Index:
    """Look at every clip of a folder.

    Raises:
        LongtakeError: no clip is usable; says why.
    """
    samples: dict[str, list[Clip]] = {}
    skipped: dict[Path, str] = {}
    paths, captions, ignored = _found(root)
    with ThreadPoolExecutor(PROBES) as pool:
        looked = pool.map(lambda path: _clip_or_error(path, captions[_shot(path)], preset), paths)
        bar = tqdm(looked, total=len(paths), unit="clip", desc=f"look at {root.name}", disable=None, leave=False)
        for path, clip in zip(paths, bar):
            if isinstance(clip, LongtakeError):
                skipped[path] = one_line(clip)
            else:
                samples.setdefault(path.parent.name, []).append(clip)
    if not samples:
        raise _nothing(root, skipped, ignored)
    return Index(samples, skipped, ignored)


Shot = tuple[str, str]  # sample, name without suffix


def _shot(path: Path) -> Shot:
    return path.parent.name, path.stem


def _found(root: Path) -> tuple[list[Path], dict[Shot, Path], dict[Path, str]]:
    """Clips in the order of their shots, each one's caption, and why everything else is ignored."""
    films: dict[Shot, Path] = {}
    captions: dict[Shot, Path] = {}
    ignored: dict[Path, str] = {}
    for kind, suffixes, taken in (("video", SUFFIXES, films), ("caption", (".json",), captions)):
        inside = [path for path in root.glob(f"{kind}/*") if not path.is_dir()]
        for path in sorted(
            [*inside, *root.glob(f"{kind}/*/*")], key=lambda path: (path.suffix.lower() != suffixes[0], path)
        ):
            shot = _shot(path)
            if path.name.startswith(".") or path.is_dir():
                ignored[path] = "a folder" if path.is_dir() else "hidden"
            elif path.suffix.lower() not in suffixes:
                ignored[path] = f"not {', '.join(suffix[1:] for suffix in suffixes)}"
            elif path.parent.parent != root / kind:
                ignored[path] = f"not in {kind}/<sample>/"
            elif shot in taken:
                ignored[path] = f"beside {taken[shot].name}"
            else:
                taken[shot] = path
    ignored |= {path: "no clip of this name" for shot, path in captions.items() if shot not in films}
    paths = sorted(films.values(), key=lambda path: (path.parent.name, *_shot_number(path)))
    nowhere = {shot: root / "caption" / shot[0] / f"{shot[1]}.json" for shot in films}
    return paths, nowhere | captions, ignored


def listed(ignored: dict[Path, str]) -> str:
    """The first of some ignored files, and why."""
    shown = [f"{path.parent.name}/{path.name} ({why})" for path, why in ignored.items()]
    return some(shown, REASONS_SHOWN)


def one_line(error: LongtakeError) -> str:
    """What happened and what was found, without the rest."""
    return error.what if error.got is None else f"{error.what} ({error.got})"


class ClipReader:
    """Decodes clips at the preset's size and rate, and keeps the latest ones in memory."""

    def __init__(self, preset: Preset, memory: int = MEMORY) -> None:
        self.preset, self.memory, self._bytes = preset, memory, 0
        self.facts = Facts()
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()

    def read(self, clip: Clip, start: int, frames: int) -> np.ndarray:
        """Frames start..start+frames of a clip, uint8 [frames,H,W,3].

        Raises:
            LongtakeError: the clip is broken, or ends before that.
        """
        self.facts.require(clip.path, start + frames)
        whole = self._whole(clip)
        if len(whole) < start + frames:
            error = LongtakeError(f"{clip.path} ends early", got=f"{len(whole)} frames", expected=clip.frames)
            self.facts.note_short(clip.path, len(whole), one_line(error))
            raise error
        return whole[start : start + frames]

    def forget(self) -> None:
        """Free the decoded clips."""
        self._kept.clear()
        self._bytes = 0

    def _whole(self, clip: Clip) -> np.ndarray:
        if clip.path in self._kept:
            self._kept.move_to_end(clip.path)
            return self._kept[clip.path]
        size = self.preset.height, self.preset.width
        try:
            frames, _ = frames_from_video(clip.path, size, self.preset.fps)
        except LongtakeError as error:
            self.facts.note_short(clip.path, 0, one_line(error))
            raise
        self._kept[clip.path] = frames
        self._bytes += frames.nbytes
        while self._bytes > self.memory and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return frames


def _shot_number(path: Path) -> tuple[float, str]:
    """Numbers in numeric order, then other names."""
    return (int(path.stem), "") if path.stem.isdecimal() else (float("inf"), path.stem)


def _clip_or_error(path: Path, caption_path: Path, preset: Preset) -> Clip | LongtakeError:
    try:
        return _clip(path, caption_path, preset)
    except LongtakeError as error:
        return error


def _clip(path: Path, caption_path: Path, preset: Preset) -> Clip:
    content = read_json(caption_path)
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise LongtakeError(f"{caption_path} has no caption")
    return Clip(path, " ".join(caption.split()), count_frames(path, preset.fps))


def _nothing(root: Path, skipped: dict[Path, str], ignored: dict[Path, str]) -> LongtakeError:
    if not skipped:
        got = "no video/<sample>/<n>.mp4" + (f"; ignored: {listed(ignored)}" if ignored else "")
        return LongtakeError(f"no clips in {root}", got=got, expected=LAYOUT, fix="check --data")
    shown = [f"    {reason}" for reason in list(skipped.values())[:REASONS_SHOWN]]
    if len(skipped) > REASONS_SHOWN:
        shown.append(f"    and {len(skipped) - REASONS_SHOWN} more")
    got = "\n".join([f"{len(skipped)} clips, none of them usable:", *shown])
    return LongtakeError(f"no usable clip in {root}", got=got, expected=LAYOUT, fix="repair these files")
