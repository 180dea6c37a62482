"""Compiling the kernels on a machine without a GPU, and the cache of compiled kernels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.plugins.cache_format import SIZES
from longtake.plugins.cases import op_inputs
from longtake.plugins.kernels import COMPUTE_DTYPES
from longtake.plugins.launch import Launcher
from longtake.plugins.nvrtc import ARCHITECTURES, arch_for, compile_cubin
from longtake.plugins.registry import kernel_of, kernel_ops, op_named
from longtake.plugins.run import run_kernel
from longtake.plugins.shapes import dims_from_shapes

SOURCE = 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = VALUE; }\n'


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source_in(folder: Path, text: str = SOURCE) -> Path:
    path = folder / "fill.cu"
    path.write_text(text)
    return path


OLDEST_AND_NEWEST = ARCHITECTURES[0], ARCHITECTURES[-1]


@pytest.mark.parametrize(
    "arch",
    [arch if arch in OLDEST_AND_NEWEST else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES],
)
def test_every_kernel_compiles(arch: str) -> None:
    for op in kernel_ops().values():
        for dims in op.sizes[:2] if op.sizes is SIZES else op.sizes[:1]:
            for dtype in COMPUTE_DTYPES:
                cubin = Launcher(op, dims, dtype).cubin(arch)
                assert cubin.startswith(b"\x7fELF")
                for call in kernel_of(op.name).calls(dims):
                    assert call.function.encode() in cubin


def test_a_compute_capability_names_its_target() -> None:
    targets = [arch_for(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert tuple(targets) == ARCHITECTURES


def test_the_second_time_comes_from_the_cache(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = source_in(tmp_path)
    first = compile_cubin(source, {"VALUE": 1}, "sm_90a")
    assert compile_cubin(source, {"VALUE": 1}, "sm_90a") == first
    assert caplog.text.count("compiling") == 1
    compile_cubin(source, {"VALUE": 2}, "sm_90a")
    compile_cubin(source, {"VALUE": 1}, "sm_80")
    compile_cubin(source_in(tmp_path, SOURCE + "// changed\n"), {"VALUE": 1}, "sm_90a")
    assert caplog.text.count("compiling") == 4


@pytest.mark.parametrize(
    "damage", (lambda whole: whole[:-7], lambda whole: whole[:-1] + b"\xff\xfe", lambda whole: b"")
)
def test_a_damaged_entry_is_compiled_again(
    cache: Path, tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_in(tmp_path)
    first = compile_cubin(source, {"VALUE": 1}, "sm_90a")
    (entry,) = (cache / "kernels").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert compile_cubin(source, {"VALUE": 1}, "sm_90a") == first
    assert "is damaged and" in caplog.text
    assert compile_cubin(source, {"VALUE": 1}, "sm_90a") == first
    assert caplog.text.count("is damaged and") == 1


def test_an_unwritable_cache_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "file"))
    assert compile_cubin(source_in(tmp_path), {"VALUE": 1}, "sm_90a")


def test_a_compile_error_holds_the_log(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"fill\.cu does not compile for sm_90a") as failure:
        compile_cubin(source_in(tmp_path), {"VALUE": "no_such_name"}, "sm_90a")
    assert 'identifier "no_such_name" is undefined' in str(failure.value)
    assert not list(cache.rglob("*.cubin"))


def test_shapes_that_do_not_fit_are_named() -> None:
    spec = op_named("sink_attention_bf16").spec
    good = [t.shape for t in op_inputs(spec.name, SIZES[0], indices=(0, -1))]
    assert dims_from_shapes(spec, good) == {"S": 4, "L": 128, "H": 4, "D": 64, "W": 2}
    with pytest.raises(LongtakeError, match=r"cache has the wrong shape"):
        dims_from_shapes(spec, [*good[:3], (4, 2, 127, 4, 64), (2,)])
    with pytest.raises(LongtakeError, match=r"do not take D=40"):
        dims_from_shapes(spec, [(7, 3, 40)] * 3 + [(4, 2, 7, 3, 40), (1,)])
    with pytest.raises(LongtakeError, match=r"do not take D=256"):
        dims_from_shapes(spec, [(7, 3, 256)] * 3 + [(4, 2, 7, 3, 256), (1,)])
    with pytest.raises(LongtakeError, match=r"empty dimension"):
        dims_from_shapes(spec, [*good[:4], (0,)])
    with pytest.raises(LongtakeError, match=r"wrong number of inputs"):
        dims_from_shapes(spec, good[:-1])


def test_a_product_of_dims_is_checked() -> None:
    spec = op_named("qk_norm_rope").spec
    good = [t.shape for t in op_inputs(spec.name, SIZES[0])]
    assert dims_from_shapes(spec, good) == {"L": 128, "H": 4, "D": 64}
    with pytest.raises(LongtakeError, match=r"q_weight has the wrong shape\n  got: \[255\]\n  expected: \[H\*D\] with"):
        dims_from_shapes(spec, [*good[:2], (255,), *good[3:]])


def test_cpu_tensors_are_refused_by_name() -> None:
    with pytest.raises(LongtakeError, match=r"values does not suit the kernel(.|\n)*CUDA device"):
        run_kernel("nvfp4_dequantize", *op_inputs("nvfp4_dequantize", op_named("nvfp4_dequantize").sizes[1]))
    with pytest.raises(LongtakeError, match=r"unknown compute dtype"):
        k, v, *rest = op_inputs("kv_cache_write_bf16", SIZES[1])
        run_kernel("kv_cache_write_bf16", k.to(torch.float16), v, *rest)


def test_pointers_are_checked_before_anything_is_launched() -> None:
    launcher = Launcher(op_named("kv_cache_write_bf16"), SIZES[1])
    cases = {
        "wrong number of pointers": [16] * 4,
        "bad address of k": [24, 32, 48, 64, 48],
        "bad address of v": [16, 0, 48, 64, 48],
        "cache must be written in place": [16, 32, 48, 64, 80],
    }
    for message, pointers in cases.items():
        with pytest.raises(LongtakeError, match=message):
            launcher.launch(pointers, stream=0)
    with pytest.raises(LongtakeError, match="no workspace"):
        Launcher(op_named("kv_cache_write_nvfp4"), SIZES[1]).launch([16, 32, 48, 64, 80, 96, 48, 64, 80], stream=0)
    with pytest.raises(LongtakeError, match="empty table"):
        Launcher(op_named("sink_attention_bf16"), SIZES[1]).launch([16, 32, 48, 64, 80, 96], stream=0)
