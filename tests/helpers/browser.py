"""The page in the system's own Chromium: what it shows, beside what the server tells of the same film."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from serving import Live, children_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "there is no Chromium: apt-get install --no-install-recommends chromium"
FLAGS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-dev-shm-usage"]
BUFFERED = "Array.from({length: video.buffered.length}, (_, i) => [video.buffered.start(i), video.buffered.end(i)])"


@contextlib.contextmanager
def chromium(start_s: float = 60) -> Iterator[Any]:
    """Chromium, opened. Its driver may spin for ever when it starts (seen once): it is ended after `start_s`, and tried again."""
    from playwright.sync_api import sync_playwright

    def end_driver() -> None:
        for pid in children_of(os.getpid(), "playwright/driver"):
            os.kill(pid, signal.SIGKILL)

    for left in (2, 1, 0):
        late = threading.Timer(start_s, end_driver)
        late.start()
        try:
            playwright = sync_playwright().start()
            break
        except Exception:
            if not left:
                raise
        finally:
            late.cancel()
    try:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as opened:
            yield opened
    finally:
        playwright.stop()


def until(page: Any, what: str, seconds: float = 120) -> Any:
    """Wait until an expression is true in the page. (The page's own policy forbids playwright's way.)"""
    end = time.monotonic() + seconds
    while not (found := page.evaluate(what)):
        said = page.inner_text("#state") + " " + " ".join(page.locator(".notice").all_inner_texts())
        assert time.monotonic() < end, f"{what} is not so after {seconds} s: {said}"
        time.sleep(0.05)
    return found


def shown(count: int) -> str:
    return f"document.querySelectorAll('#timeline [data-chunk][data-state=shown]').length >= {count}"


def session_of(page: Any) -> str:
    found = re.search(r"#session=([\w-]+)", page.url)
    assert found, page.url
    return found[1]


def blocks(page: Any) -> list[dict[str, Any]]:
    """What the timeline says of each chunk of the film."""
    what = """Array.from(document.querySelectorAll('#timeline [data-chunk][data-real]')).map((each) =>
        ({index: +each.dataset.chunk, shot: +each.dataset.shot, cut: 'cut' in each.dataset, prompt: each.title}))"""
    return sorted(page.evaluate(what), key=lambda each: each["index"])


def told(host: str, session: str) -> list[dict[str, Any]]:
    """The same from the server's metadata."""
    live = Live(host, type="session.resume", session_id=session, flow={"mode": "ack", "window": 1})
    live.until("session.done", ack=True)
    live.close()
    chunks = [one for one in live.messages if one["type"] == "video.chunk_metadata"]
    keys = {"index": "generation_chunk_index", "shot": "shot", "cut": "cut", "prompt": "prompt"}
    return [{name: one[key] for name, key in keys.items()} for one in chunks]
