"""A whole file of every kind that is read, and what reads it: what fuzzing begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from engine_folders import build
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from longtake.checked_yaml import read_yaml
from longtake.commands.describe import describe
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.onnx_file import constants_of, read_onnx, readable, weights_from_onnx
from longtake.formats.plan import PlanManifest
from longtake.formats.recipe import RECIPES, recipe_from_file, recipe_named
from longtake.formats.segmented_graph import Segment as Cut
from longtake.formats.segmented_graph import SegmentedGraph, Step, TensorType
from longtake.runtime import clip
from longtake.runtime.camera_files import poses_from
from longtake.runtime.snapshot import Identity, Snapshot, snapshot_from_file, snapshot_to_file
from longtake.runtime.state import Edit, Position
from longtake.runtime.story import Segment, story_from_file
from longtake.training.data.captions import rows_of_table
from longtake.training.models.checkpoint import load_into, save_checkpoint, side_file
from longtake.training.models.families import preset_named
from longtake.training.models.presets import TINY
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.slots import SlotTable

Load = Callable[[Path], object]
STORY = """
name: a story
seed: 7
steps: 4
shots:
  - prompt: a green seven drifts left over a dark blue background, soft light
    chunks: 2
    changes: [{after: 1, prompt: a red two}]
  - prompt: a yellow six
    chunks: 3
"""


def seeds(folder: Path) -> dict[str, tuple[Path, Load]]:
    """By kind: a whole file in `folder`, and its reader, which takes it; a file that it needs beside lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Path, Load]] = {
        "story": (_written(folder / "story.yaml", STORY), story_from_file),
        "recipe": (_written(folder / "recipe.yaml", (RECIPES / "tiny_nvfp4_sm120.yaml").read_text()), recipe_from_file),
        "run file": (
            _written(folder / "run.yaml", "stage: dit\nsteps: 100\nlr: 1e-4\nout: runs/a\n"),
            lambda path: read_yaml(path, "run file", "key: value lines", "see docs"),
        ),
    }
    np.save(folder / "poses.npy", np.tile(np.eye(4), (8, 1, 1)))
    found["camera"] = folder / "poses.npy", poses_from
    found["table"] = (
        _written(folder / "clips.csv", 'file_name,caption\na.mp4,"a red, two"\nb.mp4,a six\n'),
        rows_of_table,
    )
    preset = next(iter(sorted((RECIPES.parents[1]).glob("**/presets/*.yaml"))), None)
    if preset is not None:
        found["preset"] = (
            _written(folder / "preset.yaml", preset.read_text()),
            lambda path: preset_named(path.name, path.parent),
        )
    engines = build(folder / "made" / "engines", 1)
    found["bundle"] = (engines / "bundle.json", lambda path: _as(path, "bundle.json", lambda p: Bundle.read(p.parent)))
    found["export"] = (
        engines.parent / "onnx" / "export.json",
        lambda path: _as(path, "export.json", lambda p: Export.read(p.parent)),
    )
    found["manifest"] = (
        engines / "dit.plan.json",
        lambda path: _as(path, "dit.plan.json", lambda p: PlanManifest.read(p.with_name("dit.plan"))),
    )
    found |= {
        "segments": _segments(folder),
        "onnx": _onnx(folder),
        "session": _session(folder),
        "latents": _latents(folder),
    }
    return found | _checkpoint(folder)


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _as(path: Path, name: str, load: Load) -> object:
    """Read `path` under the name that its kind has, and describe it, too."""
    target = path.with_name(name)
    path.replace(target)
    try:
        return load(target), describe(target)
    finally:
        target.unlink()


def _segments(folder: Path) -> tuple[Path, Load]:
    kind = TensorType("bf16", (1, "W", 4))
    graph = SegmentedGraph("dit", ("a",), ("b",), ("w",), {"a": kind, "b": kind, "w": kind},
                           (Cut("dit_seg0", ("a", "w"), ("b",), {"a": kind, "w": kind, "b": kind}),),
                           (Step("segment", "dit_seg0", ("a", "w"), ("b",)),))  # fmt: skip
    graph.write(folder / "dit.segments.json")
    return folder / "dit.segments.json", SegmentedGraph.read


