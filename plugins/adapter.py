"""The ops as TensorRT plugins: one generic IPluginV3 around (spec, kernel), for either TensorRT flavour.

The flavour's module is passed in as `trt`; its API is the same in `tensorrt` and `tensorrt_rtx`. Building needs no GPU:
kernels are compiled and loaded at the first enqueue, so run once before capturing a CUDA graph.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

from longtake.dtypes import DTYPES
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.plugins.launch import Launcher
from longtake.plugins.nvrtc import source_digest
from longtake.plugins.registry import kernel_of, kernel_ops
from longtake.plugins.shapes import dims_from_shapes, infer_shape
from longtake.plugins.spec import PLUGIN_NAMESPACE, PLUGIN_VERSION, Op, TensorSpec

log = logging.getLogger(__name__)

DIGEST_FIELD = "kernel_digest"  # hex SHA-256 of the kernel's source, in every serialized plugin


@cache
def register_plugins(trt: Any) -> dict[str, Any]:
    """Register a creator for every op with the flavour's plugin registry, once. Returns them by op name.

    Raises:
        UnavailableError: this flavour cannot take plugins from Python.
        LongtakeError: the registry refused one.
    """
    if not hasattr(trt, "IPluginV3OneBuildV2"):
        raise UnavailableError(
            f"{trt.__name__} {trt.__version__} takes no plugins from Python",
            expected="tensorrt, or tensorrt_rtx 1.7 and later",
            fix="use a segmented recipe: it launches the kernels between engines",
        )
    registry = trt.get_plugin_registry()
    creators = {name: _creator_class(trt)(trt, op) for name, op in kernel_ops().items()}
    for name, creator in creators.items():
        if not registry.register_creator(creator, PLUGIN_NAMESPACE):
            raise LongtakeError(f"TensorRT refused plugin {name}", fix="is another version of longtake loaded as well?")
    log.debug("registered plugins %s, version %s", ", ".join(creators), PLUGIN_VERSION)
    return creators


class OpPlugin:
    """What the IPluginV3 of one op does; `_plugin_class` adds TensorRT's base classes."""

    def __init__(self, trt: Any, op: Op) -> None:
        for base in _plugin_bases(trt):
            base.__init__(self)
        self.trt, self.op, self.spec = trt, op, op.spec
        self.plugin_name = op.spec.name  # by which a built layer says what it is: see op_of_layer
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.num_outputs = len(op.spec.outputs)
        self.timing_cache_id = ""
        self._launcher: Launcher | None = None
        self._key: tuple[Any, ...] = ()

    # TensorRT: core

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.trt, self.op)

    # TensorRT: build

    def get_aliased_input(self, output_index: int) -> int:
        return dict(self.spec.aliases).get(output_index, -1)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        compute = next((t for spec, t in zip(self.spec.inputs, input_types) if spec.dtype == "compute"), None)
        return [self._dtype(tensor, compute) for tensor in self.spec.outputs]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        shapes = [
            [_Size(self.trt, builder, exprs[axis]) for axis in range(len(tensor.shape))]
            for tensor, exprs in zip(self.spec.inputs, inputs)
        ]
        outputs = (infer_shape(self.spec, output, shapes) for output in range(self.num_outputs))
        return [
            self.trt.DimsExprs([size.expr if isinstance(size, _Size) else builder.constant(size) for size in shape])
            for shape in outputs
        ]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Linear layout, and the spec's types: the first compute tensor is bf16 or fp32, the others follow it."""
        tensors = self.spec.tensors
        here = in_out[pos].desc
        if here.format != self.trt.TensorFormat.LINEAR:
            return False
        first = next(i for i, tensor in enumerate(tensors) if tensor.dtype == "compute")
        if pos == first and first < num_inputs:
            return here.type in (self.trt.DataType.BF16, self.trt.DataType.FLOAT)
        compute = in_out[first].desc.type if first < pos else None
        return here.type == self._dtype(tensors[pos], compute)

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        dims_from_shapes(self.spec, [tuple(i.max) for i in inputs])

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return kernel_of(self.op.name).workspace_bytes(dims_from_shapes(self.spec, [tuple(i.max) for i in inputs]))

    # TensorRT: run

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        dims_from_shapes(self.spec, [tuple(i.dims) for i in inputs])  # no GPU work here: the builder calls it too

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        field = self.trt.PluginField(
            DIGEST_FIELD, _digest(kernel_of(self.op.name).source), self.trt.PluginFieldType.CHAR
        )
        return self.trt.PluginFieldCollection([field])

    def set_tactic(self, tactic: int) -> None:
        pass

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the kernels on TensorRT's stream. `inputs` and `outputs` are device addresses."""
        shapes = [tuple(i.dims) for i in input_desc]
        launcher = self._launcher_for(shapes, input_desc)
        pointers = [int(pointer) for pointer in (*inputs, *outputs)]
        table_len = shapes[-1][0] if self.op.reads_table else 0
        launcher.launch(pointers, int(stream), int(workspace or 0), table_len)

    def _launcher_for(self, shapes: list[tuple[int, ...]], input_desc: Sequence[Any]) -> Launcher:
        """The launcher for these descriptors; the last one is kept, since shapes rarely change."""
        compute = next((d.type for spec, d in zip(self.spec.inputs, input_desc) if spec.dtype == "compute"), None)
        dtype = "fp32" if compute == self.trt.DataType.FLOAT else "bf16"
        key = (dtype, *shapes)
        if self._launcher is None or key != self._key:
            self._launcher, self._key = Launcher(self.op, dims_from_shapes(self.spec, shapes), dtype), key
        return self._launcher

    def _dtype(self, tensor: TensorSpec, compute: Any) -> Any:
        """TensorRT's type of a tensor; `compute` is None where no input says what it is, which means bf16."""
        if tensor.dtype == "compute":
            return compute if compute is not None else self.trt.DataType.BF16
        return getattr(self.trt.DataType, DTYPES[tensor.dtype].trt)


