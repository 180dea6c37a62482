"""Data sets by the name that the command line knows them by."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.training.data.base import SPLITS, Dataset
from longtake.training.data.found import require_data
from longtake.training.data.returns import RETURNING
from longtake.training.models.presets import Preset

DRAWN = ("digits", RETURNING, "rooms")


def require_dataset(name: str) -> None:
    """Raise LongtakeError for what is neither a known name nor a folder, table or tar; nothing is read."""
    if name not in DRAWN:
        require_data(name)


def dataset_from_name(
    name: str | Path,
    preset: Preset,
    split: str = "train",
    max_chunks_per_shot: int = 0,
    max_bad_share: float = 1.0,
    fit: str = "crop",
    held_out: int | None = None,
    return_distance: tuple[int, ...] | None = None,
) -> Dataset:
    """The data set called "digits", "returning-digits" (see `digits.returning_story`, and
    with a return distance `returns.distant_story`) or "rooms", or clips of one's own in a folder, a
    table or a tar (see `folder.Folder` for the rest).

    Raises:
        LongtakeError: neither a known name nor a folder, or a folder without a usable clip.
    """
    from longtake.training.data.digits import Digits, random_story, returning_story
    from longtake.training.data.returns import distant_story

    if split not in SPLITS:
        raise LongtakeError("unknown split", got=split, expected=" or ".join(SPLITS))
    distant = partial(distant_story, distance=return_distance) if return_distance else returning_story
    drawn = {"digits": random_story, RETURNING: distant}
    if str(name) in drawn:
        return Digits(preset, split, drawn[str(name)])
    if str(name) == "rooms":
        from longtake.training.data.rooms.rooms import Rooms

        return Rooms(preset, split)
    from longtake.training.data.folder import Folder

    return Folder(require_data(str(name)), preset, split, max_chunks_per_shot, max_bad_share, fit, held_out)
