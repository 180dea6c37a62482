"""Convolutions of 8-bit codes: the kernel's text on the CPU against the reference, and on a GPU every way of running them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtake.errors import LongtakeError, UnavailableError
from longtake.machine.capability import conv8_methods
from longtake.plugins import driver
from longtake.plugins.bench.harness import relative_error
from longtake.plugins.cases import op_inputs
from longtake.plugins.codes import CODES, LARGEST, coded_weight, decode, encode, factor_of
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.conv8 import hopper
from longtake.plugins.conv8.hopper import LARGE, SMALL, WIDE, HopperConv, HopperRowsConv, Tile, tile_for, tiles_of
from longtake.plugins.conv8.library import WidenedConv
from longtake.plugins.conv8.op import KERNELS, METHODS, OPS, SIZES
from longtake.plugins.conv8.reference import folded, spread, stored_weight
from longtake.plugins.nvfp4.formats import E4M3_VALUES
from longtake.plugins.registry import op_named
from longtake.plugins.run import launcher_by, launcher_for
from longtake.plugins.shapes import shape_of
from longtake.plugins.upsample.reference import upsample_space
from tests.plugins.conftest import host_library

ops = pytest.mark.parametrize("op", [op.name for op in OPS])
LAST_BIT = 2e-3  # bf16's rounding is 1.7e-3; sums are exact on the CPU, and in the reference nearly so
# Channels in and out that no tile divides, more than one round of channels, a frame in several tiles, three thread blocks.
ODD = {"T": 4, "Y": 11, "X": 35, "C": 144, "N": 136}
FEW = {"T": 3, "Y": 3, "X": 18, "C": 16, "N": 8}


@pytest.mark.parametrize("codes", CODES)
def test_every_code_comes_back(codes: str) -> None:
    stored = torch.arange(-128, 128).to(torch.int8)
    values = decode(stored, codes)
    known = values.isfinite() & (values.abs() <= LARGEST[codes])
    assert known.sum() == {"fp8": 254, "int8": 255}[codes]
    assert torch.equal(decode(encode(values[known], codes), codes), values[known])
    assert decode(torch.zeros(1, dtype=torch.int8), codes) == 0, "memory of zeros is a history of zeros"
    assert encode(torch.tensor([1e9, -1e9]), codes).tolist() == ([126, -2] if codes == "fp8" else [127, -127])
    if codes == "fp8":
        bytes_ = stored.to(torch.int32) % 256
        assert torch.equal(torch.nan_to_num(values, 999.0), torch.nan_to_num(E4M3_VALUES[bytes_], 999.0))


@pytest.mark.parametrize("codes", CODES)
def test_arithmetic_for_onnx_gives_the_same_codes(codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = E4M3_VALUES[E4M3_VALUES.isfinite()]
    middles = (edges[:-1] + edges[1:]) / 2
    near = torch.cat([edges, middles, torch.nextafter(middles, middles + 1), torch.randn(4096) * 100, -middles])
    eager = encode(near, codes)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    exported = encode(near, codes)
    assert torch.equal(decode(exported, codes), decode(eager, codes))
    assert (exported != eager).sum() <= (near == 0).sum(), "zero alone has two codes"


def test_a_weight_has_a_scale_a_channel() -> None:
    weight = torch.randn(6, 8, 3, 3, 3) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0, 1.0]).view(-1, 1, 1, 1, 1)
    for codes, limit in (("fp8", 0.03), ("int8", 0.012)):
        stored, worth = coded_weight(weight, codes)
        back = decode(stored, codes) * worth.view(-1, 1, 1, 1, 1)
        assert stored.shape == weight.shape and worth.shape == (6,) and worth[4] == 0
        for channel in (0, 1, 2, 3, 5):
            assert relative_error(back[channel], weight[channel]) < limit
    assert factor_of(2.0, "int8") == 63.5 and factor_of(2.0, "fp8") == 112.0, "room above the peak where it is free"


def test_a_folded_convolution_is_upsampling_and_the_convolution_behind_it() -> None:
    """In fp64, frames of odd sizes, borders included; and what is coded is what is folded, each of four sets by its own peak."""
    x, weight = torch.randn(2, 5, 7, 16).double(), torch.randn(24, 16, 1, 3, 3)
    video = upsample_space(x).permute(3, 0, 1, 2)[None]
    wanted = functional.conv3d(video, weight.double(), padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    sets = functional.conv3d(x.permute(3, 0, 1, 2)[None], folded(weight).double(), padding=(0, 1, 1))[0]
    got = spread(sets.permute(1, 2, 3, 0))
    assert got.shape == wanted.shape == (2, 10, 14, 24) and relative_error(got, wanted) < 1e-6
    for codes, limit in (("fp8", 0.03), ("int8", 0.012)):
        stored, worth = stored_weight(weight, codes)
        back = decode(stored, codes) * worth.view(-1, 1, 1, 1, 1)
        assert stored.shape == (96, 16, 1, 2, 2) and worth.shape == (96,)
        assert relative_error(back, folded(weight)) < limit
    other = torch.randn(8, 16, 3, 3, 3)
    assert torch.equal(stored_weight(other, "int8")[0], coded_weight(other, "int8")[0])


def test_a_ranks_rows_of_a_folded_convolution_are_those_of_the_whole() -> None:
    """With ghost rows of its neighbours around them, zeros beyond the picture; what is wrong at the edge stays in ghost rows."""
    op, own = op_named("conv_1x3x3_up_int8"), 4
    x, *rest = op_inputs(op.name, {"T": 2, "Y": 2 * own, "X": 5, "C": 16, "N": 8})
    whole = op.reference(x, *rest)
    for ghost in (1, 2):
        around = functional.pad(x, (0, 0, 0, 0, ghost, ghost))
        for first in (0, own):
            rows = op.reference(around[:, first : first + own + 2 * ghost].contiguous(), *rest)
            assert rows.shape[1] == 2 * (own + 2 * ghost)
            assert torch.equal(rows[:, 2 * ghost : -2 * ghost], whole[:, 2 * first : 2 * (first + own)])


def test_tiles_fill_the_multiprocessors() -> None:
    def chosen(y: int, x: int, n: int, frames: int, whole: bool) -> Tile:
        return tile_for({"Y": y, "X": x, "N": n}, frames, whole)

    for whole in (False, True):
        assert chosen(352, 640, 256, 4, whole) == LARGE
        assert chosen(88, 160, 1024, 2, whole) in (LARGE, WIDE)
    assert chosen(44, 80, 1024, 1, False) == SMALL
    assert chosen(44, 80, 1024, 1, True) == WIDE
    assert chosen(4, 4, 64, 1, True) == SMALL
    dims = {"Y": 44, "X": 80, "N": 136}
    across, channels, tiles = tiles_of(LARGE, dims, 2, sets=4)
    assert (across, channels, tiles) == (3, 8, 3 * 6 * 2 * 8), "a tile of channels is of one set of weights"
    few = {"Y": 8, "X": 32, "N": 128}
    assert tile_for(few, 33, False) == SMALL and tile_for(few, 33, False, sets=4) == LARGE, (
        "four sets are 132 large ones"
    )


def host_map(address: int, sizes: Sequence[int], box: Sequence[int]) -> bytes:
    """`driver.tensor_map` for tests/plugins/products8.cuh; refuses what the driver would."""
    assert address % 16 == 0 and sizes[0] % 16 == 0 and all(1 <= n <= 256 for n in box) and box[0] == 128
    whole = [(*part, *[1] * (4 - len(part))) for part in (sizes, box)]
    return struct.pack("<Q8i56x", address, *whole[0], *whole[1])


@pytest.fixture()
def host_conv(host_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a launcher's kernel on the CPU: (launcher, tensors in spec order, last thread first) -> out."""
    order = {"reverse": False}

    def prepare(launcher: HopperConv) -> HopperConv:
        macros = {**launcher.macros(), "COMPUTE_BF16": 1}
        options = tuple(f"-D{name}={value}" for name, value in macros.items())
        launcher._function = host_library(hopper.SOURCE, ("conv8",), options, host_folder).run_conv8
        return launcher

    def launch_boxes(
        function: Any, grid: tuple[int, int], threads: int, stream: int, boxes: Sequence[int], shared_bytes: int
    ) -> None:
        assert shared_bytes <= hopper.SHARED_BYTES
        function((ctypes.c_void_p * len(boxes))(*boxes), *grid, threads, order["reverse"])

    monkeypatch.setattr(HopperConv, "prepare", prepare)
    monkeypatch.setattr(driver, "ensure_context", lambda: 0)
    monkeypatch.setattr(driver, "tensor_map", host_map)
    monkeypatch.setattr(driver, "launch_boxes", launch_boxes)

    def run(launcher: HopperConv, inputs: Sequence[Tensor], reverse: bool) -> Tensor:
        order["reverse"] = reverse
        tensors = [library_weight(t) if t.dim() == 5 else t for t in inputs]
        out = torch.full(shape_of(launcher.spec.outputs[0], launcher.dims), float("nan"), dtype=torch.bfloat16)
        launcher.launch([t.data_ptr() for t in (*tensors, out)], 0)
        return out

    return run


