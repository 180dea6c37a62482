"""Random weights made on the device, a function of their name alone: engines and PyTorch are fed the same ones.

A matrix or filter is uniform with variance 1/fan_in, so activations keep their scale through any number of layers;
norms are ones, biases small. 4-bit and 8-bit forms come from the same codec as the exporter's. What is small enough to
lie in the graph file of a skeleton is ones there, so it is ones here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from longtake.engines.onnx_file import TORCH_DTYPES, weights_from_onnx
from longtake.engines.segment import constants_of

NORM_NAMES = ("gamma", "norm.weight", "norm_q.weight", "norm_k.weight", "norm3.weight", "layer_norm.weight")
PACKED = (".values", ".scales", ".scale")
INLINE_BYTES = 1024  # export.files.INLINE_BYTES, of bf16 values
CHUNK = 1 << 22  # elements quantized at a time: the codec's fp32 and int32 intermediates take some 40 bytes each


def seed_of(name: str) -> int:
    """63 bits of the name's digest."""
    return int.from_bytes(hashlib.sha256(f"longtake bench 1:{name}".encode()).digest()[:8], "little") >> 1


def random_weight(
    name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight called `name` (a state-dict key), rounded to bf16, in `dtype`. The same on every call on one device."""
    if 2 * math.prod(shape) <= INLINE_BYTES or name.endswith(NORM_NAMES):
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed_of(name))
    values = torch.empty(shape, device=device, dtype=torch.bfloat16)
    return values.uniform_(-bound(name, shape), bound(name, shape), generator=generator).to(dtype)


def bound(name: str, shape: tuple[int, ...]) -> float:
    """Largest magnitude of a weight: sqrt(3 / fan_in), which gives variance 1 / fan_in."""
    if name.endswith(".bias") or len(shape) < 2:
        return 0.02
    fan_in = shape[-1] if name.endswith("modulation") else math.prod(shape[1:])
    return math.sqrt(3.0 / fan_in)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Give a module made on the meta device random weights on `device`; keys are the names."""
    module.to_empty(device=device)
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = random_weight(name, tuple(tensor.shape), device, dtype)
    return module.eval().requires_grad_(False)


def random_weights(onnx_path: Path, device: torch.device) -> Callable[[set[str]], Iterator[tuple[str, Tensor]]]:
    """A WeightSource (engines/onnx_file.py) that makes an exported file's weights up: its data file may be absent."""
    constants = constants_of(onnx.load(str(onnx_path), load_external_data=False))
    tensors = {name: (TORCH_DTYPES.get(t.data_type), tuple(t.dims)) for name, t in constants.items()}

    def weights(names: set[str]) -> Iterator[tuple[str, Tensor]]:
        packed: tuple[str, dict[str, Tensor]] = ("", {})
        for name in sorted(names):
            base = base_name(name)
            if "." not in name:  # a constant of the graph itself, such as the ones of a plain LayerNorm
                yield name, graph_constant(constants[name], onnx_path).to(device)
                continue
            if base is None:
                dtype, shape = tensors[name]
                yield name, random_weight(name, shape, device, dtype or torch.bfloat16)
                continue
            if packed[0] != base:  # sorted: the parts of one weight come one after the other
                packed = base, in_own_memory(partial(packed_parts, base, tensors, device), base, tensors, device)
            yield name, packed[1][name]
        del packed
        if device.type == "cuda":  # what quantizing took must not show in a peak of memory
            torch.cuda.empty_cache()

    return weights


def in_own_memory(
    make: Callable[[], dict[str, Tensor]],
    base: str,
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]],
    device: torch.device,
) -> dict[str, Tensor]:
    """What `make` makes, in memory taken before: made in the middle of what quantizing takes in passing, a weight would
    pin a block of the allocator several times its size, which weights read from a file do not."""
    names = [name for name in tensors if base_name(name) == base]
    kept = {name: torch.empty(tensors[name][1], dtype=tensors[name][0], device=device) for name in names}
    for name, tensor in make().items():
        kept[name].copy_(tensor.view(kept[name].shape))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return kept


def graph_constant(tensor: onnx.TensorProto, onnx_path: Path) -> Tensor:
    """A constant with the value it has in the file; a skeleton holds these itself, whatever their size."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return next(weights_from_onnx(onnx_path, {tensor.name}))[1]
    return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).to(TORCH_DTYPES[tensor.data_type])


def base_name(name: str) -> str | None:
    """The state-dict key that a packed part such as "….weight.values" belongs to; None for a plain weight."""
    return next((name.removesuffix(end) for end in PACKED if name.endswith(f".weight{end}")), None)


def packed_parts(
    base: str, tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], device: torch.device
) -> dict[str, Tensor]:
    """The stored parts of one quantized weight, by initializer name; two a byte means NVFP4, one means FP8."""
    rows, stored = tensors[f"{base}.values"][1]
    if f"{base}.scales" not in tensors:
        return fp8_parts(base, random_weight(base, (rows, stored), device))
    columns = tensors[f"{base}.scales"][1][1] * 16
    return nvfp4_parts(base, random_weight(base, (rows, columns), device))


def nvfp4_parts(base: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` [N, K] as the exporter stores it in 4 bits: int8 values [N, K/2], int8 scales [N, K/16], fp32 scale."""
    from longtake.export.lower import tensor_scale
    from longtake.plugins.nvfp4.reference import quantize

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
    from longtake.export.lower import PLACEHOLDER_AMAX
    from longtake.export.lower_fp8 import multiplier, quantized_rows

    pieces = [quantized_rows(piece) for piece in weight.split(max(1, CHUNK // weight.shape[1]))]
    scales = torch.cat([scale for _, scale in pieces]) / float(multiplier(torch.tensor(PLACEHOLDER_AMAX)))
    codes = torch.cat([code.view(torch.uint8) for code, _ in pieces])
    return {f"{base}.values": codes.view(torch.float8_e4m3fn), f"{base}.scale": scales}
