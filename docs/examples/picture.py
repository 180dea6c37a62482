"""A video that starts from a picture, and one that goes on from a clip: python picture.py [PICTURE]"""

import sys

from PIL import Image, ImageDraw

from longtake import Generator, Video

picture = Image.new("RGB", (128, 128), (20, 30, 90))
ImageDraw.Draw(picture).line([(40, 36), (88, 36), (60, 96)], fill=(60, 200, 80), width=10)
if len(sys.argv) > 1:
    picture = Image.open(sys.argv[1])

with Generator.from_pretrained("tiny-4step") as generator:
    prompt = "a green seven drifts left over a dark blue background, soft light"
    with generator.session(prompt, seed=7, image=picture) as session:
        (chunk,) = session
    Image.fromarray(chunk.frames[0]).save("picture_first_frame.png")  # the picture, through the VAE
    latents = generator.encode(chunk.frames)  # so does a video file: generator.encode("clip.mp4")
    rising = "a green seven rises over a dark blue background, soft light"
    with generator.session(rising, seed=7, continue_from=latents, clip=prompt) as session:
        (after,) = session
    print(f"chunk {after.index} saw chunks {after.visible}")
    Video(after.frames, generator.fps, {}).save("picture.mp4")
