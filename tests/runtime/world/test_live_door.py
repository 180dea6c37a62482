"""A world through the live door: its camera is steered, and what was steered outlives whoever made it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import Live, Served
from worlds import picture

from longtake.formats.recipe import Recipe
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.generator import Generator
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings
from longtake.training.models.load import Models
from longtake.training.models.text.words import Tokenizer, room_words

Start = Callable[[], Served]
HALF = math.radians(2) / 2
WALK = {
    "mode": "velocity",
    "data": {"translation": [0.01, 0, 0.03], "rotation": [0, math.sin(HALF), 0, math.cos(HALF)]},
}
THERE = {"mode": "target", "data": {"translation": [0.5, -0.2, 1.0], "rotation": [0, 0, 0.1, 0.99]}}
FLOW = {"mode": "ack", "window": 1}


def sent_picture() -> dict[str, str]:
    out = io.BytesIO()
    Image.fromarray(picture()).save(out, "PNG")
    return {"image_url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()}


@pytest.fixture
def own(recipe: Recipe, models: Models) -> Generator:
    """The same model from Python."""
    return Generator(TorchBackend(recipe, models), Tokenizer(room_words()))


@pytest.fixture
def start(recipe: Recipe, models: Models, tmp_path: Path) -> Iterator[Start]:
    """Starts servers over one store, by PyTorch on one thread, as `serving.tiny` does."""
    running: list[Served] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def begin() -> Served:
        settings = Settings(store=tmp_path / "store", limits=Limits(user_sessions=8, grace_s=0.3))
        running.append(
            Served(
                lambda: Generator(TorchBackend(recipe, models), Tokenizer(room_words())), tmp_path / "store", settings
            )
        )
        return running[-1]

    yield begin
    for server in running:
        if server._thread.is_alive():
            server.end()
    torch.set_num_threads(threads)


def asked(live: Live, chunk: int) -> None:
    """What is asked for while chunk `chunk` is on the screen; the next one waits for its acknowledgement."""
    changes: dict[int, dict[str, Any]] = {
        0: {"multi_modal_data": {"camera": WALK}},
        2: {"multi_modal_data": {"camera": THERE}},
        3: {"prompt": "a room with red walls", "multi_modal_data": {"camera": WALK}},
    }
    if chunk in changes:
        assert live.interact(f"e{chunk}", **changes[chunk])["at_chunk"] == chunk + 1


def watched(live: Live, chunks: range) -> None:
    for chunk in chunks:
        live.chunk(chunk)
        asked(live, chunk)
        live.send("session.ack", chunk=chunk)


def begun(server: Served) -> Live:
    return server.live(prompt="a room", chunks=6, seed=3, image_reference=sent_picture(), flow=FLOW)


def id_of(live: Live) -> str:
    return str(next(one["session_id"] for one in live.messages if one["type"] == "video.start"))


def test_a_camera_is_steered_as_from_python(start: Start, own: Generator) -> None:
    server = start()
    card = server.get("/v1/models").json()["data"][0]["longtake"]
    assert card["can"]["camera"] and not card["can"]["cut"]
    assert (card["first_chunk_frames"], card["chunk_frames"]) == (25, 24)
    live = begun(server)
    session = live.until("video.start")["session_id"]
    watched(live, range(6))
    live.until("session.done")
    metadata = [one for one in live.messages if one["type"] == "video.chunk_metadata"]
    ids = ("started_event_ids", "active_event_ids", "completed_event_ids")
    assert [tuple(one[name] for name in ids) for one in metadata] == [
        ([], [], []),
        (["e0"], ["e0"], []),
        ([], ["e0"], []),
        (["e2"], [], ["e0", "e2"]),  # reached in one chunk
        (["e3"], ["e3"], []),
        ([], ["e3"], []),
    ]
    made_here = own.session("a room", seed=3, chunks=6, image=picture())
    velocity = [0.03 * 16, 0.01 * 16, 2 * 16, 0]
    made = [next(made_here)]
    made_here.steer(velocity=velocity)
    made += [next(made_here), next(made_here)]
    target, turn = np.eye(4), 2 * math.atan2(0.1, 0.99)
    target[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    target[:3, 3] = (0.5, -0.2, 1.0)
    made_here.steer(target=target)
    made.append(next(made_here))
    assert made_here.position.camera is not None
    np.testing.assert_allclose(np.array(made_here.position.camera.walk.pose).reshape(4, 4), target, atol=1e-9)
    made_here.steer(velocity=velocity)
    made_here.change_prompt("a room with red walls")
    made += list(made_here)
    kept = server.store.journal(session)
    for chunk in made:
        torch.testing.assert_close(kept.latents(chunk.index), chunk.latents, rtol=0, atol=1e-5)
    unmoved = list(own.session("a room", seed=3, chunks=2, image=picture()))
    assert (kept.latents(1) - unmoved[1].latents).abs().max() > 1e-3


def test_what_was_steered_outlives_a_server(start: Start) -> None:
    """Rebuilt twice, by feeding every chunk again: also a move that came after its chunk could have begun, and one still to come."""
    server = start()
    whole = begun(server)
    watched(whole, range(6))
    whole.until("session.done")
    live = begun(server)
    session = live.until("video.start")["session_id"]
    seen: dict[int, bytes] = {}
    for chunks in (range(0, 2), range(2, 4)):
        watched(live, range(chunks.start, chunks.stop - 1))
        live.chunk(chunks.stop - 1)
        asked(live, chunks.stop - 1)
        seen |= live.fragments()
        server.end()
        for _, path in server.store.journal(session).snapshots():
            path.unlink()
        server = start()
        live = Live(server.host, type="session.resume", session_id=session, next_chunk=chunks.stop, flow=FLOW)
        live.until("video.start")
        live.send("session.ack", chunk=chunks.stop - 1)
    watched(live, range(4, 6))
    live.until("session.done")
    assert seen | live.fragments() == whole.fragments()
    for first in (0, 4, 1):  # a take of the whole, and of that take; of one, also from before what it made itself
        take = server.live(type="session.retake", session_id=session, from_chunk=first, next_chunk=0)
        session = take.until("video.start")["session_id"]
        take.until("session.done", ack=True)
        made = take.fragments()
        others = [index for index, data in whole.fragments().items() if made.get(index) != data]
        kept = [server.store.journal(one).latents for one in (id_of(whole), session)]
        assert not others, (first, [(index, torch.equal(*(latents(index) for latents in kept))) for index in others])
        assert take.bytes() == whole.bytes()


REFUSED = [
    ({"camera": {"mode": "velocity", "data": {"translation": [0, 1, 0]}}}, "interaction_failed"),
    ({"camera": {"mode": "velocity", "data": {"rotation": [0, 0, 0.7, 0.7]}}}, "interaction_failed"),
    ({"camera": {"mode": "target", "data": {"rotation": [0, 0, 0, 0]}}}, "bad_request"),
    ({"camera": {"mode": "target", "data": {"translation": [0, 0]}}}, "bad_request"),
    ({"camera": {"mode": "velocity", "data": {"translation": [0, 0, 1e9]}}}, "bad_request"),
    ({"camera": {"mode": "fly"}}, "bad_request"),
    ({"camera": {"mode": "target", "date": {}}}, "unknown_field"),
]


def test_what_a_camera_cannot_do_is_said(start: Start) -> None:
    server = start()
    live = server.live(prompt="a room", endless=True, image_reference=sent_picture(), flow=FLOW)
    live.chunk(0)
    for data, code in REFUSED:
        live.send("session.interaction", interaction={"event": {"multi_modal_data": data}})
        assert live.until("error")["code"] == code, data
    live.send("session.interaction", interaction={"event": {"cut": True}})
    assert live.until("error")["code"] == "not_supported"
    live.send("session.interaction", interaction={"event": {"prompt": "quick brown fox jumps"}})
    assert "most of these words" in live.until("error")["message"]
    live.send("session.stop")
    live.until("session.done")
    story = {"shots": [{"prompt": "a room"}], "camera": "/etc/passwd"}
    assert server.post("/v1/videos", json={"story": story}).json()["error"]["code"] == "bad_story"
    story = {"shots": [{"prompt": "a room"}], "action": "q-3"}
    assert server.post("/v1/videos", json={"story": story}).json()["error"]["code"] == "bad_story"


def test_a_story_says_where_the_camera_goes(start: Start, own: Generator) -> None:
    server = start()
    story = {"shots": [{"prompt": "a room", "chunks": 2}], "action": "w-20, none-5, d-20", "seed": 5}
    job = server.post("/v1/videos", json={"story": story, "input_reference": sent_picture()}).json()
    server.wait_for(job["id"])
    from longtake.runtime.view import View

    wanted = list(own.session("a room", seed=5, chunks=2, image=picture(), view=View(action=story["action"])))  # type: ignore[arg-type]
    kept = server.store.journal(job["id"])
    for chunk in wanted:
        torch.testing.assert_close(kept.latents(chunk.index), chunk.latents, rtol=0, atol=1e-5)
    again = server.post(f"/v1/videos/{job['id']}/retake", json={"from_chunk": 1, "story": story}).json()["error"]
    assert (again["code"], again["param"], again["longtake"]["got"]) == ("not_supported", "story", "action")
