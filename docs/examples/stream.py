"""Frames into another player or encoder while they are made: python stream.py | mpv -

Matroska on standard output. ffmpeg, VLC and gst-launch-1.0 read it from a pipe, too.
"""

import sys

import av

from longtake import Generator

if sys.stdout.isatty():
    sys.exit("this writes a film: python stream.py | mpv -")
prompt = sys.argv[1] if len(sys.argv) > 1 else "a green seven drifts left over a dark blue background, soft light"
with Generator.from_pretrained("tiny-4step") as generator, generator.session(prompt, seed=7, chunks=2) as session:
    with av.open(sys.stdout.buffer, "w", format="matroska", options={"flush_packets": "1"}) as pipe:
        stream = pipe.add_stream("libx264", rate=generator.fps, options={"preset": "ultrafast", "tune": "zerolatency"})
        stream.pix_fmt = "yuv420p"
        for chunk in session:
            if chunk.index == 0:
                stream.height, stream.width = chunk.frames.shape[1:3]
            for pixels in chunk.frames:  # uint8 [H, W, 3]; another encoder takes them here
                pipe.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            print(f"chunk {chunk.index} is in the pipe", file=sys.stderr)
        pipe.mux(stream.encode(None))
