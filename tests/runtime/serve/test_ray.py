"""Over Ray Serve, on one machine: workers, the registry and the front are killed, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from children import children
from serving import FRONT, PROMPT, REGISTRY, WORKER, Process
from viewers import Viewer, check, watched

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.meters import silent
from longtake.runtime.serve.server import Settings, Size, listening

pytest.importorskip("ray", reason="Ray is not installed: pip install 'longtake[scale]'")
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("ray")
    one = Process(folder / "store", "toy", "ray", "workers=3", "slots=2", log=folder / "log")
    yield one
    assert one.kill(signal.SIGTERM) == 0


@pytest.mark.parametrize("answer", ["nothing", "an error", "the same", "a newer one"])
def test_a_front_without_a_registry_is_not_ill(answer: str) -> None:
    """Serve ends a front whose health check fails or hangs, and every socket with it."""
    from longtake.runtime.serve.contract import ServeError
    from longtake.runtime.serve.ray_app import Entrance

    closed: list[int] = []

    async def generation() -> int:
        if answer == "an error":
            raise ServeError("not_ready", "the registry is away", status=503)
        await asyncio.sleep(30 if answer == "nothing" else 0)
        return 2 if answer == "a newer one" else 1

    async def close(code: int) -> None:
        closed.append(code)

    desk, connection = SimpleNamespace(generation=generation), SimpleNamespace(close=close)
    said: list[int] = []
    front = SimpleNamespace(leaving=False, desk=desk, connections=[connection])
    front.count_socket = lambda user, change: said.append(change)
    asyncio.run(asyncio.wait_for(Entrance.check_health(SimpleNamespace(front=front, generation=1)), 5))
    assert closed == ([1001] if answer == "a newer one" else []) and front.leaving == bool(closed)
    assert said == [0], "a gauge that is not said again is forgotten"


def test_the_registry_obeys_the_newest_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that restarted, which Ray gives the settings of the first."""
    from longtake.runtime.serve import ray_app

    monkeypatch.setattr(ray_app, "ray_meters", lambda metrics: silent())
    first, second = (Settings(store=tmp_path / "store", limits=Limits(user_sessions=most)) for most in (1, 5))

    async def told() -> None:
        desk = ray_app.DeskActor(first)
        old = await desk.begin_generation()
        assert await desk.register(first, "a", 1, old, {}) and desk.registry.user_sessions == 1
        new = await desk.begin_generation()
        for one in (desk, again := ray_app.DeskActor(first)):
            await one.register(first, "a", 1, old, {})
            assert await one.register(second, "b", 1, new, {})
            assert not await one.register(first, "a", 1, old, {})
            assert one.registry.user_sessions == one.jobs.front.limits.user_sessions == 5
            one.jobs.end()
        assert await ray_app.DeskActor(first).begin_generation() > new, "workers are not there yet to tell"
        assert again.registry.generation == new

    asyncio.run(told())


def test_a_command_whose_registry_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command joined its cluster, and ended all."""
    from longtake.runtime.serve import ray_app

    def none(*_: str) -> None:
        raise ValueError("no such actor")

    monkeypatch.setattr(ray_app.ray, "get_actor", none)
    monkeypatch.setattr(ray_app.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ray_app, "HEARTBEAT_S", 0.01)
    assert ray_app._until_ended(None, 1, own=True) == 0


@pytest.mark.parametrize("there", [True, False])
def test_a_cluster_that_was_killed_is_not_waited_for(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray remembers the address of the last `ray start`, also of one that is gone, and asks it for minutes."""
    from longtake.runtime.serve import ray_app

    begun: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_app.ray, "init", lambda address, **_: begun.append(address))
    with listening("127.0.0.1", 0) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        if not there:
            listener.close()
        assert ray_app._connected() is not there
        assert begun == ["auto" if there else "local"]
        monkeypatch.setenv("RAY_ADDRESS", address)
        if there:
            assert ray_app._connected() is False
        else:
            with pytest.raises(LongtakeError, match="no Ray cluster answers"):
                ray_app._connected()


def test_each_worker_asks_for_the_gpus_that_share_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake.runtime.serve import ray_app

    made: dict[str, dict[str, Any]] = {}

    def deployment(**how: Any) -> Any:
        made[how["name"]] = how
        return lambda cls: SimpleNamespace(bind=lambda *words: words)

    monkeypatch.setattr(ray_app.serve, "deployment", deployment)
    ray_app.deployed(Settings(store=tmp_path), lambda say: None, Size(gpus=2), 1)
    assert made["Maker"]["ray_actor_options"]["num_gpus"] == 2
    assert "num_gpus" not in made["Entrance"]["ray_actor_options"]


