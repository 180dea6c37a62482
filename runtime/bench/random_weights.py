"""Random weights made on the device, a function of their name alone: engines and PyTorch are fed the same ones.

A matrix or filter is uniform with variance 1/fan_in, so activations keep their scale through any number of layers;
norms are ones, biases small. 4-bit and 8-bit forms come from the same codec as the exporter's. What is small enough to
lie in the graph file of a skeleton is ones there, so it is ones here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.dtypes import BY_ONNX, DType
from longtake.formats.onnx_file import constants_of, read_onnx, tensor_value
from longtake.plugins.conv8.reference import FOLDED, FOLDS, folded
from longtake.plugins.registry import op_named
from longtake.plugins.spec import DOMAIN
from longtake.training.models.random_weights import random_weight

PACKED = (".values", ".scales", ".scale", ".codes")
CHUNK = 1 << 22  # elements quantized at a time: the codec's fp32 and int32 intermediates take some 40 bytes each


def random_weights(onnx_path: Path, device: torch.device) -> Callable[[set[str]], Iterator[tuple[str, Tensor]]]:
    """A WeightSource (longtake/formats/onnx_file.py) that makes an exported file's weights up: its data file may be absent."""
    model = read_onnx(onnx_path, "none")
    constants = constants_of(model)
    ops = ((node, op_named(node.op_type)) for node in model.graph.node if node.domain == DOMAIN)
    coded = {node.input[1].removesuffix(".codes"): op.codes for node, op in ops if op.kernel_size and op.codes}
    tensors = {name: (BY_ONNX[t.data_type], tuple(t.dims)) for name, t in constants.items()}

    def weights(names: set[str]) -> Iterator[tuple[str, Tensor]]:
        packed: tuple[str, dict[str, Tensor]] = ("", {})
        for name in sorted(names):
            base = base_name(name)
            if "." not in name:  # a constant of the graph itself, such as the ones of a plain LayerNorm
                yield name, tensor_value(constants[name], onnx_path).to(device)
                continue
            if base is None:
                dtype, shape = tensors[name]
                yield name, random_weight(name, shape, device, dtype.torch)
                continue
            if packed[0] != base:  # sorted: the parts of one weight come one after the other
                make = partial(packed_parts, base, tensors, device, coded.get(base, ""))
                packed = base, in_own_memory(make, base, tensors, device)
            yield name, packed[1][name]
        del packed
        if device.type == "cuda":  # what quantizing took must not show in a peak of memory
            torch.cuda.empty_cache()

    return weights


def in_own_memory(
    make: Callable[[], dict[str, Tensor]],
    base: str,
    tensors: dict[str, tuple[DType, tuple[int, ...]]],
    device: torch.device,
) -> dict[str, Tensor]:
    """What `make` makes, in memory taken before: made in the middle of what quantizing takes in passing, a weight would
    pin a block of the allocator several times its size, which weights read from a file do not."""
    names = [name for name in tensors if base_name(name) == base]
    kept = {name: torch.empty(tensors[name][1], dtype=tensors[name][0].torch, device=device) for name in names}
    for name, tensor in make().items():
        kept[name].copy_(tensor.view(kept[name].shape))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return kept


def base_name(name: str) -> str | None:
    """The state-dict key that a packed part such as "….weight.values" belongs to; None for a plain weight."""
    return next((name.removesuffix(end) for end in PACKED if name.endswith(f".weight{end}")), None)


def packed_parts(
    base: str, tensors: dict[str, tuple[DType, tuple[int, ...]]], device: torch.device, codes: str = ""
) -> dict[str, Tensor]:
    """The stored parts of one quantized weight, by initializer name; two a byte means NVFP4, one means FP8. `codes`: those of
    a convolution."""
    if codes:
        shape = tensors[f"{base}.codes"][1]
        plain = (shape[0] // 4, shape[1], *FOLDS) if shape[2:] == FOLDED else shape
        return conv_parts(base, random_weight(base, plain, device), codes)
    rows, stored = tensors[f"{base}.values"][1]
    if f"{base}.scales" not in tensors:
        return fp8_parts(base, random_weight(base, (rows, stored), device))
    columns = tensors[f"{base}.scales"][1][1] * 16
    return nvfp4_parts(base, random_weight(base, (rows, columns), device))


def nvfp4_parts(base: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` [N, K] as the exporter stores it in 4 bits: int8 values [N, K/2], int8 scales [N, K/16], fp32 scale."""
    from longtake.plugins.nvfp4.reference import quantize, tensor_scale

    amax = weight.abs().amax().float()
    rows = max(1, CHUNK // weight.shape[1])
    pieces = [quantize(piece, rule="static_6", order="modelopt", amax=amax) for piece in weight.split(rows)]
    return {
        f"{base}.values": torch.cat([p.values for p in pieces]).view(torch.int8),
        f"{base}.scales": torch.cat([p.scales.view(torch.int8) for p in pieces]),
        f"{base}.scale": torch.tensor(tensor_scale(float(amax)), dtype=torch.float32, device=weight.device),
    }


def fp8_parts(base: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` [N, K] in 8 bits: float8_e4m3fn values [N, K], fp32 scale [N] for a graph without calibrated amax."""
    from longtake.plugins.fp8 import multiplier, quantized_rows
    from longtake.plugins.nvfp4.reference import PLACEHOLDER_AMAX

    pieces = [quantized_rows(piece) for piece in weight.split(max(1, CHUNK // weight.shape[1]))]
    scales = torch.cat([scale for _, scale in pieces]) / float(multiplier(torch.tensor(PLACEHOLDER_AMAX)))
    codes = torch.cat([code.view(torch.uint8) for code, _ in pieces])
    return {f"{base}.values": codes.view(torch.float8_e4m3fn), f"{base}.scale": scales}


def conv_parts(base: str, weight: Tensor, codes: str) -> dict[str, Tensor]:
    """A convolution's `weight` [N, C, t, y, x], folded where it is, as int8 codes and fp32 scale, for a graph without a calibration."""
    from longtake.plugins.codes import coded_weight, factor_of
    from longtake.training.models.conv_calibration import UNKNOWN_PEAK

    weight = folded(weight)
    pieces = [coded_weight(piece, codes) for piece in weight.split(max(1, CHUNK // weight[0].numel()))]
    worth = torch.cat([scale for _, scale in pieces]) / factor_of(UNKNOWN_PEAK, codes)
    return {f"{base}.codes": torch.cat([code for code, _ in pieces]), f"{base}.scale": worth}
