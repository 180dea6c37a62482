"""Whether an exported file holds its checkpoint's weights: each one read back, decoded, and compared by its name.

A network's outputs show a wrong weight only as far as the inputs and what was learnt let them. Its stored numbers show it
in any model: one code or scale that is off, a bias of zeros, two blocks' weights exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data
from torch import Tensor, nn

from longtake.accuracy.rows import Row
from longtake.formats.onnx_file import constants_of, data_path, read_onnx, tensor_content, tensor_value
from longtake.plugins.fp8 import multiplier
from longtake.plugins.nvfp4_dequantize.reference import decode_weight

STORED_GATE = 1e-5  # decoded codes times scales, in fp32 and in another order: 3e-7 apart at most
SMALL = 1e-3  # of a tensor's largest element: what is smaller is measured by this


def stored_rows(module: nn.Module, network: str, path: Path) -> Iterator[Row]:
    """One row a weight of the network in `path`, against `module`, the recipe's torch model of it; none of a skeleton.

    Convolutions in 8-bit codes are left to the comparison of outputs.
    """
    graph = read_onnx(path, "none")
    if not data_path(path).is_file() and any(map(uses_external_data, graph.graph.initializer)):
        return
    constants = constants_of(graph)
    held = {key.partition(".")[2]: value for key, value in module.state_dict().items()}
    linears = {name.partition(".")[2]: each for name, each in module.named_modules()}
    for key, weight in held.items():
        if key in constants:
            yield _row(network, key, weight, tensor_value(constants[key], path))
        elif f"{key}.values" in constants:
            parts = {
                end: constants[name] for end in ("values", "scales", "scale") if (name := f"{key}.{end}") in constants
            }
            linear = linears[key.removesuffix(".weight")]
            yield _row(network, key, _multiplied(linear, weight), _decoded(linear, weight.shape, parts, path))


@torch.no_grad()
def _multiplied(linear: nn.Module, weight: Tensor) -> Tensor:
    """What the torch model multiplies with."""
    quantizer = getattr(linear, "weight_quantizer", None)
    return weight if quantizer is None else quantizer(weight)


def _decoded(linear: Any, shape: torch.Size, parts: dict[str, TensorProto], path: Path) -> Tensor:
    """What a file's codes [N, K] stand for: in 4 bits with a scale in 16 codes and one in all, in 8 with one a row."""
    scale = tensor_value(parts["scale"], path)
    if "scales" not in parts:
        return tensor_value(parts["values"], path).float() * scale[:, None] * multiplier(linear.input_quantizer.amax)
    codes, scales = (
        torch.from_numpy(tensor_content(parts[part], path)).view(torch.int8) for part in ("values", "scales")
    )
    return decode_weight(codes.reshape(shape[0], -1), scales.reshape(shape[0], -1)) * scale


def _row(network: str, key: str, wanted: Tensor, got: Tensor) -> Row:
    one, other = wanted.detach().float().cpu(), got.float()
    if one.shape != other.shape:
        error = largest = 1.0
    else:
        delta = (other - one).abs()
        size = one.abs()
        error = float((delta / size.clamp(min=max(SMALL * float(size.max()), 1e-30))).max())
        largest = float(delta.max())
    return Row(network, "as stored", key, "the checkpoint", error, largest, STORED_GATE, stored=True)
