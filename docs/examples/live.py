"""A live session: new prompts and cuts while the video is made; every chunk is in the file at once: python live.py"""

from longtake import Generator
from longtake.video import VideoWriter

CHANGES = {  # what somebody asks for while a chunk is shown
    0: ("change_prompt", "a green seven rises over a dark blue background, soft light"),
    1: ("cut", "a red two circles over a forest background, light from above"),
}

with (
    Generator.from_pretrained("tiny-4step") as generator,
    generator.session(
        "a green seven drifts left over a dark blue background, soft light", seed=7, endless=True
    ) as session,
    VideoWriter("live.mp4", generator.fps) as film,  # Ctrl-C leaves a film that plays
):
    for chunk in session:
        film.write(chunk.frames)
        print(f"chunk {chunk.index}, shot {chunk.shot}{', a cut' if chunk.cut else ''}: {chunk.prompt}")
        if chunk.index in CHANGES:
            kind, prompt = CHANGES[chunk.index]
            at = getattr(session, kind)(prompt)  # says at which chunk it takes effect
            print(f"  {kind} from chunk {at} on")
        if chunk.index == 3:
            break
