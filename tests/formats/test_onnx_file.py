"""ONNX files that say of their weights what cannot be: nothing outside their folder is read, and all is said in our words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from longtake.commands.describe import describe
from longtake.errors import IntegrityError
from longtake.formats.onnx_file import read_onnx, weights_from_onnx

SECRET = b"outside " * 2000


def entry(tensor: TensorProto, key: str, value: str | None) -> None:
    kept = [
        (e.key, value if e.key == key else e.value) for e in tensor.external_data if e.key != key or value is not None
    ]
    del tensor.external_data[:]
    for name, content in kept:
        tensor.external_data.add(key=name, value=content)


def model(folder: Path, change: Callable[[TensorProto], None], inside: bool = False) -> Path:
    """A model of one weight, in a data file beside it; `inside` a Constant node instead of an initializer."""
    folder.mkdir()
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    (folder / "a.onnx.data").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "a.onnx.data"), ("offset", "0"), ("length", str(64 * 64 * 4))):
        weight.external_data.add(key=key, value=value)
    change(weight)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
    nodes = [helper.make_node("Constant", [], ["w"], value=weight)] if inside else []
    graph = helper.make_graph([*nodes, helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y],
                              [] if inside else [weight])  # fmt: skip
    (folder / "a.onnx").write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    return folder / "a.onnx"


ODD: dict[str, Callable[[TensorProto], None]] = {
    "a folder up": lambda t: entry(t, "location", "../secret.bin"),
    "down and up": lambda t: entry(t, "location", "sub/../../secret.bin"),
    "an absolute path": lambda t: entry(t, "location", "/etc/passwd"),
    "a link": lambda t: entry(t, "location", "link.bin"),
    "no location": lambda t: entry(t, "location", None),
    "an empty location": lambda t: entry(t, "location", ""),
    "a zero byte": lambda t: entry(t, "location", "a\0b"),
    "a negative offset": lambda t: entry(t, "offset", "-1"),
    "an offset that is none": lambda t: entry(t, "offset", "x"),
    "an offset past the end": lambda t: entry(t, "offset", "4096"),
    "an endless offset": lambda t: entry(t, "offset", "9" * 5000),
    "a negative length": lambda t: entry(t, "length", "-4"),
    "a length of another shape": lambda t: entry(t, "length", "4"),
    "an endless length": lambda t: entry(t, "length", "9" * 5000),
    "a type of no name": lambda t: setattr(t, "data_type", 99),
    "a negative size": lambda t: t.dims.__setitem__(0, -64),
    "an endless size": lambda t: t.dims.extend([1 << 40, 1 << 40]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["initializer", "node"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_places_are_refused_by_every_reader(tmp_path: Path, odd: str, inside: bool) -> None:
    (tmp_path / "secret.bin").write_bytes(SECRET)
    path = model(tmp_path / "m", ODD[odd], inside)
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    readers: list[Callable[[], object]] = [
        lambda: dict(weights_from_onnx(path, {"w"}))["w"],
        lambda: read_onnx(path, "all"),
        lambda: describe(path),
    ]
    if inside and odd == "an offset past the end":
        readers = readers[:1]  # the others do not look at the content of nodes
    for reader in readers:
        with pytest.raises(IntegrityError, match="a.onnx") as caught:
            reader()
        assert "longtake export" in (caught.value.fix or ""), caught.value


def test_what_lies_beside_is_read(tmp_path: Path) -> None:
    for inside in (False, True):
        path = model(tmp_path / str(inside), lambda tensor: None, inside)
        assert float(dict(weights_from_onnx(path, {"w"}))["w"].sum()) == 4096
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a.onnx", "a.onnx.data"):  # as a cache of downloads has them
        (linked / name).symlink_to(tmp_path / "False" / name)
    assert float(dict(weights_from_onnx(linked / "a.onnx", {"w"}))["w"].sum()) == 4096


def test_onnx_runtime_reads_nothing_outside_either(tmp_path: Path) -> None:
    from longtake.accuracy.ort_session import session_from_view
    from longtake.errors import LongtakeError

    (tmp_path / "secret.bin").write_bytes(SECRET * 8)
    assert session_from_view(model(tmp_path / "plain", lambda tensor: None))
    for odd in ("a folder up", "an absolute path", "a link"):
        path = model(tmp_path / odd.replace(" ", "-"), ODD[odd])
        (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
        with pytest.raises(LongtakeError):
            session_from_view(path)
