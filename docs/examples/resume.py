"""Save a session and go on with it later: the same frames come out, to the bit: python resume.py"""

import numpy as np

from longtake import Generator, Video

script = [
    "a green seven drifts left over a dark blue background, soft light",
    "a green seven rises over a dark blue background, soft light",
]
with Generator.from_pretrained("tiny-4step") as generator:
    with generator.session(script, seed=7) as session:
        first = next(session).frames
        session.save("session.safetensors")
        at_once = next(session).frames

    # Another day, another process, another machine with the same model
    with generator.load_session("session.safetensors") as session:
        print(session)
        later = next(session).frames

print(f"the same to the bit: {np.array_equal(at_once, later)}")
Video(np.concatenate([first, later]), generator.fps, {}).save("resume.mp4")
