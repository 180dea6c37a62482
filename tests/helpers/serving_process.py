"""Serve the student, with "ranks" on two of them, or with "toy" a toy, with "slow_toy" one whose passes take half a minute, from a store until a signal comes: python serving_process.py STORE [toy|slow_toy|ranks] [slots=N] [user_sessions=N] [port=N]"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from serving import STUDENT, tiny
from toy_backend import ToyBackend, toy_tokenize

from longtake.runtime.generator import Generator
from longtake.runtime.serve.limits import Limits
from longtake.runtime.serve.server import Settings, Size, serve


def toy(pause_s: float = 0.0) -> Generator:
    """The toy of the session tests. pause_s: how long each pass takes beside its arithmetic."""
    backend = ToyBackend()
    backend.hook = lambda call: time.sleep(pause_s)
    return Generator(backend, toy_tokenize)


def opened_toy(say: Any) -> Generator:
    return toy(0.03)


def opened_slow_toy(say: Any) -> Generator:
    return toy(30.0)


def opened_tiny(say: Any) -> Generator:
    return tiny()


def opened_ranks(say: Any) -> Generator:
    return Generator.from_checkpoint(STUDENT, gpus=2, device="cpu")


def announce(address: str) -> None:
    print(address, flush=True)


if __name__ == "__main__":
    store, *words = sys.argv[1:]
    slots = next((int(word[6:]) for word in words if word.startswith("slots=")), 1)
    given = dict(word.split("=") for word in words if "=" in word)
    limits = Limits(user_sessions=int(given.get("user_sessions", 8)), user_jobs=16)
    settings = Settings(port=int(given.get("port", 0)), store=Path(store), slots=slots, limits=limits)
    if "ray" in words:
        from serving_process import opened_ranks, opened_tiny, opened_toy  # by the name that other processes import

        from longtake.runtime.serve.ray_app import serve_ray

        opening = opened_toy if "toy" in words else opened_ranks if "ranks" in words else opened_tiny
        workers = next((int(word[8:]) for word in words if word.startswith("workers=")), 1)
        raise SystemExit(serve_ray(settings, opening, announce, Size(workers, workers)))
    kinds = {"toy": opened_toy, "slow_toy": opened_slow_toy, "ranks": opened_ranks}
    opening = next((kinds[word] for word in words if word in kinds), opened_tiny)
    raise SystemExit(serve(settings, opening, announce))