def test_a_cluster_without_a_machine_of_as_many_gpus_is_refused() -> None:
    from longtake.runtime.serve.ray_app import require_gpus

    nodes = [
        {"Alive": True, "Resources": {"GPU": 2.0}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
        {"Alive": True, "Resources": {}},
    ]
    for gpus in (0, 1, 2):
        require_gpus(gpus, nodes)
    require_gpus(1, [])  # a machine with one may come yet
    with pytest.raises(
        LongtakeError, match=r"(?s)4 GPUs are asked for each worker.*at most 2 on one machine.*fewer --gpus"
    ):
        require_gpus(4, nodes)


@pytest.mark.parametrize(
    "words, said",
    [(("--gpus", "3"), "3 GPUs cannot share the heads of tiny evenly"),
     (("--gpus", "2", "--backend", "fused"), "backend fused runs on one GPU"),
     (("--gpus", "2", "--decode-device", "cuda:1"), "share its VAE, too")],
)  # fmt: skip
def test_what_every_worker_would_refuse_is_refused_before_ray_begins(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longtake.runtime.serve import ray_app

    monkeypatch.setattr(ray_app, "serve_ray", lambda *_: pytest.fail("it was deployed"))
    assert main(["serve", "--ray", "--store", str(tmp_path), *words]) != 0
    assert said in capsys.readouterr().err


def test_a_worker_whose_ranks_are_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the process, as if it was killed: then its sessions move and Serve puts another one in its place."""
    from longtake.runtime.serve import ray_app

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(ray_app.os, "_exit", end)
    backend = SimpleNamespace(failure=None)
    worker: Any = SimpleNamespace(name="one", generator=SimpleNamespace(backend=backend))
    ray_app._end_if_failed(worker)
    backend.failure = LongtakeError("the 2 ranks that share this video have lost each other")
    with pytest.raises(SystemExit):
        ray_app._end_if_failed(worker)


@pytest.mark.slow
def test_a_worker_of_two_ranks_makes_videos_and_a_lost_rank_loses_nothing(tmp_path: Path) -> None:
    """Over gloo, on the CPU. The rank that is killed ends its worker; another one, with ranks of its own, goes on."""
    process = Process(tmp_path / "store", "ranks", "ray", log=tmp_path / "log")
    try:
        killed: list[int] = []

        def kill() -> None:
            (worker,) = process.children(WORKER)
            (rank,) = children(worker)
            killed.append(rank)
            os.kill(rank, signal.SIGKILL)

        (viewer,) = watched([Viewer(process.host, 1, chunks=4)], kill)
        assert killed and sorted(viewer.seen) == list(range(4))
    finally:
        assert process.kill(signal.SIGTERM) == 0


@pytest.mark.slow
def test_killed_workers_lose_nothing(process: Process, start: Any) -> None:
    def kill() -> None:
        for _ in range(2):
            os.kill(random.Random(1).choice(process.children(WORKER)), signal.SIGKILL)
            time.sleep(3)

    viewers = watched([Viewer(process.host, seed) for seed in (1, 2, 3, 4)], kill)
    check(start, viewers)
    assert sum(viewer.moved for viewer in viewers)  # sockets are not counted: on a busy machine Ray's proxy drops some
    moved = httpx.get(f"{process.url}/health", timeout=30)
    assert moved.status_code == 200


@pytest.mark.slow
def test_a_killed_registry_and_a_killed_front_lose_nothing(process: Process, start: Any) -> None:
    job = httpx.post(f"{process.url}/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "12"}, timeout=30).json()

    def kill() -> None:
        os.kill(process.children(REGISTRY)[0], signal.SIGKILL)
        time.sleep(4)
        os.kill(process.children(FRONT)[0], signal.SIGKILL)

    check(start, watched([Viewer(process.host, seed) for seed in (5, 6)], kill))
    until, status = time.monotonic() + 200, {}
    while status.get("status") != "completed" and time.monotonic() < until:
        status = httpx.get(f"{process.url}/v1/videos/{job['id']}", timeout=30).json()
        time.sleep(0.5)
    film = httpx.get(f"{process.url}/v1/videos/{job['id']}/content", timeout=60).content
    server = start()
    whole = server.post("/v1/videos", json={"prompt": PROMPT, "seed": 9, "seconds": "12"}).json()
    server.wait_for(whole["id"])
    assert film == server.get(f"/v1/videos/{whole['id']}/content").content


@pytest.mark.long
def test_twelve_kills(process: Process, start: Any, figures: dict[str, Any]) -> None:
    chance = random.Random(2)
    titles = [WORKER] * 10 + [REGISTRY, FRONT]
    chance.shuffle(titles)
    viewers = [Viewer(process.host, seed, chunks=60, pause_s=1.0) for seed in (11, 12, 13, 14)]
    running = []

    def kill() -> None:
        for title in titles:
            while not (found := process.children(title)):
                time.sleep(0.1)
            running.append(sum(not viewer.done for viewer in viewers))
            os.kill(chance.choice(found), signal.SIGKILL)
            time.sleep(chance.uniform(2, 5))

    watched(viewers, kill)
    check(start, viewers)
    assert all(running), "a kill after the last film's end shows nothing"
    figures |= {
        "killed": {"workers": titles.count(WORKER), "registry": 1, "front": 1},
        "sessions_then_running": running,
    }
    figures |= {"chunks": [viewer.chunks for viewer in viewers], "changes": [len(viewer.asked) for viewer in viewers]}
    figures |= {"sockets": [viewer.sockets for viewer in viewers], "byte_identical": len(viewers)}
    figures |= {"handshakes_refused": [viewer.refused for viewer in viewers]}
