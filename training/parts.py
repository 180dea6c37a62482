"""A run in several parts: between them only weights travel, and a record of the parts goes with the checkpoint.

A part begins with the averaged weights of the one before, a new optimizer and its warm-up; data are made anew from the
part's own seed. A resume point (`--resume`) is for going on inside a part, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.options import recorded
from longtake.training.models.checkpoint import side_file
from longtake.training.models.side_file import SideFile
from longtake.training.optimizer import OptimizerConfig
from longtake.training.stages.options import StageOptions

Part = dict[str, Any]
# What makes stories what they are, and how long; the rest of what a checkpoint records may change between parts.
SAME = ("data", "chunks", "return_distance", "context", "fit", "held_out", "max_chunks_per_shot")
USUAL = {"fit": "crop"}  # what checkpoints of before an option were made with; None where nothing is said here


def parts_before(stage: str, options: StageOptions, optimizer: OptimizerConfig) -> tuple[Part, ...]:
    """The parts that --init was made in, none if this run is no continued one.

    Raises:
        LongtakeError: there is nothing to continue, it was another run's, or its batches would come again.
    """
    if not options.continued:
        return ()
    if options.init is None:
        raise LongtakeError(
            "nothing to continue",
            got="--continued without --init",
            fix="pass the folder of the part before with --init",
        )
    path = side_file(options.init / f"{stage}.safetensors")
    if not path.is_file():
        raise LongtakeError(f"nothing to continue: no {path}", fix="pass the folder of the part before with --init")
    side = SideFile.read(path)
    _require_same(path, stage, side, options)
    parts = parts_of(side, options.init)
    _require_new_seed(path, parts, options.seed)
    if optimizer.warmup < 1:
        what, got = "a continued run has a new optimizer, which needs a warm-up", "--warmup 0"
        expected, fix = "1 or more", "--warmup 200"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return parts


def parts_of(side: SideFile, folder: Path) -> tuple[Part, ...]:
    """The parts that a checkpoint was made in; one from before there was such a record is one part."""
    told = side.facts.get("parts")
    if told:
        return tuple({**part} for part in told)
    known = {key: side.facts.get(key) for key in ("seconds", "seed", "device", "command")}
    return ({"steps": side.step, "planned_steps": side.steps, **known, "from": None, "folder": folder.name},)


def new_part(side: dict[str, Any], earlier: Sequence[Part], source: dict[str, Any] | None, warmup: int) -> Part:
    """The record of a run's latest part. side: what its checkpoints share; source: folder and sha256 of --init."""
    return {
        "steps": side["step"],
        "planned_steps": side["steps"],
        **{key: side[key] for key in ("seconds", "seed", "device", "command")},
        "from": source,
        "optimizer": f"new, {warmup} steps of warm-up",
        "number": len(earlier) + 1,
    }


def source_of(stage: str, init: Path | None) -> dict[str, Any] | None:
    """Folder and digest of what a run starts from; None: random weights."""
    path = None if init is None else side_file(init / f"{stage}.safetensors")
    if path is None or not path.is_file():
        return None
    return {"folder": path.parent.name, "sha256": SideFile.read(path).sha256}


def _require_same(path: Path, stage: str, side: SideFile, options: StageOptions) -> None:
    """Raise LongtakeError unless data and lengths are those of the part before, and the precision."""
    asked = {**recorded(options, stage), "precision": options.precision}
    saved = {"precision": "bf16", **side.facts}
    if "data" not in saved:
        raise LongtakeError(
            f"nothing to continue: {path} doesn't say what it was trained on",
            fix="leave --continued out, to start a run from its weights",
        )
    for key in [key for key in (*SAME, "precision") if key in asked]:
        before = saved.get(key, USUAL.get(key))
        if before != asked[key] and not (not before and not asked[key]):
            name = key.replace("_", "-")
            raise LongtakeError(
                f"a continued run has the data and lengths of the part before, and its --{name} differs",
                got=asked[key],
                expected=f"{before}, as {path} says",
                fix=f"pass the --{name} of the part before, or leave --continued out to start another run from its weights",
            )


def _require_new_seed(path: Path, parts: Sequence[Part], seed: int) -> None:
    known = [part.get("seed") for part in parts]
    if seed in known:
        raise LongtakeError(
            "a continued run with the seed of an earlier part would draw the same stories and noise again",
            got=f"--seed {seed}",
            expected=f"another than {', '.join(map(str, known))}, as {path} says",
            fix=f"--seed {1 + max(one for one in known if one is not None)}",
        )
