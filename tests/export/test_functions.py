"""Function bodies derived from the references: run in ONNX Runtime, they equal the references."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn

from longtake.errors import LongtakeError
from longtake.export.functions import (
    PLUGIN_ATTRIBUTES,
    attach_functions,
    function_protos,
    register_schemas,
    translation_table,
)
from longtake.plugins.cases import op_inputs
from longtake.plugins.nvfp4_dequantize.reference import decode_weight
from longtake.plugins.registry import all_ops, kernel_ops, op_named
from longtake.plugins.shapes import size_of
from longtake.plugins.spec import DOMAIN

MAKES_BF16 = ("nvfp4_dequantize", "nvfp4_dequantize_scaled", "linear_fp8")  # whatever the inputs' dtype
S, L, H, D = 4, 24, 3, 32
SIZES = {"S": S, "L": L, "H": H, "D": D, "T": 3, "P": 6, "F": 2, "Y": 5, "X": 4, "C": 16, "E": 5}
FLOAT, BF16, INT8, INT32 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT32
FP8 = TensorProto.FLOAT8E4M3FN


def shape_of(dims: Sequence[str]) -> list[int | str]:
    """Numbers where the size is fixed, names where it is dynamic."""
    sizes: list[int | str] = []
    for formula in dims:
        dynamic = any(letter in formula for letter in "WNKT")
        sizes.append(formula.replace("/", "_") if dynamic else size_of(formula, SIZES))
    return sizes


def model_of(name: str, compute: int = FLOAT) -> ModelProto:
    """A model of one node of the op, as an exported graph holds it, function body attached."""
    spec = op_named(name).spec
    kinds = {"compute": compute, "fp32": FLOAT, "int8": INT8, "int32": INT32, "fp8": TensorProto.FLOAT8E4M3FN}
    inputs = [helper.make_tensor_value_info(t.name, kinds[t.dtype], shape_of(t.shape)) for t in spec.inputs]
    outputs = [f"{t.name}_out" for t in spec.outputs]
    kinds["compute"] = BF16 if name in MAKES_BF16 else compute
    typed = [helper.make_tensor_value_info(o, kinds[t.dtype], shape_of(t.shape)) for o, t in zip(outputs, spec.outputs)]
    node = helper.make_node(name, [t.name for t in spec.inputs], outputs, domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    graph = helper.make_graph([node], name, inputs, typed)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    attach_functions(model)
    return model


def run(model: ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(o) for o in session.run(None, feeds)]


def random_block(seed: int) -> Tensor:
    """Heavy-tailed, so that blocks span the range of E4M3 scales, zeros among them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(L, H, D, generator=rng) * torch.exp(2 * torch.randn(L, H, D // 16, 1, generator=rng)).expand(
        L, H, D // 16, 16
    ).flatten(-2)
    x[0] = 0.0
    return x


def random_cache(fmt: str) -> tuple[Tensor, ...]:
    if fmt == "bf16":
        return (torch.randn(S, 2, L, H, D),)
    cache: tuple[Tensor, ...] = tuple(
        torch.zeros(shape_of(t.shape), dtype=d)
        for t, d in zip(op_named("kv_cache_write_nvfp4").spec.inputs[2:5], (torch.int8, torch.int8, torch.float32))
    )
    for slot in range(3):
        rng = torch.Generator().manual_seed(slot)
        k, v = (torch.randn(L, H, D, generator=rng) for _ in range(2))
        cache = op_named("kv_cache_write_nvfp4").reference(k, v, *cache, torch.tensor([slot], dtype=torch.int32))
    return cache


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
@pytest.mark.parametrize("inlined", [False, True])
def test_attention_body_equals_the_reference_for_every_window_length(fmt: str, inlined: bool) -> None:
    model = model_of(f"sink_attention_{fmt}")
    model = onnx.inliner.inline_local_functions(model) if inlined else model
    assert inlined == (not model.functions)
    blocks = [torch.randn(L, H, D) for _ in range(3)]
    cache = random_cache(fmt)
    for table in ((-1,), (2,), (0, -1), (0, 2, -1), (1, -1, 0, 2)):
        inputs = (*blocks, *cache, torch.tensor(table, dtype=torch.int32))
        expected = op_named(f"sink_attention_{fmt}").reference(*inputs)
        torch.testing.assert_close(run(model, inputs)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_write_body_stores_the_same_bytes_as_the_reference(fmt: str) -> None:
    model = onnx.inliner.inline_local_functions(model_of(f"kv_cache_write_{fmt}"))
    cache = random_cache(fmt)
    for seed, slot, scale in ((1, 3, 1.0), (2, 0, 1e-6), (3, 2, 1e6), (4, -1, 1.0), (5, 1, 0.0)):
        inputs = (random_block(seed) * scale, random_block(seed + 50), *cache)
        inputs = (*inputs, torch.tensor([slot], dtype=torch.int32))
        expected = op_named(f"kv_cache_write_{fmt}").reference(*inputs)
        for ours, theirs in zip(run(model, inputs), expected if isinstance(expected, tuple) else (expected,)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name, rest", [("nvfp4_dequantize", ()), ("nvfp4_dequantize_scaled", (torch.tensor(0.37),))])
def test_weight_body_is_bit_equal_and_serves_every_size(name: str, rest: tuple[Tensor, ...]) -> None:
    model = onnx.inliner.inline_local_functions(model_of(name))
    for node in model.graph.node:  # numpy has no bf16: read the exact values as fp32
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == BF16:
                attribute.i = FLOAT
    model.graph.output[0].type.tensor_type.elem_type = FLOAT
    for rows, columns in ((1, 16), (48, 96), (256, 64)):
        values = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
        scales = torch.randint(0, 127, (rows, columns // 16), dtype=torch.int8)
        exact = decode_weight(values, scales) * (rest[0] if rest else 1)
        assert torch.equal(run(model, (values, scales, *rest))[0], exact)
        assert torch.equal(op_named(name).reference(values, scales, *rest), exact.to(torch.bfloat16))


def test_norm_and_rope_body_equals_the_reference() -> None:
    model = onnx.inliner.inline_local_functions(model_of("qk_norm_rope"))
    inputs = op_inputs("qk_norm_rope", SIZES, "fp32")
    for ours, theirs in zip(run(model, inputs), op_named("qk_norm_rope").reference(*inputs)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear_bf16", "linear_gelu_bf16"])
def test_linear_body_equals_the_reference_at_every_size(name: str) -> None:
    model = onnx.inliner.inline_local_functions(model_of(name))
    for dims in op_named(name).sizes:
        inputs = op_inputs(name, dims, "fp32")
        torch.testing.assert_close(run(model, inputs)[0], op_named(name).reference(*inputs), rtol=1e-5, atol=1e-4)


def in_fp32(model: ModelProto) -> ModelProto:
    """The model with fp32 at its borders: numpy has neither bf16 nor FP8."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind not in (FP8, BF16):
            continue
        inner, into = f"{value.name}.inner", value in model.graph.input
        for node in model.graph.node:
            names = node.input if into else node.output
            names[:] = [inner if name == value.name else name for name in names]
        cast = [value.name, inner] if into else [inner, value.name]
        node = helper.make_node("Cast", [cast[0]], [cast[1]], to=kind if into else FLOAT)
        model.graph.node.insert(0 if into else len(model.graph.node), node)
        value.type.tensor_type.elem_type = FLOAT
    return model


@pytest.mark.parametrize("name", all_ops())
def test_every_body_equals_its_reference(name: str) -> None:
    op = op_named(name)
    inputs = op_inputs(name, {**SIZES, "N": 32, "K": 48}, "fp32", (1,))
    outputs = op.reference(*inputs)
    eight_bits = [t.float() if t.dtype == torch.float8_e4m3fn else t for t in inputs]
    got = run(in_fp32(model_of(name)), eight_bits)
    for ours, theirs in zip(got, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
        step = {torch.float8_e4m3fn: 2**-3, torch.bfloat16: 2**-7}.get(theirs.dtype, 1e-4)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=step, atol=1e-4 if step < 0.1 else 0.02)


@pytest.mark.parametrize("name", all_ops())
def test_one_body_serves_bf16_and_fp32_and_shapes_are_inferred(name: str) -> None:
    compute = {}
    for dtype in (BF16, FLOAT):
        model = model_of(name, dtype)
        onnx.checker.check_model(model)
        del model.graph.output[:]
        spec = op_named(name).spec
        model.graph.output.extend(onnx.ValueInfoProto(name=f"{t.name}_out") for t in spec.outputs)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        for tensor, value in zip(spec.outputs, inferred.graph.output):
            kind = value.type.tensor_type
            expected = {"compute": BF16 if name in MAKES_BF16 else dtype, "int8": INT8, "fp32": FLOAT, "fp8": FP8}
            assert kind.elem_type == expected[tensor.dtype]
            known = [size if isinstance(size, int) else 0 for size in shape_of(tensor.shape)]
            assert [d.dim_value for d in kind.shape.dim] == known
        compute[dtype] = model.functions[0].SerializeToString()
    assert compute[BF16] == compute[FLOAT]


class OneOp(nn.Module):
    """An op as the networks call it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        outputs: tuple[Tensor, ...] | Tensor = getattr(torch.ops.longtake, self.name)(*inputs)
        return outputs


class AllOps(nn.Module):
    """Every op with a kernel once, each on its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList(OneOp(name) for name in kernel_ops())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        for op in self.ops:
            count = len(op_named(str(op.name)).spec.inputs)
            outputs = op(*inputs[:count])
            made.extend((outputs,) if isinstance(outputs, Tensor) else outputs)
            inputs = inputs[count:]
        return made


@pytest.mark.slow
def test_the_exporter_emits_nodes_that_tensorrt_takes_for_plugins() -> None:
    names = [(name, tensor.name) for name in kernel_ops() for tensor in op_named(name).spec.inputs]
    inputs = [tensor for name in kernel_ops() for tensor in op_inputs(name, {**SIZES, "N": 32, "K": 48}, "bf16", (1,))]
    window = torch.export.Dim("W", min=1, max=4)
    shapes = tuple({0: window} if name == "table" and op.startswith("sink") else {} for op, name in names)
    program = torch.onnx.export(
        AllOps().eval(),
        tuple(inputs),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=(shapes,),
        custom_translation_table=translation_table(),
        verbose=False,
    )
    model = program.model_proto
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    wanted = set(kernel_ops())
    assert {node.op_type for node in nodes} == wanted == {f.name for f in model.functions}
    for node in nodes:
        attributes = {a.name: helper.get_attribute_value(a).decode() for a in node.attribute}
        assert attributes == {"plugin_namespace": "longtake", "plugin_version": "1"}
        assert len(node.input) == len(op_named(node.op_type).spec.inputs)
    attach_functions(model)
    assert len(model.functions) == len(wanted)


def test_registering_schemas_again_is_harmless() -> None:
    register_schemas()
    schema = onnx.defs.get_schema("sink_attention_nvfp4", domain=DOMAIN)
    assert set(PLUGIN_ATTRIBUTES) == set(schema.attributes)


def test_errors_say_what_the_graph_lacks() -> None:
    with pytest.raises(
        LongtakeError, match="no op of the domain 'longtake' is named 'attention'\n  expected: kv_cache"
    ):
        function_protos(["attention"], SIZES)
    with pytest.raises(LongtakeError, match="sizes of sink_attention_bf16 are not known\n.*\n  expected: also D, H, L"):
        function_protos(["sink_attention_bf16"], {"S": 4})
    two = model_of("kv_cache_write_bf16")
    other = helper.make_tensor_value_info("other", FLOAT, [S, 2, L, H, 2 * D])
    two.graph.input.append(other)
    inputs = ["k", "v", "other", "write_slot"]
    two.graph.node.append(helper.make_node("kv_cache_write_bf16", inputs, ["y"], "second", domain=DOMAIN))
    with pytest.raises(LongtakeError, match="must agree on D\n  got: 64 at node second\n  expected: 32"):
        del two.functions[:]
        attach_functions(two)
