"""Watch a video being made, cut in the middle, keep what came: python live.py ws://127.0.0.1:8000 [token]"""

import json
import sys

from websockets.sync.client import connect

url = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000"
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if len(sys.argv) > 2 else {}
first = {
    "type": "session.start",
    "prompt": "a green seven drifts left over a dark blue background, soft light",
    "chunks": 6,
    "flow": {"mode": "ack", "window": 2},  # never more than two chunks ahead of what was acknowledged
}
cut = {"prompt": "a red two circles over a forest background, light from above", "cut": True}

with (
    connect(f"{url}/v1/realtime/video", additional_headers=headers, max_size=None) as socket,
    open("live.mp4", "wb") as film,
):
    socket.send(json.dumps(first))
    for message in socket:
        message = json.loads(message)
        if message["type"] == "video.chunk_metadata":
            film.write(socket.recv())  # the fragment that was announced; joined, they are a playable file
            index = message["generation_chunk_index"]
            print(f"chunk {index}: {message['num_frames']} frames of {message['prompt']!r}")
            socket.send(json.dumps({"type": "session.ack", "chunk": index}))
            if index == 1:
                socket.send(
                    json.dumps({"type": "session.interaction", "interaction": {"event_id": "e1", "event": cut}})
                )
        elif message["type"] == "session.interaction.queued":
            print(f"the cut comes with chunk {message['at_chunk']}")
        elif message["type"] == "error":
            sys.exit(f"{message['code']}: {message['message']}")
        elif message["type"] == "session.done":
            print(f"done: {message['chunks']} chunks in live.mp4")
            break