class OpPluginCreator:
    """Creates the plugin of one op, for the parser and for deserialization; `_creator_class` adds the base class."""

    def __init__(self, trt: Any, op: Op) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.trt, self.op, self.name = trt, op, op.spec.name
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.plugin_version = PLUGIN_VERSION
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
        """Raises IntegrityError for a serialized plugin whose kernel is not the one here."""
        if phase == self.trt.TensorRTPhase.RUNTIME:
            self._check_digest(fields)
        return _plugin_class(self.trt)(self.trt, self.op)

    def _check_digest(self, fields: Any) -> None:
        here = _digest(kernel_of(self.op.name).source).decode()
        there = [_text(field) for field in fields if field.name == DIGEST_FIELD]
        if there != [here]:
            raise IntegrityError(
                f"the engine was built with another version of plugin {self.name}",
                got=f"kernel {', '.join(d[:12] for d in there) or 'without a digest'}",
                expected=f"kernel {here[:12]}",
                fix="build the engines again: longtake engines",
            )


def op_of_layer(trt: Any, layer: Any) -> str:
    """The op that a PLUGIN_V3 layer of a parsed network is: its plugin says so, whom the node's op type chose."""
    layer.__class__ = trt.IPluginV3Layer  # get_layer() returns the base class
    return str(layer.plugin.plugin_name)


@cache
def _digest(source: Path) -> bytes:
    """source_digest, as bytes that live as long as the process: a PluginField only points to its data."""
    return source_digest(source).encode()


def _text(field: Any) -> str:
    """The characters of a CHAR field, which arrives as bytes or as an array of int8."""
    return bytes(memoryview(field.data).cast("B")).rstrip(b"\0").decode("ascii", "replace")


@dataclass(frozen=True)
class _Size:
    """A dimension in TensorRT's terms, with Python's operators: `infer_shape` works with it as with numbers."""

    trt: Any
    builder: Any
    expr: Any

    def _with(self, operation: str, other: Any) -> _Size:
        second = other.expr if isinstance(other, _Size) else self.builder.constant(other)
        kind = getattr(self.trt.DimensionOperation, operation)
        return _Size(self.trt, self.builder, self.builder.operation(kind, self.expr, second))

    __add__ = __radd__ = partialmethod(_with, "SUM")
    __sub__ = partialmethod(_with, "SUB")
    __mul__ = __rmul__ = partialmethod(_with, "PROD")
    __floordiv__ = partialmethod(_with, "FLOOR_DIV")


def _plugin_bases(trt: Any) -> tuple[Any, ...]:
    return (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)


@cache
def _plugin_class(trt: Any) -> Any:
    return types.new_class("LongtakePlugin", (OpPlugin, *_plugin_bases(trt)))


@cache
def _creator_class(trt: Any) -> Any:
    return types.new_class("LongtakePluginCreator", (OpPluginCreator, trt.IPluginCreatorV3One))
