"""A story shot by shot, changed while it runs: python story.py ws://127.0.0.1:8000"""

import json
import sys

from websockets.sync.client import connect

story = {
    "seed": 7,
    "shots": [
        {"prompt": "a green seven drifts left over a dark blue background, soft light", "chunks": 2},
        {"prompt": "a red two circles over a forest background, light from above", "chunks": 3},
    ],
}
url = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000"
with connect(f"{url}/v1/realtime/video", max_size=None) as socket:
    socket.send(json.dumps({"type": "session.start", "story": story, "flow": {"mode": "ack", "window": 1}}))
    for message in socket:
        if isinstance(message, bytes):
            continue
        message = json.loads(message)
        if message["type"] == "video.chunk_metadata":
            index = message["generation_chunk_index"]
            print(f"chunk {index}, shot {message['shot']}: {message['prompt']}")
            socket.send(json.dumps({"type": "session.ack", "chunk": index}))
            if index == 0:
                event = {"prompt": "a green seven rises over a dark blue background, soft light"}
                socket.send(
                    json.dumps({"type": "session.interaction", "interaction": {"event_id": "rise", "event": event}})
                )
            if index == 3:
                socket.send(json.dumps({"type": "session.extend", "chunks": 2}))
        elif message["type"] == "session.done":
            break
