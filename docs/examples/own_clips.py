"""Own clips with own captions, from folder to video: python own_clips.py [FOLDER] [STEPS]

Without a folder, four clips are drawn. A few steps show the way; docs/training.md says how many teach something.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from longtake import Generator, Video

CAPTIONS = {
    "a red square falls": (220, 40, 40),
    "a white square falls": (230, 230, 230),
    "a yellow square falls": (230, 210, 40),
    "a violet square falls": (150, 60, 200),
}


def draw_clips(folder: Path) -> None:
    """Clips of 1.2 seconds: clip0.mp4 with its caption in clip0.txt, and so on."""
    folder.mkdir(exist_ok=True)
    for number, (caption, colour) in enumerate(CAPTIONS.items()):
        frames = np.full((29, 128, 128, 3), 24, np.uint8)
        for t, frame in enumerate(frames):
            frame[3 * t : 3 * t + 32, 48:80] = colour
        Video(frames, 24, {}).save(folder / f"clip{number}.mp4")
        (folder / f"clip{number}.txt").write_text(caption)


def longtake(command: str) -> None:
    """A command, as one types it."""
    subprocess.run([sys.executable, "-m", "longtake", *command.split()], check=True)


clips = Path(sys.argv[1] if len(sys.argv) > 1 else "my_clips")
steps = sys.argv[2] if len(sys.argv) > 2 else "20"
if not clips.exists():
    draw_clips(clips)
longtake(f"train --config tiny_own_vae --data {clips} --steps {steps}")
longtake(f"train --config tiny_own_nvfp4 --data {clips} --steps {steps} --batch 4 --stories 16")
caption = min(clips.glob("*.txt")).read_text().strip()
with Generator.from_checkpoint("runs/own") as generator, generator.session(caption, seed=7, steps=4) as session:
    Video(next(session).frames, generator.fps, {}).save("own_clips.mp4")
print(f"own_clips.mp4: {caption}; next: longtake evaluate --checkpoints runs/own --data {clips}")
