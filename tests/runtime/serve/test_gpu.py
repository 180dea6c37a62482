"""On one Hopper GPU: the 5B recipe on random weights behind the server, against `bench`. Not run without one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from engines_here import engines_of
from serving import PROMPT, Served

from longtake.commands.main import main
from longtake.runtime.generator import Generator
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings

RECIPE = "wan2.2-ti2v-5b_fp8_sm90"
pytestmark = [pytest.mark.gpu, pytest.mark.long]


def test_the_socket_costs_nothing(tmp_path: Path) -> None:
    """Frames a second through the socket within 3 % of `bench`'s end to end; a change lands within window + 1 chunks."""
    report = tmp_path / "bench.json"
    assert main(["bench", "--recipe", RECIPE, "--report", str(report)]) == 0
    alone = json.loads(report.read_text())["fps"]["end_to_end"]
    server = Served(lambda: Generator.from_engines(RECIPE), tmp_path / "store", Settings(store=tmp_path / "store"))
    live = server.live(prompt=PROMPT, chunks=24, flow={"mode": "ack", "window": 3})
    live.chunk(3, ack=True)
    begun, first = time.monotonic(), 4
    at = live.interact("e", prompt="night", cut=True)["at_chunk"]
    assert at - max(live.media) <= 4
    live.until("session.done", ack=True)
    fps = 32 * (24 - first) / (time.monotonic() - begun)
    assert fps > 0.97 * alone
    encode = [m["ms"]["encode"] for m in live.messages if m["type"] == "video.chunk_metadata"]
    assert max(encode[2:]) < 1e3 * 32 / alone  # behind the decoder, not in the way
    server.end()


def test_two_tiny_sessions_equal_each_alone(tmp_path: Path) -> None:
    settings = Settings(store=tmp_path, slots=2, limits=Limits(user_sessions=2))
    server = Served(lambda: Generator.from_engines(engines_of("tiny_w4a16_sm90")), tmp_path, settings)

    def film(live: Any) -> bytes:
        live.until("session.done")
        return bytes(live.bytes())

    alone = [film(server.live(prompt=PROMPT, chunks=6, seed=seed)) for seed in (1, 2)]
    both = [server.live(prompt=PROMPT, chunks=6, seed=seed) for seed in (1, 2)]
    assert [film(live) for live in both] == alone
    server.end()
