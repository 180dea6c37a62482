"""Resume points: which one a run goes on from, whose it is, and what a killed run left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path
from longtake.options import DECISIVE, Text, options_of
from longtake.training.models.checkpoint import finish_save, load_checkpoint, side_file
from longtake.training.models.side_file import SideFile
from longtake.training.options import DataOptions, ModelOptions

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
RECORDS = ("loss.json", "loss.png", "report.json", "tensorboard", RUN_FILE)  # of a run, beside checkpoints
KEPT = 2  # whole resume points on disk: the newest, and the one before it
SHARED = options_of(ModelOptions, DataOptions)
DECIDES = [key for key, one in SHARED.items() if one.facts.get("resume") == DECISIVE]
LEFTOVERS = (".*.tmp.*", ".*.json.pending", ".tmp??????")  # of files.py, of checkpoint.py and of safetensors itself


def resume_points(out: Path) -> list[Path]:
    """Resume points of a folder, oldest first, whole or not."""
    return sorted(out.glob("resume-*.safetensors"))


def require_resume_point(out: Path) -> None:
    """Raise LongtakeError if there is nothing to go on from."""
    if not resume_points(out):
        raise LongtakeError(
            f"nothing to resume in {out}",
            got="no resume-*.safetensors",
            fix="drop --resume to start anew, or check --out",
        )


def newest_whole(out: Path, *, kind: str, preset: str) -> tuple[Path, dict[str, Tensor], SideFile]:
    """The newest resume point that is whole, its tensors and its side file; damaged ones are named in the log.

    Raises:
        LongtakeError: there is none; of several damaged ones it says what is wrong with the newest.
    """
    require_resume_point(out)
    first: LongtakeError | None = None
    for path in reversed(resume_points(out)):
        try:
            return path, *load_checkpoint(path, kind=kind, preset=preset)
        except LongtakeError as error:
            logger.warning("cannot resume from %s: %s", path, error.what)
            first = first or error
    assert first is not None
    raise first


def check_same_run(path: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compare the settings a resume point was saved with to those of the run that wants it.

    Raises:
        IntegrityError: it belongs to a run on other data or in another precision.
    """
    changed = {
        key: saved[key] for key in saved if key in present and _same(key, saved[key]) != _same(key, present[key])
    }
    for key in DECIDES:
        if key in changed:
            raise IntegrityError(
                f"{path} belongs to another run: its --{key.replace('_', '-')} differs",
                got=changed[key],
                expected=present[key],
                fix=f"pass --{key.replace('_', '-')} {changed[key]} to go on with that run, or another --out to start a new one",
            )
    for key, value in changed.items():
        option = "--" + key.replace("_", "-")
        logger.warning("resuming with %s %s, saved with %s: the rest is another run's", option, present[key], value)


def _same(key: str, value: Any) -> Any:
    """A value without what is a matter of writing: "1,2" and "1..2" are the same lengths."""
    text = SHARED[key].note(Text) if key in SHARED else None
    return text.read(value) if text and isinstance(value, str) else value


def set_aside(out: Path, modules: Iterable[str] = ()) -> Path | None:
    """Move an earlier run to `<out>/earlier/<n>`: its resume points, curves, reports and the checkpoints of `modules`. So
    they are neither taken for the new run's nor lost. Returns that folder, or None if there was no run."""
    points = resume_points(out)
    records = [out / name for name in RECORDS if (out / name).exists()]
    if not points and not records:
        return None
    saved = [out / f"{name}.safetensors" for name in modules]
    numbers = [int(path.name) for path in out.glob("earlier/*") if path.name.isdecimal()]
    folder = out / "earlier" / str(max(numbers, default=0) + 1)
    folder.mkdir(parents=True)
    for path in (*points, *saved):
        for part in (side_file(path), path):
            if part.is_file():
                part.rename(folder / part.name)
    for record in records:
        record.rename(folder / record.name)
    logger.warning("%s holds an earlier run, which is now in %s", out, folder)
    return folder


def leave_run_file(out: Path, told: Mapping[str, Any]) -> None:
    """Write what a run is told into its folder, so that it can be resumed without being told again."""
    if told:
        with atomic_path(out / RUN_FILE) as partial:
            partial.write_text(f"# longtake: what this run was told\n{yaml.safe_dump(dict(told), allow_unicode=True)}")


def delete_older(out: Path) -> None:
    """Keep the newest resume points, and nothing of the others."""
    for old in resume_points(out)[:-KEPT]:
        old.unlink()
        side_file(old).unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """End saves that kill -9 cut off, and delete what it left half-written. For use before anything is written."""
    for tensors in out.glob("*.safetensors"):
        finish_save(tensors)
    for pattern in LEFTOVERS:
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
    for side in out.glob("resume-*.json"):
        if not side.with_suffix(".safetensors").is_file():
            side.unlink(missing_ok=True)
