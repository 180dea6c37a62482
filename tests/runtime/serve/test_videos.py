"""OpenAI's Videos API with its own client, unchanged."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from serving import PROMPT, Served
from toy_backend import ToyBackend

from longtake.errors import LongtakeError
from longtake.runtime.serve.limits import Limits
from longtake.video import write_video

openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install 'longtake[dev]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client warns that another service ends


@pytest.fixture
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as container:
        return sum(1 for _ in container.decode(video=0))


def png(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (40, 90, 160)).save(out, "PNG")
    return out.getvalue()


def test_create_poll_download_remix_extend_delete(client: Any, server: Served) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, seconds="4", size="128x128", poll_interval_ms=50)
    assert video.status == "completed" and video.progress == 100 and video.seconds == "4" and video.error is None
    content = client.videos.download_content(video.id).read()
    assert frames(content) == 96
    measured = server.get("/v1/models").json()["data"][0]["longtake"]["measured"]
    assert measured["chunk_s"] > 0 and measured["first_chunk_s"] is None and measured["gpu"] is None
    picture = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    assert picture.size == (128, 128)
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.size == (512, 512)

    remixed = client.videos.remix(video.id, prompt="a red two circles")
    assert remixed.remixed_from_video_id == video.id and remixed.prompt == "a red two circles"
    remixed = client.videos.poll(remixed.id, poll_interval_ms=50)
    assert remixed.seconds == "4" and frames(client.videos.download_content(remixed.id).read()) == 96

    # of the client itself `video={"id": …}` cannot pass (3.57): it takes the field for a file
    body = {"prompt": "snow falls", "seconds": "4", "video[id]": video.id}
    longer = client.videos.poll(server.post("/v1/videos/extensions", data=body).json()["id"], poll_interval_ms=50)
    assert longer.status == "completed" and longer.seconds == "8"
    whole = client.videos.download_content(longer.id).read()
    assert frames(whole) == 192
    assert client.videos.delete(video.id).deleted
    assert client.videos.download_content(longer.id).read() == whole  # what was shared is still there
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_an_extension_is_the_film_that_would_have_been(client: Any, server: Served) -> None:
    short = client.videos.create_and_poll(prompt=PROMPT, seconds="4", extra_body={"seed": 5}, poll_interval_ms=50)
    body = {"prompt": PROMPT, "seconds": "3", "video": {"id": short.id}}
    longer = client.videos.poll(server.post("/v1/videos/extensions", json=body).json()["id"], poll_interval_ms=50)
    whole = client.videos.create_and_poll(prompt=PROMPT, seconds="7", extra_body={"seed": 5}, poll_interval_ms=50)
    assert client.videos.download_content(longer.id).read() == client.videos.download_content(whole.id).read()


def test_a_retake_over_http(client: Any, server: Served) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, seconds="6", extra_body={"seed": 5}, poll_interval_ms=50)
    whole = client.videos.download_content(video.id).read()
    for body, same in (
        ({"from_chunk": 2}, True),
        ({"from_chunk": 2, "prompt": "rain", "cut": True}, False),
        ({"from_chunk": 0, "seed": 6}, False),
    ):
        answer = server.post(f"/v1/videos/{video.id}/retake", json=body)
        assert answer.status_code == 200 and answer.json()["longtake"]["parent"] == video.id
        take = server.wait_for(answer.json()["id"])
        content = client.videos.download_content(take["id"]).read()
        assert (content == whole) is same and frames(content) == 144
        kept = server.store.journal(take["id"])
        shared = [kept.media(i) == server.store.journal(video.id).media(i) for i in range(kept.count())]
        start = body["from_chunk"]
        assert all(shared[:start]) and (all(shared) if same else not any(shared[start:]))
    assert server.post(f"/v1/videos/{video.id}/retake", json={"from_chunk": 99}).json()["error"]["code"] == "bad_chunk"


@pytest.mark.parametrize("value", [None, "gone", {}, {"chunk": 2}, 7, []])
@pytest.mark.parametrize("field", ["position", "prompt"])
def test_what_would_share_a_damaged_chunk_says_so(server: Served, field: str, value: Any) -> None:
    """Taken again, remixed, extended, live: each is refused, and nothing of it is left."""
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "4"}).json()["id"]
    server.wait_for(job)
    journal = server.store.journal(job)
    about = {**journal.chunk(last := journal.count() - 1), field: value}
    if value == "gone":
        del about[field]
    (journal.folder / f"{last:06}.json").write_text(json.dumps(about))
    answers = [
        server.post(f"/v1/videos/{job}/retake", json={"from_chunk": last + 1}),
        server.post(f"/v1/videos/{job}/remix", json={"prompt": PROMPT}),
        server.post("/v1/videos/extensions", json={"video": {"id": job}, "seconds": "1"}),
    ]
    assert all(each.status_code == 409 and each.json()["error"]["code"] == "damaged" for each in answers), [
        each.text for each in answers
    ]
    assert not any(str(server.store.root) in each.text for each in answers)
    live = server.live(type="session.retake", session_id=job, from_chunk=last + 1)
    assert live.until("error")["code"] == "damaged"
    assert [one.id for one in server.store.all()] == [job]
    assert len(list((server.store.root / "sessions").iterdir())) == 1


@pytest.mark.parametrize("damage", ["latents altered", "latents gone", "media gone"])
def test_a_shared_file_that_was_altered_is_not_shared(server: Served, damage: str) -> None:
    """A take with another seed would make the chunk otherwise than the film that it is taken from."""
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "4"}).json()["id"]
    server.wait_for(job)
    journal = server.store.journal(job)
    what, how = damage.split()
    path = journal.folder / journal.chunk(1)[what]
    path.unlink() if how == "gone" else path.write_bytes(bytes(len(path.read_bytes())))
    answer = server.post(f"/v1/videos/{job}/retake", json={"from_chunk": 3, "seed": 6})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "damaged")
    assert len(list((server.store.root / "sessions").iterdir())) == 1
    assert server.post(f"/v1/videos/{job}/retake", json={"from_chunk": 1, "seed": 6}).status_code == 200


def test_an_extension_of_a_clip(client: Any, tmp_path: Path, make_toy: Any, start: Any) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", rows, 24)
    with open(tmp_path / "clip.mp4", "rb") as clip, pytest.raises(openai.BadRequestError) as error:
        client.videos.extend(prompt="snow", seconds="2", video=clip)
    assert error.value.code == "not_supported"  # the toy has no encoder; the real model's is tested where it is slow


def test_list_pages(client: Any) -> None:
    made = [client.videos.create(prompt=f"{PROMPT} {i}", seconds="1") for i in range(5)]
    listed = list(client.videos.list(limit=2))
    assert [one.id for one in listed] == [one.id for one in reversed(made)]
    assert [one.id for one in client.videos.list(limit=2, order="asc", after=made[1].id)] == [
        one.id for one in made[2:]
    ]
    for one in made:
        client.videos.delete(one.id)
    assert not list(client.videos.list())


def test_the_asynchronous_client(server: Served) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            video = await client.videos.create_and_poll(prompt=PROMPT, seconds="2", poll_interval_ms=50)
            assert frames((await client.videos.download_content(video.id)).read()) == 48
            assert [model.id async for model in client.models.list()] == [video.model]

    asyncio.run(main())


def test_ranges(client: Any, server: Served) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, seconds="1", poll_interval_ms=50)
    whole = server.get(f"/v1/videos/{video.id}/content").content
    part = server.get(f"/v1/videos/{video.id}/content", headers={"range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole[100:200]
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert server.get(f"/v1/videos/{video.id}/content", headers={"range": "bytes=9999999-"}).status_code == 416


def test_a_story_as_a_job(server: Served) -> None:
    shots = [{"prompt": PROMPT, "chunks": 1, "then": [{"prompt": "night"}]}, {"prompt": "dawn", "chunks": 2}]
    for given in (
        {"json": {"story": {"shots": shots, "seed": 3}}},
        {"data": {"story": json.dumps({"shots": shots, "seed": 3})}},
    ):
        job = server.post("/v1/videos", **given).json()
        assert job["longtake"]["seed"] == 3 and job["longtake"]["chunks"] == 4
        server.wait_for(job["id"])
        chunks = server.store.journal(job["id"]).chunks()
        assert [(c["prompt"], c["cut"]) for c in chunks] == [
            (PROMPT, False),
            ("night", False),
            ("dawn", True),
            ("dawn", False),
        ]


BAD = [
    ({"prompt": PROMPT, "size": "640x384"}, 400, "bad_size"),
    ({"prompt": PROMPT, "fps": 30}, 400, "bad_fps"),
    ({"prompt": PROMPT, "seconds": "0"}, 400, "bad_length"),
    ({"prompt": PROMPT, "seconds": "soon"}, 400, "bad_length"),
    ({"prompt": PROMPT, "seconds": "99999"}, 400, "bad_length"),
    ({"prompt": PROMPT, "num_frames": -1}, 400, "bad_length"),
    ({"prompt": PROMPT, "chunks": 513}, 400, "bad_length"),
    ({"prompt": ""}, 400, "bad_prompt"),
    ({"prompt": "x" * 9000}, 400, "bad_prompt"),
    ({"prompt": PROMPT, "negative_prompt": "x" * 9000}, 400, "bad_prompt"),
    ({}, 400, "bad_request"),
    ({"prompt": PROMPT, "story": {"shots": [{"prompt": "a"}]}}, 400, "bad_request"),
    ({"story": {"shots": []}}, 400, "bad_story"),
    ({"story": {"shots": [{"prompt": "a"}], "image": "/etc/passwd"}}, 400, "bad_story"),
    ({"story": {"shots": [{"prompt": "a"}] * 300}}, 400, "bad_story"),
    ({"prompt": PROMPT, "model": "sora-2"}, 404, "model_not_found"),
    ({"prompt": PROMPT, "promt": "x"}, 400, "unknown_field"),
    ({"prompt": PROMPT, "seed": -1}, 400, "bad_request"),
    ({"prompt": PROMPT, "seed": 1.5}, 400, "bad_request"),
    ({"prompt": PROMPT, "num_inference_steps": 0}, 400, "bad_request"),
    ({"prompt": PROMPT, "guidance_scale": 1e9}, 400, "bad_request"),
    ({"prompt": PROMPT, "lora": {"path": "x"}}, 400, "unsupported_field"),
    ({"prompt": PROMPT, "codec": "hevc"}, 400, "bad_request"),
    ({"prompt": PROMPT, "input_reference": {"image_url": "http://127.0.0.1:1/x.png"}}, 400, "bad_image"),
    ({"prompt": PROMPT, "input_reference": {"image_url": "file:///etc/passwd"}}, 400, "bad_image"),
    ({"prompt": PROMPT, "input_reference": {"image_url": "data:image/png;base64,AAAA"}}, 400, "not_supported"),
]


def test_a_model_is_asked_for_by_any_of_its_names(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyBackend, "made_of", {"model": "mine"})
    server = start()
    (card,) = server.get("/v1/models").json()["data"]
    assert card["id"] == "mine@tiny_bf16_sm90"
    for name in ("mine", "tiny_bf16_sm90", card["id"]):
        answer = server.post("/v1/videos", json={"prompt": PROMPT, "model": name})
        assert answer.status_code == 200 and answer.json()["model"] == card["id"]
        assert server.get(f"/v1/models/{name}").json()["id"] == card["id"]
    assert server.post("/v1/videos", json={"prompt": PROMPT, "model": "tiny-4step"}).status_code == 404


@pytest.mark.parametrize(("body", "status", "code"), BAD)
def test_bad_bodies(server: Served, body: dict[str, Any], status: int, code: str) -> None:
    answer = server.post("/v1/videos", json=body)
    assert answer.status_code == status and answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"] and server.get("/health").status_code == 200
    assert not list(server.store.sessions.iterdir())


def test_a_prompt_of_unknown_words_is_refused_at_every_door(start: Any) -> None:
    server = start(words=True)
    plain = {"prompt": PROMPT, "seconds": "1", "guidance_scale": 1, "negative_prompt": "blurry, low quality"}
    made = server.post("/v1/videos", json=plain)
    assert made.status_code == 200, made.text  # without guidance nothing reads the negative prompt
    video = server.wait_for(made.json()["id"])["id"]
    unknown = "the quick brown fox jumps over it"
    doors = {
        "": {"prompt": unknown},
        "?": {"prompt": PROMPT, "guidance_scale": 3, "negative_prompt": unknown},
        "??": {"story": {"shots": [{"prompt": PROMPT}, {"prompt": unknown}]}},
        f"/{video}/remix": {"prompt": unknown},
        f"/{video}/retake": {"from_chunk": 0, "prompt": unknown},
        "/extensions": {"video": {"id": video}, "prompt": unknown},
    }
    for path, body in doors.items():
        answer = server.post(f"/v1/videos{path}", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "bad_prompt", "prompt"), path
        assert "does not know most of these words" in error["message"] and "'fox'" in error["longtake"]["got"]
        assert "such as a, above" in error["longtake"]["expected"] and error["longtake"]["fix"]
    live = server.live(prompt=unknown)
    assert live.until("error")["code"] == "bad_prompt" and live.closed() == 4400
    assert [one.id for one in server.store.all()] == [video]


def test_a_failed_job_says_why_where_its_film_is_asked_for(start: Any) -> None:
    server = start(pause_s=0.01)

    def broken(call: int) -> None:
        raise LongtakeError("the toy is broken")

    server.backends[0].hook = broken
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1"}).json()["id"]
    error = server.wait_for(job, "failed")["error"]
    assert error == {"code": "chunk_failed", "message": "the toy is broken"}
    for variant in ("video", "thumbnail"):
        answer = server.get(f"/v1/videos/{job}/content?variant={variant}")
        told = answer.json()["error"]
        assert answer.status_code == 404 and {key: told[key] for key in error} == error
        assert told["longtake"]["fix"] == "make the video anew"


def test_more_bad_requests(server: Served) -> None:
    assert server.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert (
        server.post("/v1/videos", content=b"[" * 100000, headers={"content-type": "application/json"}).status_code
        == 400
    )
    assert server.post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert server.post("/v1/videos", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert (
        server.post("/v1/videos", content=b"x" * (40 << 20), headers={"content-type": "application/json"}).status_code
        == 413
    )
    for path in ("video_0123456789abcdef", "..%2f..%2fetc", "x" * 300, "live_zz"):
        assert server.get(f"/v1/videos/{path}").status_code == 404
        assert server.get(f"/v1/videos/{path}/content").status_code == 404
    assert server.get("/v1/videos/nope").json()["error"]["message"] == "there is no such video"
    assert server.post("/v1/videos/edits", json={}).json()["error"]["code"] == "not_supported"
    assert server.get("/v1/videos?limit=0").json()["error"]["code"] == "bad_request"
    assert server.get("/v1/videos?limit=x").status_code == 400
    assert server.get("/nothing").json()["error"]["code"] == "not_found"
    near = server.post("/v1/videos", json={"prompt": PROMPT, "promt": "x"}).json()["error"]
    assert near["longtake"]["fix"] == "did you mean prompt?"


def test_quotas(start: Any) -> None:
    server = start(pause_s=0.05, limits=Limits(user_jobs=2, user_sessions=1))
    jobs = [server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "60"}) for _ in range(3)]
    assert [job.status_code for job in jobs] == [200, 200, 429]
    assert jobs[2].json()["error"]["code"] == "quota" and int(jobs[2].headers["retry-after"]) > 0
    assert len(list(server.store.sessions.iterdir())) == 2
    assert server.get(f"/v1/videos/{jobs[1].json()['id']}").json()["longtake"]["queue_position"] == 0
    assert server.get(f"/v1/videos/{jobs[0].json()['id']}/content").json()["error"]["code"] == "not_completed"
    live = server.live(prompt=PROMPT, chunks=1)
    live.until("session.queued")
    second = server.live(prompt=PROMPT, chunks=1)
    assert second.until("error")["code"] == "quota" and second.closed() == 4429
    assert server.client_delete(jobs[0].json()["id"])
    live.until("session.done")


def test_jobs_survive_a_restart(start: Any) -> None:
    server = start(pause_s=0.02)
    jobs = [
        server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "4", "seed": 3}).json()["id"] for _ in range(2)
    ]
    server.end()
    other = start()
    first, second = (other.get(f"/v1/videos/{other.wait_for(job)['id']}/content").content for job in jobs)
    assert first == second and frames(first) == 96


def test_a_job_says_when_it_expires_and_goes_with_its_files(start: Any) -> None:
    server = start(limits=Limits(kept_s=600))
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1"}).json()
    assert job["expires_at"] is None  # as long as it is not made
    done = server.wait_for(job["id"])
    assert done["expires_at"] == pytest.approx(done["completed_at"] + 600, abs=1)
    server.end()
    time.sleep(1.1)
    other = start(limits=Limits(kept_s=1))  # which looks for what is late as soon as it is there
    until = time.monotonic() + 10
    while list(other.store.sessions.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert other.get(f"/v1/videos/{job['id']}").status_code == 404 and not list(other.store.sessions.iterdir())


def test_jobs_make_room_for_people(start: Any) -> None:
    server = start(pause_s=0.04)
    job = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "6", "seed": 3}).json()["id"]
    live = server.live(prompt=PROMPT, chunks=2)
    live.until("session.done")
    assert server.get(f"/v1/videos/{job}").json()["status"] in ("queued", "in_progress")
    server.wait_for(job)
    again = server.post("/v1/videos", json={"prompt": PROMPT, "seconds": "6", "seed": 3}).json()["id"]
    server.wait_for(again)
    assert server.get(f"/v1/videos/{job}/content").content == server.get(f"/v1/videos/{again}/content").content
