"""longtake: train, export, compile and stream long multi-shot video in 4 bits.

`longtake.generate("a prompt")` makes a video; `from longtake import Generator` is the door to more. Names are looked up when they are asked for: `import longtake` loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longtake.version import __version__

if TYPE_CHECKING:
    from longtake.errors import GateError, IntegrityError, LongtakeError, UnavailableError
    from longtake.pretrained import Generator, Video, generate
    from longtake.runtime.chunk import Chunk
    from longtake.runtime.sampling import CancelledError, Step
    from longtake.runtime.session import Session
    from longtake.runtime.session_options import Sampling
    from longtake.runtime.story import Segment, Story, story_from_file

__all__ = [
    "CancelledError",
    "Chunk",
    "GateError",
    "Generator",
    "IntegrityError",
    "LongtakeError",
    "Sampling",
    "Segment",
    "Session",
    "Step",
    "Story",
    "UnavailableError",
    "Video",
    "__version__",
    "generate",
    "story_from_file",
]

HOMES = {
    "errors": ("GateError", "IntegrityError", "LongtakeError", "UnavailableError"),
    "pretrained": ("Generator", "Video", "generate"),
    "runtime.chunk": ("Chunk",),
    "runtime.sampling": ("CancelledError", "Step"),
    "runtime.session": ("Session",),
    "runtime.session_options": ("Sampling",),
    "runtime.story": ("Segment", "Story", "story_from_file"),
}


def __getattr__(name: str) -> Any:
    """A public name, its module imported now."""
    for home, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"longtake.{home}"), name)
    raise AttributeError(f"module 'longtake' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
