"""A video from a prompt, in one call: python prompt.py ["a prompt"]"""

import sys

from longtake import LongtakeError, generate

prompt = sys.argv[1] if len(sys.argv) > 1 else "a green seven drifts left over a dark blue background, soft light"
try:
    video = generate(prompt, model="tiny-4step", chunks=2, seed=7, out="prompt.mp4")
except LongtakeError as error:  # it says what was got, what was expected, and how to fix it
    sys.exit(str(error))
print(f"prompt.mp4: {video}")
print(
    f"{video.report['fps']['end_to_end']:.1f} frames a second on {video.report['cpu']}, {video.report['backend']} backend"
)