@pytest.mark.long
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("kind", (HopperConv, HopperRowsConv))
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_text_equals_the_reference(host_conv: Any, name: str, codes: str, kind: Any, reverse: bool) -> None:
    op = op_named(f"conv_{name}_{codes}")
    tiles = (LARGE, WIDE) if codes == "int8" else (LARGE, SMALL)
    odd = {**ODD, "T": KERNELS[name][0] + 1}  # two frames come out
    for tile, dims in zip(tiles, (odd, {**odd, "N": 264, "X": 17, "C": 48})):
        inputs = op_inputs(op.name, dims, "bf16")
        out = host_conv(kind(op, dims, tile=tile, multiprocessors=3), inputs, reverse)
        assert relative_error(out, op.reference(*inputs)) < LAST_BIT, (tile, dims)


@pytest.mark.parametrize("codes, reverse", (("fp8", False), ("int8", True)))
def test_a_small_convolution_by_the_kernels_text(host_conv: Any, codes: str, reverse: bool) -> None:
    op = op_named(f"conv_1x3x3_up_{codes}")
    dims = {**FEW, "T": 1}
    inputs = op_inputs(op.name, dims, "bf16")
    out = host_conv(HopperConv(op, dims, multiprocessors=2), inputs, reverse)
    assert relative_error(out, op.reference(*inputs)) < LAST_BIT


