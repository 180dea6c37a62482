"""Make a video as a job, with the openai client: python jobs.py http://127.0.0.1:8000 [token]"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=sys.argv[2] if len(sys.argv) > 2 else "none")

video = client.videos.create_and_poll(
    prompt="a green seven drifts left over a dark blue background, soft light",
    seconds="4",
    extra_body={"seed": 7},
    poll_interval_ms=500,
)
if video.status != "completed":
    sys.exit(f"it failed: {video.error}")
client.videos.download_content(video.id).write_to_file("video.mp4")
client.videos.download_content(video.id, variant="thumbnail").write_to_file("video.png")
print(f"{video.id}: {video.seconds} s in video.mp4")

again = client.videos.remix(video.id, prompt="a red two circles over a forest background, light from above")
print(f"remixed as {again.id}, {client.videos.poll(again.id, poll_interval_ms=500).status}")
