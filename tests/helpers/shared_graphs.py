"""Graphs that were traced once, by whichever of the processes that share a test run came first."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import onnx
import pytest
from run_folder import run_folder

from longtake.export.package import GraphKey, PlainGraphs
from longtake.files import atomic_path
from longtake.formats.recipe import Recipe
from longtake.leftovers import locked
from longtake.training.models.presets import TINY, Preset


class SharedGraphs(PlainGraphs):
    """PlainGraphs whose tracing, seconds a network, is shared by tests of all files. The VAE's graphs know no DiT."""

    def __init__(self, preset: Preset, factory: pytest.TempPathFactory) -> None:
        super().__init__(preset)
        self._folder = run_folder(factory, "graphs")

    def _traced(self, key: GraphKey, recipe: Recipe) -> onnx.ModelProto:
        preset = replace(self.preset, dit=TINY.dit) if key[0].startswith("vae") else self.preset
        path = self._folder / hashlib.sha256(repr((key, preset)).encode()).hexdigest()[:16] / "graph.onnx"
        with locked(path.parent):
            if not path.exists():
                with atomic_path(path) as temporary:
                    temporary.write_bytes(super()._traced(key, recipe).SerializeToString())
        return onnx.ModelProto.FromString(path.read_bytes())
