"""The reference backend: ONNX Runtime on the CPU runs the view of each exported file. The accuracy oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.accuracy.ort_session import session_from_view
from longtake.formats.exported import Export
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Recipe
from longtake.plugins.registry import conv_ops
from longtake.plugins.spec import DOMAIN
from longtake.runtime.backends.host import HostBackend
from longtake.training.models.presets import Preset


class ReferenceBackend(HostBackend):
    """Runs the <network>.ort.onnx of an export. Activations and an unquantized cache are fp32 there."""

    name = "reference"

    def __init__(self, folder: Path, recipe: Recipe, reason: str = "asked for", preset: Preset | None = None,
                 checkpoints: Path | None = None, runs: bool = True, export: Export | None = None) -> None:  # fmt: skip
        """Verify and open the exported networks in `folder`; `preset` overrides the recipe's (tests use smaller ones).

        Args:
            checkpoints: where the VAE encoder and the text encoder come from if they were not exported.
            runs: False: verify the files, but open them only if they are called after all.
            export: what was read of `folder`, if it was.

        Raises:
            LongtakeError: nothing is exported there, or it is of another recipe.
            IntegrityError: a file was altered, truncated or swapped.
            UnavailableError: ONNX Runtime is not installed.
        """
        super().__init__(recipe, reason, torch.device("cpu"), preset, checkpoints)
        export = export or Export.read(folder, digests=False)
        export.verify(folder)
        export.require_recipe(recipe, folder)
        self._views = {name: folder / f"{name}.ort.onnx" for name in self.specs if name in export.networks}
        self._sessions: dict[str, Any] = {}
        if runs:
            for name in self._views:
                if not name.startswith("vae_encoder"):  # opened when a video starts from a picture or clip
                    self._session(name)

    @cached_property
    def vae_conv(self) -> Mapping[str, int]:
        """See Backend.vae_conv: of the ops in the exported graph."""
        if self.recipe.vae_ops != "library":
            return {}
        view = self._views["vae_steady"]
        nodes = read_onnx(view.with_name("vae_steady.onnx"), "none").graph.node
        return conv_ops(node.op_type for node in nodes if node.domain == DOMAIN)

    def has(self, network: str) -> bool:
        """See Backend.has."""
        return network in self._views

    def call(self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """See HostBackend.call."""
        # The exporter drops inputs that a network does not use.
        session = self._session(network)
        read = {value.name for value in session.get_inputs()}
        feeds = {name: t.contiguous().numpy() for name, t in inputs.items() if name in read}
        arrays = session.run(list(wanted), feeds)
        return {name: torch.from_numpy(array) for name, array in zip(wanted, arrays, strict=True)}

    def _session(self, network: str) -> Any:
        if network not in self._sessions:
            self._sessions[network] = session_from_view(self._views[network])
        return self._sessions[network]