def _onnx(folder: Path) -> tuple[Path, Load]:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    (folder / "altered.onnx.data").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "altered.onnx.data"), ("offset", "0"), ("length", str(64 * 64 * 4))):
        weight.external_data.add(key=key, value=value)
    small = numpy_helper.from_array(np.ones(4, np.float32), "s")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy")
    nodes = [helper.make_node("Constant", [], ["c"], value=small), helper.make_node("MatMul", ["x", "w"], ["y"]),
             helper.make_node("DequantizeLinear", ["w", "s"], ["q"])]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [x], [y], [weight, numpy_helper.from_array(np.ones(4, np.float32), "s2")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "a.onnx")

    def load(path: Path) -> object:
        if not path.with_name("altered.onnx.data").exists():
            path.with_name("altered.onnx.data").write_bytes(b"\0" * 64 * 64 * 4)
        model = read_onnx(path, "all")
        with readable(path):
            names = set(constants_of(model))
        return list(weights_from_onnx(path, names)), describe(path)

    return folder / "a.onnx", load


def _session(folder: Path) -> tuple[Path, Load]:
    recipe = recipe_named("tiny_nvfp4_sm120")
    identity = Identity(preset="tiny", model=recipe.onnx_name, cache="nvfp4", seed=0, steps=1, guidance=1.0,
                        negative_prompt="", shift=5.0)  # fmt: skip
    position = Position((Segment("a", 2),), SlotTable(4, (0, 1), (0, 1), 0, 2), 2, 0, "a", (Edit(3, "b", False),))
    tensors = {"positive.k_0": torch.zeros(4, 8), "decoder.0": torch.zeros(3), "decoder.1": torch.ones(2)}
    snapshot_to_file(Snapshot(identity, position, tensors), folder / "s.safetensors")

    def load(path: Path) -> object:
        snapshot = snapshot_from_file(path)
        return asdict(snapshot.identity), snapshot.decoder_tensors(), snapshot.position.as_json()

    return folder / "s.safetensors", load


def latents_from_file(path: Path) -> torch.Tensor:
    """As `--continue-from` reads a file of latents."""
    return clip._checked(path, *clip._latents_in(path), TINY)


def _latents(folder: Path) -> tuple[Path, Load]:
    shape = (1, 8, TINY.vae.z_channels, *TINY.latent_hw)
    save_file({"latents": torch.zeros(shape, dtype=torch.bfloat16)}, folder / "latents.safetensors")
    return folder / "latents.safetensors", latents_from_file


def _checkpoint(folder: Path) -> dict[str, tuple[Path, Load]]:
    module, path = torch.nn.Linear(4, 3), folder / "made" / "dit.safetensors"
    side = SideFile("dit", "tiny", step=3, steps=9, amax={"l": {"input": 1.0}}, vocabulary=("a", "b"),
                    sampling={"steps": 4, "guidance": 1.0}, settings={"lr": 1e-4}, facts={"data": "digits"})  # fmt: skip
    save_checkpoint(path, module.state_dict(), side)

    def tensors(altered: Path) -> object:
        """The side file says the altered file's digest, so that it is read at all."""
        save_checkpoint(altered.with_name("other.safetensors"), module.state_dict(), side)
        from longtake.files import sha256, write_json

        told = {**_json(side_file(path)), "sha256": sha256(altered)}
        write_json(side_file(altered), told)
        return load_into(torch.nn.Linear(4, 3), altered, kind="dit", preset="tiny"), describe(altered)

    def described(altered: Path) -> object:
        return SideFile.read(altered).sampled, SideFile.read(altered).formats

    return {"checkpoint": (path, tensors), "side file": (side_file(path), described)}


def _json(path: Path) -> dict[str, object]:
    from longtake.files import read_json

    return dict(read_json(path))
