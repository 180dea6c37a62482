"""The reference backend: ONNX Runtime on the CPU runs the view of each exported file. The accuracy oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.engines.recipe import Recipe
from longtake.engines.spec import NETWORKS
from longtake.export.package import load_index, require_recipe
from longtake.runtime.backends.host import HostBackend
from longtake.runtime.errors import IntegrityError, UnavailableError
from longtake.runtime.settings import settings_from_environment
from longtake.training.presets import Preset


class ReferenceBackend(HostBackend):
    """Runs export/build/<name>/<network>.ort.onnx. Activations and an unquantized cache are fp32 there."""

    name = "reference"

    def __init__(self, folder: Path, recipe: Recipe, reason: str = "asked for", preset: Preset | None = None,
                 checkpoints: Path | None = None) -> None:  # fmt: skip
        """Verify and open the exported networks in `folder`; `preset` overrides the recipe's (tests use smaller ones).

        `checkpoints`: where the VAE encoder and the text encoder come from if they were not exported.

        Raises:
            LongtakeError: nothing is exported there, or it is of another recipe.
            IntegrityError: a file was altered, truncated or swapped.
            UnavailableError: ONNX Runtime is not installed.
        """
        super().__init__(recipe, reason, torch.device("cpu"), preset, checkpoints)
        index = load_index(folder)
        require_recipe(index, folder, recipe)
        threads = settings_from_environment().threads
        names = [name for name in NETWORKS if name in index["networks"]]
        self._sessions = {name: _open(folder / f"{name}.ort.onnx", threads) for name in names}
        self._read = {name: {i.name for i in session.get_inputs()} for name, session in self._sessions.items()}

    def has(self, network: str) -> bool:
        """See HostBackend.has."""
        return network in self._sessions

    def call(
        self, network: str, inputs: Mapping[str, Tensor], wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """See HostBackend.call."""
        # The exporter drops inputs that a network does not use.
        feeds = {name: t.contiguous().numpy() for name, t in inputs.items() if name in self._read[network]}
        names = [binding.name for binding in self.specs[network].outputs] if wanted is None else list(wanted)
        arrays = self._sessions[network].run(names, feeds)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def _open(path: Path, threads: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """An ONNX Runtime session on the CPU with `threads` threads."""
    try:
        import onnxruntime
    except ImportError:
        raise UnavailableError("ONNX Runtime is not installed", fix="pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own types, without a common public base
        raise IntegrityError(
            f"ONNX Runtime cannot open {path}", got=f"{type(error).__name__}: {str(error)[:300]}",
            expected="a file written by `longtake export`", fix="run `longtake export --force`",
        ) from None  # fmt: skip
