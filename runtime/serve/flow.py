"""How far ahead of what is shown a session may be made: windows, and a clock that stands in for a viewer who says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from longtake.errors import LongtakeError

MODES = ("ack", "realtime", "free")
DEFAULT_WINDOW = 2


@dataclass(frozen=True)
class Flow:
    """mode "ack": the viewer says what is shown; "realtime": as if it did so at the media's pace; "free": no limit."""

    mode: str = "ack"
    window: int = DEFAULT_WINDOW

    @property
    def ahead(self) -> int | None:
        """Chunks that may be begun beyond the one shown; None: any number."""
        return None if self.mode == "free" else self.window


def flow_for(mode: str | None, window: int | None, most: int, endless: bool) -> Flow:
    """What was asked for, or the default: free for a bounded length, so that a client that never acknowledges works.

    Raises:
        LongtakeError: no such mode, a window out of bounds, or an endless session without flow control.
    """
    if mode is None:
        mode = "ack" if endless else "free"
        if endless:
            fix = 'pass "flow": {"mode": "ack"}, and acknowledge what is shown'
            raise LongtakeError(
                "an endless session needs flow control", got="no flow", expected="ack | realtime", fix=fix
            )
    if mode not in MODES:
        raise LongtakeError("unknown flow mode", got=mode, expected=" | ".join(MODES), fix='pass "ack"')
    if mode == "free" and endless:
        raise LongtakeError(
            "an endless session needs flow control", got=mode, expected="ack | realtime", fix='pass "ack"'
        )
    window = DEFAULT_WINDOW if window is None else window
    if not 1 <= window <= most:
        raise LongtakeError("bad window", got=window, expected=f"1 to {most}", fix=f"pass {DEFAULT_WINDOW}")
    return Flow(mode, window)


@dataclass
class MediaClock:
    """Which chunk a player that never pauses shows now; it waits for chunks that are not there yet."""

    fps: int
    now: Callable[[], float]
    frames: list[int] = field(default_factory=list)
    started: float | None = None

    def arrived(self, frames: int) -> None:
        """The next chunk is with the viewer."""
        at = self.now()
        played = self._played(at)
        if self.started is None or played >= sum(self.frames):
            self.started = at - sum(self.frames) / self.fps  # it begins now, or went on waiting until now
        self.frames.append(frames)

    def _played(self, at: float) -> float:
        return 0.0 if self.started is None else (at - self.started) * self.fps

    def shown(self) -> int:
        """Index of the chunk on the screen; -1 before the first."""
        played, end = self._played(self.now()), 0
        for index, frames in enumerate(self.frames):
            end += frames
            if played < end:
                return index
        return len(self.frames) - 1


@dataclass
class Rate:
    """A bucket that fills by `per_second` up to `burst`: how many messages a socket may send."""

    per_second: float
    burst: int
    now: Callable[[], float]
    left: float = -1.0
    last: float = 0.0

    def allows(self) -> bool:
        """Take one; False if there is none."""
        at = self.now()
        full = self.left < 0
        self.left = float(self.burst) if full else min(self.burst, self.left + (at - self.last) * self.per_second)
        self.last = at
        if self.left < 1:
            return False
        self.left -= 1
        return True
