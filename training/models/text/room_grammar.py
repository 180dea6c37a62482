"""The words of rooms' captions, which the small world's text encoder knows."""

from __future__ import annotations

PICTURES = tuple("astronaut brick clock coffee coins flower galaxies grass gravel photographer rocket temple".split())
PATTERNS = ("plain", "striped", "checked", "bricked", "mottled")
WALL_COLOURS = ("red", "green", "blue", "yellow", "white", "grey", "brown", "violet")


def room_words() -> tuple[str, ...]:
    """Every word such a caption can hold, sorted."""
    frame = "a room with walls and floor picture of box"
    return tuple(sorted({*PICTURES, *PATTERNS, *WALL_COLOURS, *frame.split()}))
