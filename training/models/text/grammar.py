"""The small world that the tiny models know: the words of its captions."""

from __future__ import annotations

from longtake.training.models.wan.prompts import CUT_PREFIX

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "cyan")
MOTIONS = (
    "drifts left",
    "drifts right",
    "rises",
    "sinks",
    "circles",
    "sways",
    "stands still",
    "grows",
    "shrinks",
)
BACKGROUNDS = ("dark blue", "dark green", "dark red", "black", "grey", "sunset", "sea", "forest")
LIGHTS = ("soft light", "light from the left", "light from the right", "light from above")


def caption_words() -> list[str]:
    """Every word a prompt can hold, lower case, without punctuation, sorted."""
    parts = [*DIGITS, *COLOURS, *MOTIONS, *BACKGROUNDS, *LIGHTS, "a an over background", CUT_PREFIX.replace(".", "")]
    return sorted({word.lower() for part in parts for word in part.split()})
