"""`serve --ray` on a cluster that is there already: a redeploy with sessions running, a node's metrics, a port that is taken."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Process
from viewers import Viewer, check, watched

from longtake.runtime.serve.meters import COUNTERS, GAUGES, HISTOGRAMS
from longtake.runtime.serve.server import free_port, listening

pytest.importorskip("ray", reason="Ray is not installed: pip install 'longtake[scale]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def metrics_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A cluster of `ray start`; the port on which its node exports metrics."""
    program, port = Path(sys.executable).with_name("ray"), free_port("127.0.0.1", 6400)
    subprocess.run([program, "get-auth-token", "--generate"], check=True, capture_output=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    metrics = free_port("127.0.0.1", port + 1)
    words = ["start", "--head", "--block", f"--port={port}", f"--metrics-export-port={metrics}", "--num-cpus=4"]
    words += ["--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    head = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while subprocess.run([program, "health-check", f"--address=127.0.0.1:{port}"], capture_output=True).returncode:
        assert head.poll() is None
    yield metrics
    head.terminate()
    head.wait(60)


@pytest.fixture
def deployed(metrics_port: int, tmp_path: Path) -> Iterator[Callable[[int], Process]]:
    """Serves at a port of that cluster; what is not at its end then is killed."""
    made: list[Process] = []

    def begin(port: int) -> Process:
        options = ("toy", "ray", "workers=2", "slots=2", f"port={port}")
        made.append(Process(tmp_path / "store", *options, log=tmp_path / "log"))
        return made[-1]

    yield begin
    for one in made:
        if one.process.poll() is None:
            one.kill()


def test_a_redeploy_moves_every_session(metrics_port: int, start: Any, deployed: Callable[[int], Process]) -> None:
    first = deployed(free_port("127.0.0.1", 8300))
    viewers = [Viewer(first.host, seed, chunks=40, pause_s=0.5) for seed in (1, 2, 3)]
    answers, over, later = Counter[int | str](), threading.Event(), list[Process]()

    def ask() -> None:
        while not over.wait(0.1):
            try:
                answers[httpx.get(f"{first.url}/v1/models", timeout=300).status_code] += 1
            except httpx.HTTPError as error:
                answers[repr(error)] += 1

    def redeploy() -> None:
        later.append(deployed(int(first.host.rpartition(":")[2])))
        assert first.process.wait(60) == 0

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        watched(viewers, redeploy)
    finally:
        over.set()
        asking.join()
    check(start, viewers)
    assert set(answers) <= {200, 503} and answers[200] > 10, answers
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30).text
    there = set(re.findall(r"^ray_longtake_(\w+?)(?:_total|_bucket|_sum|_count)?{", text, re.M))
    assert {"chunk_seconds", "first_chunk_seconds", "frames_generated", "worker_info"} <= there
    assert there <= {*COUNTERS, *GAUGES, *HISTOGRAMS}
    assert later[0].kill(signal.SIGTERM) == 0


def test_a_port_that_is_taken_is_said_before_anything_is_deployed(
    deployed: Callable[[int], Process], tmp_path: Path
) -> None:
    with listening("127.0.0.1", free_port("127.0.0.1", 8400)) as taken:
        with pytest.raises(AssertionError, match="did not start"):
            deployed(taken.getsockname()[1])
    assert "is taken" in (tmp_path / "log").read_text()