@pytest.mark.long
def test_sums_may_stay_in_the_tensor_cores(host_conv: Any) -> None:
    for name, kind, every in (("3x3x3", HopperConv, 3), ("1x3x3_up", HopperConv, 4), ("1x3x3_up", HopperRowsConv, 2)):
        op, dims = op_named(f"conv_{name}_fp8"), {**FEW, "C": 160}
        inputs = op_inputs(op.name, dims, "bf16")
        for promote in (0, every):
            out = host_conv(kind(op, dims, promote=promote, tile=SMALL), inputs, False)
            assert relative_error(out, op.reference(*inputs)) < LAST_BIT, (name, kind, promote)


def test_it_compiles() -> None:
    launcher = HopperConv(op_named("conv_3x3x3_add_fp8"), {"T": 6, "Y": 176, "X": 320, "C": 512, "N": 512})
    assert launcher.cubin("sm_90a")[:4] == b"\x7fELF"


@pytest.mark.long
@pytest.mark.parametrize("kind", (HopperConv, HopperRowsConv))
@pytest.mark.parametrize("codes", CODES)
def test_every_form_compiles(kind: Any, codes: str) -> None:
    sizes = {"T": 6, "Y": 176, "X": 320, "C": 512, "N": 512}
    tiles = (LARGE, SMALL, WIDE) if codes == "int8" else (LARGE, SMALL)
    names = ("3x3x3_add", "3x1x1", "1x3x3_up") if kind is HopperConv else ("3x3x3", "1x3x3_up")
    for name in names:
        for tile in tiles if name in ("3x3x3_add", "1x3x3_up") else tiles[:1]:
            launcher = kind(op_named(f"conv_{name}_{codes}"), sizes, tile=tile)
            assert launcher.cubin("sm_90a")[:4] == b"\x7fELF" and launcher.shared_bytes <= hopper.SHARED_BYTES
    for name in ("3x3x3", "1x3x3_up"):
        cut = kind(op_named(f"conv_{name}_{codes}"), {**sizes, "N": 136})
        assert cut.macros()["CUT"] == 1 and cut.cubin("sm_90a")[:4] == b"\x7fELF"


