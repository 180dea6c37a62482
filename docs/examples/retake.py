"""Take a video again from its second chunk, with another prompt and with another seed: python retake.py"""

import numpy as np

from longtake import Generator, Video

script = ["a green seven drifts left over a dark blue background, soft light"] * 2
with Generator.from_pretrained("tiny-4step") as generator:
    with generator.session(script, seed=7, retakes=True) as session:
        first, second = session
        with session.retake(from_chunk=1) as take:
            take.cut("a red two circles over a forest background, light from above")
            other_prompt = next(take)
        with session.retake(from_chunk=1, seed=8) as take:
            other_seed = next(take)
        takes = {"as_it_was": second, "other_prompt": other_prompt, "other_seed": other_seed}
        for name, chunk in takes.items():  # the first chunk is shared, not made again
            path = Video(np.concatenate([first.frames, chunk.frames]), generator.fps, {}).save(f"retake_{name}.mp4")
            print(f"{path}: chunk 1 is {chunk.prompt!r}")
