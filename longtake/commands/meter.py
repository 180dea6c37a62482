"""Shows a run's timings in a bar."""

from __future__ import annotations

import sys

from tqdm import tqdm

from longtake.runtime.chunk import Chunk
from longtake.runtime.meter import Meter


class GenerateProgress:
    """A tqdm bar over chunks, on stderr, so that output can be piped. `total` None is an endless run."""

    def __init__(self, total: int | None) -> None:
        self._bar = tqdm(total=total, unit="chunk", desc="generating", file=sys.stderr, dynamic_ncols=True)

    def update(self, chunk: Chunk, meter: Meter) -> None:
        """Show a finished chunk."""
        rate = meter.fps()["end_to_end"] or 0.0
        mark = "CUT " if chunk.cut else ""
        self._bar.set_postfix_str(f"{rate:.1f} frames/s, {mark}{shortened(chunk.prompt, 50)}")
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def shortened(text: str, length: int) -> str:
    """`text` on one line, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
