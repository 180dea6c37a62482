"""The same video with 4, 2 and 1 steps a chunk: how long each takes, how far it is from the first, and all side by side:
python compare.py"""

import time

import numpy as np

from longtake import Generator, Video
from longtake.accuracy.ssim import ssim

prompt = "a green seven drifts left over a dark blue background, soft light"
films = {}
with Generator.from_pretrained("tiny-4step") as generator:
    for steps in (4, 2, 1):
        begun = time.perf_counter()
        with generator.session(prompt, seed=7, steps=steps) as session:
            films[steps] = next(session).frames
        likeness = ssim(films[4][::4], films[steps][::4]).mean()  # every fourth frame
        print(f"{steps} steps: {time.perf_counter() - begun:.1f} s, SSIM {likeness:.3f} to 4 steps")
    Video(np.concatenate(list(films.values()), axis=2), generator.fps, {}).save("compare.mp4")
