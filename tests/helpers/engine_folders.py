"""Folders like those that `longtake engines` leaves, with bytes of noise for plans, and how a GPU backend opens them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch

from longtake.files import read_json
from longtake.formats import bundle as bundle_module
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.plan import PlanManifest, plugin_identities
from longtake.formats.recipe import recipe_named
from longtake.machine.flavour import Flavour
from longtake.runtime.backends.trt import backend
from longtake.runtime.backends.trt.engine import ReadPlan
from longtake.runtime.backends.trt.networks import verified_plans
from longtake.training.models.families import family_of

RECIPE = recipe_named("tiny_nvfp4_sm120")
RTX = Flavour("tensorrt_rtx", "1.7.1.116", None, "test", "13")


def build(folder: Path, seed: int) -> Path:
    """A folder of engines, and the export beside it."""
    folder.mkdir(parents=True)
    onnx = folder.parent / "onnx"
    onnx.mkdir(exist_ok=True)
    Export(RECIPE.onnx_name, "tiny", "nvfp4", "nvfp4", {}, ("red", "blue")).write(onnx)
    family, plans, ops = family_of(RECIPE.model), [], ["sink_attention_nvfp4"]
    for i, name in enumerate(family.networks(RECIPE.model)):
        content = random.Random(f"{seed} {name}").randbytes(20_000)
        plan = folder / f"{name}.plan"
        plan.write_bytes(content)
        spec = json.loads(json.dumps(family.spec(RECIPE.model, RECIPE, name).as_json()))
        PlanManifest(
            plan.name, name, hashlib.sha256(content).hexdigest(), len(content), f"{seed}" * 64, RTX.name, RTX.version,
            "12.0", plugin_identities(ops if name == "dit" else []), spec, RECIPE.name, "tiny", i, 1.0, None, RTX.cuda,
        ).write(plan)  # fmt: skip
        plans.append(plan)
    Bundle.of(folder, RECIPE, RTX, onnx, plans).write()
    return folder


class _Deserialises(Exception):
    """A backend has come to where it would."""


def opened(folder: Path) -> int:
    """Open it with the GPU backend, which ends where it would deserialise: the number of plans that it has looked at."""
    found: list[str] = []

    def looked(*given: Any) -> dict[str, ReadPlan]:
        plans = verified_plans(*given)
        found.extend(plans)
        return plans

    stand_ins = {"MemoryLog": Mock(), "StreamLock": Mock(), "compute_capability_of": lambda device: "12.0"}
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.multiple(backend, verified_plans=looked, **stand_ins),
        patch.object(backend.TrtBackend, "_load", side_effect=_Deserialises),
        contextlib.suppress(_Deserialises),
    ):
        backend.TrtBackend(Bundle.read(folder), RTX, torch.device("cuda"), "a test")
    return len(found)


def reseal(folder: Path, **changes: Any) -> None:
    """Write bundle.json anew, with the right digest of itself and of all that lies there."""
    told = read_json(folder / "bundle.json") | changes
    names = [path.name for path in sorted(folder.iterdir()) if path.name != "bundle.json"]
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    bundle_module.KIND.write({**told, "files": changes.get("files", files)}, folder / "bundle.json")
