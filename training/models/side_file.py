"""`dit.json` beside `dit.safetensors`: what a checkpoint's tensors are, their digest, and how they came to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from longtake.files import read_json, sha256
from longtake.plugins.nvfp4.weight_format import WeightFormats, formats_from_meta
from longtake.record import Kind, record_from_json
from longtake.training.models.conv_calibration import ConvCalibration
from longtake.training.models.presets import SamplingConfig

KIND = Kind(
    "a checkpoint's side file",
    "a training, distillation or conversion",
    "copy the file again together with its .json, or train it again with `longtake train`",
)


@dataclass(frozen=True)
class SideFile:
    """What goes with a checkpoint.

    kind: of model, such as "dit". sha256: of the tensors' file. step, steps: made, and planned, of a run.
    amax: of quantized linears. vocabulary: of a text encoder of words. sampling: how the DiT is sampled.
    preset_digests: `Preset.digests`.
    nvfp4, packed: see plugins/nvfp4/weight_format.py. settings, position: of a run to be resumed.
    convs: of a VAE, what its decoder's convolutions read.
    facts: what else a stage tells of it, for people and for tests: command, data, metrics.
    """

    kind: str
    preset: str
    sha256: str = ""
    step: int | None = None
    steps: int | None = None
    amax: dict[str, dict[str, float]] = field(default_factory=dict)
    vocabulary: tuple[str, ...] | None = None
    sampling: dict[str, Any] | None = None
    nvfp4: dict[str, Any] | None = None
    packed: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    position: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    preset_digests: dict[str, str] = field(default_factory=dict)
    convs: ConvCalibration | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> SideFile:
        """From keys and values as JSON has them: those that are no field are its `facts`."""
        return record_from_json(cls, _sorted(told))

    @classmethod
    def read(cls, path: Path) -> SideFile:
        """The side file `path`; `require_digest` then says whether the tensors are those it describes.

        Raises:
            IntegrityError: it is damaged, or of another format.
        """
        told = read_json(path)
        side = KIND.parse(cls, _sorted(told) if isinstance(told, dict) else told, path)
        if not side.sha256:
            raise KIND.broken(path, "no 'sha256'")
        return side

    def write(self, path: Path) -> None:
        """Write it, atomically; what is not told is left out."""
        told = {**vars(self), "facts": None, "amax": self.amax or None, "preset_digests": self.preset_digests or None}
        told |= {"convs": asdict(self.convs) if self.convs else None, **self.facts}
        KIND.write({key: value for key, value in told.items() if value is not None or key in self.facts}, path)

    def describes(self, tensors: Path) -> bool:
        """Whether the file at `tensors` has the digest told here."""
        return tensors.is_file() and sha256(tensors) == self.sha256

    def __post_init__(self) -> None:
        SamplingConfig.told(self.sampling)

    @property
    def sampled(self) -> SamplingConfig | None:
        """How the DiT is sampled, if that is told."""
        return SamplingConfig.told(self.sampling)

    @property
    def formats(self) -> WeightFormats:
        """How each linear's weight becomes 4 bits."""
        return formats_from_meta({"nvfp4": self.nvfp4, "packed": self.packed})


def _sorted(told: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields as they are, the others as `facts`."""
    known = {each.name for each in fields(SideFile)} - {"facts"} | {"format"}
    facts = {key: value for key, value in told.items() if key not in known}
    return {**{key: value for key, value in told.items() if key in known}, "facts": facts}
