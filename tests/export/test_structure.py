"""The structural check accepts what export writes and names file and fault for anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from longtake.errors import IntegrityError, LongtakeError
from longtake.export.files import write_onnx
from longtake.export.structure import Expected, check_structure
from longtake.formats.exported import Export
from longtake.formats.onnx_file import data_path, read_onnx
from longtake.training.models.wan.spec import network_spec

Tamper = Callable[[onnx.ModelProto], object]


def expected(models, recipe, folder: Path, network: str = "dit") -> Expected:  # type: ignore[no-untyped-def]
    linears = Export.read(folder).networks[network].linears
    shapes = {name: tuple(models.dit.get_submodule(name).weight.shape) for name in linears}
    layers = models.preset.dit.layers if network == "dit" else 0
    return Expected(network_spec(models.preset, recipe, network), recipe.precision, recipe.cache, layers, shapes)


def node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op)


def drop_plugin_version(model: onnx.ModelProto) -> None:
    attention = node(model, "sink_attention_nvfp4")
    kept = [a for a in attention.attribute if a.name != "plugin_version"]
    del attention.attribute[:]
    attention.attribute.extend(kept)


def drop_weight(model: onnx.ModelProto) -> None:
    """One weight stored in bf16 after all."""
    dequantize = node(model, "nvfp4_dequantize")
    values = next(t for t in model.graph.initializer if t.name == dequantize.input[0])
    values.name = values.name.replace(".values", ".bf16")
    dequantize.input[0] = values.name


def leave_quantizer(model: onnx.ModelProto) -> None:
    gelu = node(model, "Gelu")
    gelu.domain, gelu.op_type = "pkg.onnxscript.torch_lib", "aten_fake_quantize"
    model.opset_import.append(helper.make_opsetid("pkg.onnxscript.torch_lib", 1))


def fix_window(model: onnx.ModelProto) -> None:
    table = next(value for value in model.graph.input if value.name == "table")
    table.type.tensor_type.shape.dim[0].dim_value = 4


TAMPERED: dict[str, tuple[Tamper, str]] = {
    "window is static": (fix_window, r"other inputs than the engine spec[\s\S]*table INT32 \['W'\]"),
    "input renamed": (lambda m: setattr(m.graph.input[4], "name", "tables"), "is not valid ONNX|other inputs"),
    "output dropped": (lambda m: m.graph.output.pop(), r"another number of outputs"),
    "no body": (lambda m: m.functions.pop(0), r"lacks function bodies"),
    "no plugin": (drop_plugin_version, r"names no plugin for node .*TensorRT would inline it silently"),
    "not 4 bits": (drop_weight, r"does not hold blocks\.0\.\S+ in w4a16[\s\S]*expected: 4\.5"),
    "leftover quantizer": (leave_quantizer, r"not lowered[\s\S]*torch_lib::aten_fake_quantize"),
}


@pytest.mark.parametrize("fault", TAMPERED)
def test_a_tampered_file_is_refused(package, tmp_path: Path, fault: str) -> None:  # type: ignore[no-untyped-def]
    models, recipe, folder = package("w4a16")
    tamper, message = TAMPERED[fault]
    model = read_onnx(folder / "dit.onnx")
    tamper(model)
    write_onnx(model, tmp_path / "dit.onnx")
    with pytest.raises(IntegrityError, match=message) as error:
        check_structure(tmp_path / "dit.onnx", expected(models, recipe, folder))
    assert str(tmp_path / "dit.onnx") in str(error.value) and "longtake export --force" in str(error.value)


def test_a_plain_file_is_no_4_bit_file(package) -> None:  # type: ignore[no-untyped-def]
    """The bf16 context network under the name of the nvfp4 one."""
    models, recipe, folder = package("nvfp4")
    with pytest.raises(IntegrityError, match="linears that were not lowered"):
        check_structure(package("bf16")[2] / "context.onnx", expected(models, recipe, folder, "context"))


def test_another_cache_format_is_refused(package) -> None:  # type: ignore[no-untyped-def]
    models, recipe, folder = package("w4a16")
    with pytest.raises(IntegrityError, match="other inputs than the engine spec"):
        check_structure(package("bf16")[2] / "dit.onnx", expected(models, recipe, folder))


def test_damaged_files_are_refused(package, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = package("bf16")[2]
    path = tmp_path / "context.onnx"
    with pytest.raises(LongtakeError, match="does not exist"):
        read_onnx(path)
    graph, data = ((folder / f"context.onnx{suffix}").read_bytes() for suffix in ("", ".data"))
    path.write_bytes(graph)
    with pytest.raises(LongtakeError, match=r"context.onnx.data does not exist"):
        read_onnx(path)
    data_path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"context.onnx.data is too short for tensor"):
        read_onnx(path)
    path.write_bytes(graph[: len(graph) // 2])
    with pytest.raises(IntegrityError, match="is not a readable ONNX model"):
        read_onnx(path)
