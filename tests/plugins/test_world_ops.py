"""The ops of worlds beyond what every op must hold: fp32 to 1e-5, bodies of any length, and a thousand chunks without drift."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from longtake.errors import LongtakeError
from longtake.export.functions import PLUGIN_ATTRIBUTES, attach_functions
from longtake.plugins import registry
from longtake.plugins.cases import op_inputs
from longtake.plugins.registry import op_named
from longtake.plugins.shapes import dims_from_shapes, size_of
from longtake.plugins.spec import DOMAIN, Op

FOLDERS = ("gdn_scan", "ray_transform", "short_conv", "gated_ffn", "frame_attention", "slot_write")
OPS = {op.name: op for folder in FOLDERS for op in getattr(registry, folder).OPS}
VARIES = set("TWNKYXC")


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("name", OPS)
def test_the_kernels_text_in_fp32_and_bf16(host_device: Any, name: str, reverse: bool) -> None:
    host_device.reverse, op = reverse, OPS[name]
    for dims in op.sizes[1:]:
        for indices in op.indices:
            inputs = op_inputs(name, dims, "fp32", indices)
            wanted = as_tuple(op.reference(*(x.clone() for x in inputs)))
            for got, exact in zip(host_device.run(name, *(x.clone() for x in inputs)), wanted, strict=True):
                assert (got.double() - exact.double()).norm() <= 1e-5 * exact.double().norm()
            # bf16 against fp32 on the same, rounded, inputs
            rounded = op_inputs(name, dims, "bf16", indices)
            wide = as_tuple(op.reference(*(x.float() if x.dtype == torch.bfloat16 else x.clone() for x in rounded)))
            for got, exact in zip(host_device.run(name, *(x.clone() for x in rounded)), wide, strict=True):
                assert (got.double() - exact.double()).norm() <= 4e-3 * exact.double().norm()


def body_of(op: Op, dims: dict[str, int]) -> onnxruntime.InferenceSession:
    def info(tensors: Any, ending: str = "") -> list[Any]:
        types = {"compute": TensorProto.FLOAT, "fp32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        return [
            helper.make_tensor_value_info(
                t.name + ending, types[t.dtype], [f.replace("/", "_") if set(f) & (VARIES | set(op.spec.free)) else size_of(f, dims) for f in t.shape]
            )
            for t in tensors
        ]  # fmt: skip

    inputs, outputs = info(op.spec.inputs), info(op.spec.outputs, "_out")
    node = helper.make_node(
        op.name, [i.name for i in inputs], [o.name for o in outputs], domain=DOMAIN, **PLUGIN_ATTRIBUTES
    )
    model = helper.make_model(
        helper.make_graph([node], op.name, inputs, outputs), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    attach_functions(model)
    return onnxruntime.InferenceSession(onnx.inliner.inline_local_functions(model).SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name != "ray_prepare_softmax_clip"])
def test_the_body_equals_the_reference_at_every_length(name: str) -> None:
    op, dims = OPS[name], OPS[name].sizes[2]
    session = body_of(op, dims)
    for frames in (3, 4) if "T" in dims else (1,):
        for indices in op.indices:
            inputs = op_inputs(name, {**dims, **({"T": frames} if "T" in dims else {})}, "fp32", indices)
            got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
            for ours, exact in zip(got, as_tuple(op.reference(*inputs)), strict=True):
                assert (torch.from_numpy(ours) - exact).norm() <= 1e-5 * exact.norm()


def test_a_thousand_chunks_do_not_drift() -> None:
    """The carried state in fp32 against float64, after 10 chunks and after 1000."""
    op, dims = op_named("gdn_scan"), {"T": 3, "P": 6, "H": 2, "D": 16}
    *_, state, norm = op_inputs("gdn_scan", dims, "fp32")
    wide, errors = (state.double(), norm.double()), {}
    for chunk in range(1, 1001):
        *inputs, _, _ = op_inputs("gdn_scan", dims, "fp32", seed=chunk)
        _, state, norm = op.reference(*inputs, state, norm)
        q, k, v, beta, gate, cos, sin = (x.double() for x in inputs)
        even, odd = k[..., 0::2], k[..., 1::2]
        turned = torch.stack(
            (even * cos[:, :, None] - odd * sin[:, :, None], even * sin[:, :, None] + odd * cos[:, :, None]), -1
        ).flatten(-2)
        wide = tuple(
            carried_on(keys, values, beta, gate, start)
            for keys, values, start in (
                (turned, v, wide[0]),
                (k, torch.ones_like(v[..., :1]), wide[1].reshape(2, 16, -1)),
            )
        )
        if chunk in (10, 1000):
            errors[chunk] = [
                float((one - exact.reshape(one.shape)).norm() / exact.norm()) for one, exact in zip((state, norm), wide)
            ]
    assert all(late <= 2 * max(early, 1e-7) for early, late in zip(errors[10], errors[1000])), errors
    assert max(errors[1000]) < 1e-5


def carried_on(k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, state: Tensor) -> Tensor:
    for frame in range(len(k)):
        weighted = (k * beta[..., None])[frame].permute(1, 2, 0)
        keys, values = k[frame].transpose(0, 1), v[frame].transpose(0, 1)
        state = gate[frame][:, None, None] * (state - weighted @ (keys @ state)) + weighted @ values
    return state


def test_sizes_that_do_not_suit_are_refused() -> None:
    with pytest.raises(LongtakeError, match=r"(?s)a slot is too small.*got: 8 elements.*at most 7"):
        dims_from_shapes(op_named("slot_write").spec, [(8,), (2, 7), (1,)])
    shapes = [(1, 1, 1, 12), (1, 1, 4, 4), (1, 1, 3), (1, 1, 3)]
    with pytest.raises(LongtakeError, match=r"(?s)groups of 4.*got: D=12"):
        dims_from_shapes(op_named("ray_restore").spec, shapes)


def test_a_slot_that_is_written_leaves_the_others(host_device: Any) -> None:
    value, state, _ = op_inputs("slot_write", {"N": 5, "S": 2, "K": 7}, "fp32")
    for slot, place in ((0, 0), (1, 1), (2, 0), (-1, None)):
        got = op_named("slot_write").reference(value, state, torch.tensor([slot], dtype=torch.int32))
        for i in range(2):
            wanted = state[i].clone()
            if i == place:
                wanted[:5] = value
            assert torch.equal(got[i], wanted)
