"""What a user writes: everything that the door offers, under `mypy --strict`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from longtake import (
    CancelledError,
    Chunk,
    Generator,
    LongtakeError,
    Sampling,
    Segment,
    Session,
    Step,
    Story,
    Video,
    generate,
)


def quick(prompt: str) -> Path:
    video: Video = generate(prompt, model="tiny-4step", chunks=2, seed=7, out="quick.mp4")
    frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = video.frames
    seconds: float = len(frames) / video.fps
    print(f"{seconds:.1f} s, {video.report['checkpoint']}")
    return video.save("copy.mp4")


def show(step: Step) -> None:
    print(step.chunk, step.index, step.steps, step.timestep, tuple(step.preview.shape))
    if step.index > 100:
        step.cancel()


def live(generator: Generator, picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> list[Chunk]:
    chunks: list[Chunk] = []
    sampling = Sampling(steps=2, guidance=1.0)
    with generator.session(
        "a green seven rises", seed=3, sampling=sampling, image=picture, endless=True, on_step=show
    ) as session:
        running: Session = session
        for chunk in running:
            chunks.append(chunk)
            if chunk.index == 1:
                starts: int = running.change_prompt("a red two circles")
                print(f"from chunk {starts} on; {generator.fps} frames a second")
            if chunk.index == 3:
                running.save("session.safetensors")
                break
    return chunks


def main(words: list[str]) -> int:
    story = Story("mine", (Segment("a green seven", 2), Segment("a red two", 1, cut=True)))
    try:
        with Generator.from_pretrained(words[0], recipe=None, device="cpu") as generator:
            print(generator, len(live(generator, np.zeros((64, 64, 3), np.uint8))))
            with generator.session(story) as session:
                print(session, [chunk.frames.shape for chunk in session])
    except CancelledError:
        return 130
    except LongtakeError as error:
        print(error.what, error.got, error.expected, error.fix, file=sys.stderr)
        return error.exit_code
    print(quick(words[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
