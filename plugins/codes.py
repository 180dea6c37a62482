"""8-bit codes of activations and weights of convolutions: E4M3 ("fp8") or whole numbers ("int8"), each in a byte typed INT8.

A number is code / factor; a tensor's factor is known beforehand (a calibrated peak), because a stream's history is kept as
codes from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plugins.nvfp4.formats import E4M3_MAX, decode_e4m3, encode_e4m3

LARGEST = {"fp8": E4M3_MAX, "int8": 127.0}
CODES = tuple(LARGEST)
# A peak that calibration has not seen costs E4M3 nothing if there is room for it, because its steps grow with the number;
# whole numbers lose a bit to every doubling of the range, so theirs ends at the peak.
ROOM = {"fp8": 2.0, "int8": 1.0}


def encode(scaled: Tensor, codes: str) -> Tensor:
    """Numbers, fp32 and in the code's range already, to int8 bytes: nearest, ties to even, saturating."""
    if codes == "int8":
        return torch.round(scaled).clamp(-127.0, 127.0).to(torch.int8)
    if not torch.compiler.is_exporting():
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.int8)
    negative = (scaled < 0.0).to(torch.float32)  # without bit casts, which ONNX has none of at our opset
    return (encode_e4m3(scaled.abs()) - 128.0 * negative).to(torch.int8)


def decode(stored: Tensor, codes: str) -> Tensor:
    """int8 bytes to the numbers that they stand for, fp32."""
    if codes == "int8":
        return stored.to(torch.float32)
    if not torch.compiler.is_exporting():
        return stored.view(torch.float8_e4m3fn).to(torch.float32)
    wide = stored.to(torch.int32)
    return decode_e4m3(wide + 256 * (wide < 0).to(torch.int32))


def factor_of(peak: float, codes: str) -> float:
    """What brings numbers up to a calibrated `peak` into the code's range."""
    return LARGEST[codes] / (peak * ROOM[codes])


def coded_weight(weight: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    """Codes int8 of a weight [N, ...], each output channel by its own largest magnitude, and a code's worth fp32 [N]."""
    wide = weight.detach().float()
    worth = wide.flatten(1).abs().amax(1) / LARGEST[codes]
    safe = torch.where(worth > 0, worth, torch.ones_like(worth)).view(-1, *[1] * (wide.dim() - 1))
    return encode(wide / safe, codes), worth
