"""On one Hopper GPU: the 5B recipe on random weights behind the server, against `bench`. Not run without one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_here import engines_of
from serving import PROMPT, Served

from longtake.commands.main import main
from longtake.runtime.bench.engine_side import open_engines
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.timed_backend import TimedBackend
from longtake.runtime.generator import Generator
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings

RECIPE = "wan2.2-ti2v-5b_fp8_sm90"
pytestmark = [pytest.mark.gpu, pytest.mark.long]


def random_5b() -> Generator:
    """What `bench` runs: the recipe's plans, random weights and embeddings."""
    backend = TimedBackend(open_engines(BenchOptions(recipe=RECIPE)))
    return Generator(backend, lambda texts, length: torch.ones(len(texts), length, dtype=torch.int32))


def test_the_socket_costs_nothing(tmp_path: Path) -> None:
    """Frames a second through the socket within 3 % of `bench`'s end to end; a change lands within window + 1 chunks."""
    assert main(["bench", "--recipe", RECIPE, "--out", str(tmp_path / "bench")]) == 0
    report = json.loads((tmp_path / "bench" / "bench.json").read_text())
    server = Served(random_5b, tmp_path / "store", Settings(store=tmp_path / "store"))
    sampled = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 3}
    live = server.live(prompt=PROMPT, chunks=24, flow={"mode": "ack", "window": 3}, **sampled)
    live.chunk(0, ack=True)  # opening took its time
    live.chunk(7, ack=True)  # the window is full
    begun, first = time.monotonic(), 7
    seen = max(live.media)
    at = live.interact("e", prompt="night", cut=True)["at_chunk"]
    live.until("session.done", ack=True)
    fps = chunk_frames(report) * (23 - first) / (live.begun + live.at[23] - begun)
    stages = [m["ms"] for m in live.messages if m["type"] == "video.chunk_metadata"]
    encode = [ms["encode"] for ms in stages]
    gaps = [round(live.at[index] - live.at[index - 1], 2) for index in range(first + 1, 24)]
    told = {"socket": fps, "bench": report["fps"]["end_to_end"], "asked_at": seen, "lands_at": at}
    print(json.dumps({**told, "gaps_s": gaps, "ms": stages[first:]}))
    assert at - seen <= 4
    assert fps > 0.97 * told["bench"]
    assert max(encode[2:]) < 1e3 * chunk_frames(report) / told["bench"]  # behind the decoder, not in the way
    server.end()


def chunk_frames(report: dict[str, Any]) -> int:
    """Of a steady chunk."""
    return int(4 * report["chunk_latents"])


def test_two_tiny_sessions_equal_each_alone(tmp_path: Path) -> None:
    settings = Settings(store=tmp_path, slots=2, limits=Limits(user_sessions=2))
    engines = engines_of("tiny_w4a16_sm90")  # building takes longer than a server is waited for
    server = Served(lambda: Generator.from_engines(engines), tmp_path, settings)

    def film(live: Any) -> bytes:
        live.until("session.done")
        return bytes(live.bytes())

    alone = [film(server.live(prompt=PROMPT, chunks=6, seed=seed)) for seed in (1, 2)]
    both = [server.live(prompt=PROMPT, chunks=6, seed=seed) for seed in (1, 2)]
    assert [film(live) for live in both] == alone
    server.end()
