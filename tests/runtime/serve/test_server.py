"""The process: ports, options, ends; and the real model behind the door."""

from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import httpx
import numpy as np
import pytest
from PIL import Image
from serving import PROMPT, Live, Process, Served, tiny

from longtake.commands.main import parsed
from longtake.commands.serve import ModelOptions, run
from longtake.errors import LongtakeError
from longtake.paths import REPOSITORY
from longtake.runtime.serve.describe import description
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.local import LocalWorkers
from longtake.runtime.serve.server import Settings, _end, listening
from longtake.video import write_video


def frames(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_port_that_is_taken_is_said_with_the_next_free_one() -> None:
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(LongtakeError, match=f"port {port} is taken") as error:
            listening("127.0.0.1", port)
        assert error.value.exit_code == 2 and error.value.fix is not None
        free = int(error.value.fix.rsplit(" ", 1)[1])
        assert free > port
        listening("127.0.0.1", free).close()
    with pytest.raises(LongtakeError, match="cannot listen"):
        listening("203.0.113.1", 0)


def test_options_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\nuser-sessions: 3\nallow-origin: [https://video.example.org]\nworkers: '1:4'\n")
    model, door, ray, limits = parsed("serve", ["--config", str(file), "--port", "9001"])
    assert (door.port, limits.user_sessions, door.allow_origin) == (9001, 3, ("https://video.example.org",))
    assert ray.bounds == (1, 4) and model.engines is None
    for words in (["--workers", "4:1"], ["--workers", "x"]):
        with pytest.raises(LongtakeError, match="bad --workers"):
            _ = parsed("serve", words)[2].bounds
    with pytest.raises(LongtakeError, match="bad --window"):
        parsed("serve", ["--window", "0"])
    with pytest.raises(LongtakeError, match="both name what is served"):
        run(ModelOptions(model="tiny-4step", engines="x"), door, ray, limits)


def test_viewers_who_take_no_farewell_do_not_hold_up_the_end() -> None:
    async def settle(seconds: float) -> None:
        pass

    viewers = [SimpleNamespace(close=lambda code: asyncio.sleep(60)) for _ in range(20)]
    front: Any = SimpleNamespace(leaving=False, connections=viewers, settle=settle)
    begun = time.monotonic()
    jobs: Any = SimpleNamespace(end=lambda: None)
    asyncio.run(_end(front, LocalWorkers(), jobs))
    assert front.leaving and time.monotonic() - begun < 10


@pytest.mark.slow
def test_the_command_from_nothing_to_its_end(tmp_path: Path) -> None:
    """The shipped student: exported first, a first picture soon, an orderly end."""
    command = [sys.executable, "-m", "longtake", "serve", "--port", "0", "--store", str(tmp_path / "store")]
    environ = {"LONGTAKE_HOME": str(tmp_path / "home"), "LONGTAKE_THREADS": "1"}
    import os

    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1].rstrip("/")
    for _ in range(3):  # other work on the machine may disturb some
        live = Live(address.removeprefix("http://"), prompt=PROMPT, endless=True, flow={"mode": "ack", "window": 1})
        live.chunk(0)
        if live.at[0] < 6:
            break
        live.send("session.stop")
        live.until("session.done", ack=True)
    assert live.at[0] < 6
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert live.closed(15) == 1001 and process.wait(15) == 0 and time.monotonic() - begun < 15


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("real")
    server = Served(tiny, store, Settings(store=store, limits=Limits(user_jobs=9)))
    yield server
    server.end()


@pytest.mark.slow
def test_pictures_and_clips_are_gone_on_from(real: Served, tmp_path: Path) -> None:
    assert description(tiny())["can"]["image"]
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[:, :64] = (200, 40, 40)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    files = {"input_reference": ("x.png", out.getvalue(), "image/png")}
    job = real.post("/v1/videos", data={"prompt": PROMPT, "seconds": "1"}, files=files).json()
    real.wait_for(job["id"])
    first = frames(real.get(f"/v1/videos/{job['id']}/content").content)[0].astype(int)
    assert first[:, :56, 0].mean() > first[:, 72:, 0].mean() + 60
    write_video(tmp_path / "clip.mp4", np.broadcast_to(picture, (40, 128, 128, 3)), 24)
    files = {"video": ("c.mp4", (tmp_path / "clip.mp4").read_bytes(), "video/mp4")}
    longer = real.post("/v1/videos/extensions", data={"prompt": PROMPT, "seconds": "1"}, files=files).json()
    real.wait_for(longer["id"])
    assert len(frames(real.get(f"/v1/videos/{longer['id']}/content").content)) == 24
    again = real.post("/v1/videos/extensions", json={"prompt": PROMPT, "seconds": "1", "video": {"id": longer["id"]}})
    assert again.status_code == 200, again.text
    real.wait_for(again.json()["id"])
    for bad in (b"", b"x" * 1000, out.getvalue()):
        answer = real.post(
            "/v1/videos/extensions", data={"prompt": PROMPT}, files={"video": ("c.mp4", bad, "video/mp4")}
        )
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_clip"


@pytest.mark.slow
def test_retakes_of_the_real_model(real: Served) -> None:
    live = real.live(prompt=PROMPT, chunks=4, seed=3)
    session = live.until("video.start")["session_id"]
    live.until("session.done")
    same = real.live(type="session.retake", session_id=session, from_chunk=2, next_chunk=0)
    same.until("session.done")
    assert same.bytes() == live.bytes()


@pytest.mark.slow
def test_two_signals_and_a_read_only_store(tmp_path: Path) -> None:
    process = Process(tmp_path / "store", "toy")
    assert httpx.get(f"{process.url}/ready", timeout=10).status_code == 200
    assert process.kill(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "banana"], "(?s)unknown device.*banana.*leave out --device"),
        (["--decode-device", "banana"], "(?s)unknown device.*leave out --decode-device"),
        (["--checkpoints", "none"], "none is no folder of checkpoints"),
    ],
)
def test_places_that_are_none_are_refused_before_anything_is_made_or_listens(
    monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    def served(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr("longtake.runtime.serve.server.serve", served)
    with pytest.raises(LongtakeError, match=says):
        run(*parsed("serve", words))
