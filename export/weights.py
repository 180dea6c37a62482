"""Where the content of a graph's weights comes from: checkpoints, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto
from safetensors import safe_open
from torch import Tensor

from longtake.dtypes import BY_ONNX
from longtake.errors import IntegrityError
from longtake.export.files import is_reference
from longtake.export.lower import packed_weight
from longtake.export.lower_conv8 import ConvCodes
from longtake.plugins.nvfp4.weight_format import UNRECORDED, WeightFormats
from longtake.training.models.checkpoint import require_digest
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.families import family_of
from longtake.training.models.load import calibrated_convs, read_side
from longtake.training.models.presets import Preset
from longtake.training.models.wan.linears import Amax

NO_CODES = ConvCodes()  # every convolution in bf16
SAME_PRESET = "use a checkpoint of the same preset"
COPY_AGAIN = "copy the file again together with its .json, or make it again"
CHECKPOINTS = {
    **dict.fromkeys(("vae_encoder_first", "vae_encoder_steady", "vae_first", "vae_steady"), "vae"),
    **{"text_encoder": "text_encoder", "context": "dit", "camera": "dit", "dit": "dit"},
}


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for and kept by nobody here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:  # anew: an open file's pages stay mapped, all that were read
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Weights:
    """Everything an export takes from checkpoints. tensors: checkpoint ("dit", "vae", ...) -> state dict."""

    preset: Preset
    tensors: Mapping[str, Mapping[str, Tensor]]
    amax: Amax = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()
    formats: WeightFormats = UNRECORDED
    convs: ConvCalibration | None = None

    def of(self, network: str) -> Mapping[str, Tensor]:
        """The state dict that network `network` takes its weights from."""
        return self.tensors[CHECKPOINTS[network]]


def weights_from_folder(preset: Preset, folder: Path) -> Weights:
    """The checkpoints in `folder` that `preset`'s networks need, digests verified, none of them loaded.

    Raises:
        LongtakeError: a file is missing.
        IntegrityError: one is damaged, altered, or of another preset.
    """
    kinds = list(dict.fromkeys(CHECKPOINTS[name] for name in family_of(preset).networks(preset)))
    sides = {kind: read_side(folder / f"{kind}.safetensors", kind, preset) for kind in kinds}
    for kind, side in sides.items():
        require_digest(folder / f"{kind}.safetensors", side, COPY_AGAIN)
    tensors = {kind: LazyTensors(folder / f"{kind}.safetensors") for kind in kinds}
    words = sides["text_encoder"].vocabulary or () if "text_encoder" in sides else ()
    convs = calibrated_convs(sides["vae"], preset) if "vae" in sides else None
    return Weights(preset, tensors, sides["dit"].amax, words, sides["dit"].formats, convs)


def stored_tensors(
    model: onnx.ModelProto,
    weights: Mapping[str, Tensor],
    precision: str,
    linears: Collection[str],
    amax: Amax,
    formats: WeightFormats = UNRECORDED,
    convs: ConvCodes = NO_CODES,
) -> Iterator[tuple[str, Tensor]]:
    """(initializer, content) for every reference of `model`: the weights of `linears` packed, those of `convs` as codes, the
    rest as they are.

    Raises:
        IntegrityError: a weight is missing or of another shape.
    """
    packed = {f"{name}.weight" for name in linears}
    references = [
        tensor for tensor in model.graph.initializer if is_reference(tensor)
    ]  # now: writing gives them places
    coded = [name for name in convs.chosen if any(t.name == f"{name}.weight.codes" for t in references)]
    made = packed | {f"{name}.weight" for name in coded}
    plain = [tensor for tensor in references if tensor.name.rpartition(".")[0] not in made]

    def content() -> Iterator[tuple[str, Tensor]]:
        for name in linears:
            weight = _checked(weights, f"{name}.weight")
            yield from packed_weight(precision, name, weight, amax, formats.of(name)).items()
        for name in coded:
            yield from convs.content(name, _checked(weights, f"{name}.weight")).items()
        for tensor in plain:
            yield tensor.name, _plain(weights, tensor)

    return content()


def _plain(weights: Mapping[str, Tensor], tensor: TensorProto) -> Tensor:
    value = _checked(weights, tensor.name)
    if tuple(value.shape) != tuple(tensor.dims):
        what = f"weight {tensor.name} has another shape than the graph"
        raise IntegrityError(what, got=list(value.shape), expected=list(tensor.dims), fix=SAME_PRESET)
    return value.to(BY_ONNX[tensor.data_type].torch)


def _checked(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        what, expected = f"the checkpoint lacks {name}", "the tensors of the preset's model"
        raise IntegrityError(what, got=f"{len(weights)} tensors", expected=expected, fix=SAME_PRESET)
    return weights[name]
