"""The reference backend: ONNX Runtime on the CPU runs the view of each exported file. The accuracy oracle."""

from __future__ import annotations

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

    def __init__(self, folder: Path, recipe: Recipe, reason: str = "asked for", preset: Preset | None = None) -> None:
        """Verify and open the exported networks in `folder`; `preset` overrides the recipe's (tests use smaller ones).

        Raises:
            LongtakeError: nothing is exported there, or it is of another recipe.
            IntegrityError: a file was altered, truncated or swapped.
            UnavailableError: ONNX Runtime is not installed.
        """
        super().__init__(recipe, reason, torch.device("cpu"), preset)
        require_recipe(load_index(folder), folder, recipe)
        threads = settings_from_environment().threads
        self._sessions = {name: _open(folder / f"{name}.ort.onnx", threads) for name in NETWORKS}
        self._read = {name: {i.name for i in session.get_inputs()} for name, session in self._sessions.items()}

    def call(self, network: str, inputs: list[Tensor]) -> list[Tensor]:
        spec = self.specs[network]
        # The exporter drops inputs that a network does not use.
        feeds = {
            b.name: t.contiguous().numpy()
            for b, t in zip(spec.inputs, inputs, strict=True)
            if b.name in self._read[network]
        }
        wanted = [binding.name for binding in spec.outputs]
        if network == "dit" and int(inputs[5]) < 0:
            wanted = wanted[:1]  # nothing was written: leave the caches where they are
        return [torch.from_numpy(array) for array in self._sessions[network].run(wanted, feeds)]


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
