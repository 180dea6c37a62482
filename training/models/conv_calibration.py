"""What calibration found of a VAE decoder's convolutions: kept in its side file, read by export and by the PyTorch side.

Whole numbers ("int8") are the finer codes while an input's largest magnitude is under about 11 times its root mean square;
beyond that E4M3 ("fp8") is, whose steps grow with the number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from longtake.errors import IntegrityError

PEAK_OVER_RMS = 11.0
UNKNOWN_PEAK = 8.0  # of a convolution's input in a graph without weights
FIX = "measure it: longtake convert --calibrate --out FOLDER"


@dataclass(frozen=True)
class ConvInput:
    """What calibration saw of a convolution's input: its largest magnitude, and its root mean square."""

    peak: float
    rms: float

    @property
    def codes(self) -> str:
        """The finer ones."""
        return "int8" if self.peak < PEAK_OVER_RMS * self.rms else "fp8"


@dataclass(frozen=True)
class ConvCalibration:
    """weights: digest of the VAE's tensors that were calibrated. inputs: by the convolution's name."""

    weights: str = ""
    inputs: dict[str, ConvInput] = field(default_factory=dict)

    def require(self, names: Sequence[str], weights: str) -> None:
        """Raise IntegrityError unless this is of the VAE with that digest, and has a usable scale for each of `names`."""
        if weights and self.weights != weights:
            raise IntegrityError(
                "the calibration of the VAE's convolutions is of another VAE",
                got=f"sha256 {self.weights[:16] or 'none'}",
                expected=f"sha256 {weights[:16]}",
                fix=FIX,
            )
        if missing := [name for name in names if name not in self.inputs]:
            raise IntegrityError(
                "the VAE's convolutions are not calibrated",
                got=f"nothing of {missing[0]} and {len(missing) - 1} more",
                expected=f"a peak of each of {len(names)}",
                fix=FIX,
            )
        for name in names:
            found = self.inputs[name]
            if not all(0.0 < value < math.inf for value in (found.peak, found.rms)):
                raise IntegrityError(
                    f"the calibration gives no usable scale for {name}",
                    got=f"peak {found.peak}, rms {found.rms}",
                    expected="positive and finite",
                    fix=FIX,
                )