@ops
def test_torch_sees_the_references_convolution(op: str) -> None:
    for dims in SIZES:
        inputs = op_inputs(op, dims, "bf16")
        tensors = {tensor.name: value for tensor, value in zip(op_named(op).spec.inputs, inputs)}
        wanted = op_named(op).reference(*inputs)
        lying = library_weight(tensors["weight"]).view(tensors["weight"].shape)
        tensors |= {"weight": lying, "out": torch.empty_like(wanted)}
        WidenedConv(op_named(op), dims).convolve(tensors)
        assert relative_error(tensors["out"], wanted) < LAST_BIT


def test_what_cannot_run_is_refused_by_name() -> None:
    assert conv8_methods("9.0") == list(METHODS) and conv8_methods("7.5") == []
    with pytest.raises(UnavailableError, match=r"no library runs conv_3x3x3_fp8 here[\s\S]*7.5[\s\S]*vae_conv: bf16"):
        launcher_for(op_named("conv_3x3x3_fp8"), SIZES[0], compute_capability="7.5")
    with pytest.raises(
        UnavailableError, match=r"does not take these channels\n  got: 64 to 12\n  expected: a multiple"
    ):
        HopperConv(op_named("conv_3x3x3_int8"), {**SIZES[0], "C": 64, "N": 12})


def test_a_wrong_answer_at_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = HopperConv(op_named("conv_3x3x3_fp8"), SIZES[0])
    for error, good in ((1.7e-3, True), (0.02, False), (float("nan"), False), (float("inf"), False)):
        monkeypatch.setattr(hopper, "_trial_error", lambda *given, error=error: error)
        if good:
            launcher.try_out()
        else:
            with pytest.raises(UnavailableError, match="conv_3x3x3_fp8 through wgmma is wrong"):
                launcher.try_out()


def test_addresses_must_be_aligned() -> None:
    with pytest.raises(LongtakeError, match="bad address of weight"):
        HopperConv(op_named("conv_1x3x3_up_fp8"), SIZES[0]).launch([16, 24, 16, 16, 16], 0)


@pytest.mark.gpu
@ops
@pytest.mark.parametrize("method", (*METHODS, "chosen"))
def test_every_method_equals_the_reference(op: str, method: str) -> None:
    large = {"T": 4, "Y": 43, "X": 76, "C": 384, "N": 256}
    for dims in (*SIZES, large):
        given = [tensor.cuda() for tensor in op_inputs(op, dims)]
        wanted = op_named(op).reference(*(tensor.cpu() for tensor in given))
        out = torch.full_like(wanted, float("nan"), device="cuda")
        launcher = launcher_for(op_named(op), dims) if method == "chosen" else launcher_by(op_named(op), method, dims)
        assert method != "chosen" or launcher.method == "wgmma" or torch.cuda.get_device_capability() != (9, 0)
        given[1] = library_weight(given[1])
        pointers = [tensor.data_ptr() for tensor in (*given, out)]
        launcher.launch(pointers, torch.cuda.current_stream().cuda_stream)  # a library allocates at its first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launcher.launch(pointers, torch.cuda.current_stream().cuda_stream)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out.cpu(), wanted) < 2 * LAST_BIT, dims


@pytest.mark.gpu
@pytest.mark.parametrize("kind", (HopperConv, HopperRowsConv))
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", ("3x3x3_add", "1x3x3_up"))
def test_every_tile_equals_the_reference(kind: Any, codes: str, name: str) -> None:
    op, dims = op_named(f"conv_{name}_{codes}"), {"T": 5, "Y": 21, "X": 50, "C": 272, "N": 264}
    given = [tensor.cuda() for tensor in op_inputs(op.name, dims)]
    wanted = op.reference(*(tensor.cpu() for tensor in given))
    given[1] = library_weight(given[1])
    for tile in (LARGE, SMALL, WIDE) if codes == "int8" else (LARGE, SMALL):
        for promote in (1, op.kernel_size[-1], 0):
            out = torch.full_like(wanted, float("nan"), device="cuda")
            launcher = kind(op, dims, tile=tile, promote=promote)
            launcher.launch([t.data_ptr() for t in (*given, out)], torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            limit = 2 * LAST_BIT if promote else 8e-3  # the tensor cores' own sums have some 14 bits
            assert relative_error(out.cpu(), wanted) < limit, (tile, promote)
