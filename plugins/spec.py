"""The types that describe an op: each op.py fills them in, and registry.py makes everything else of them.

Legend: S slots, L tokens of a block, H heads, D head_dim, W window length, N out features, K in features, T tokens; of a
video stream T frames of a step, F frames of history, Y, X sizes of a frame, C channels, N channels that come out; of the
DiT's blocks C features, F latent frames of a chunk, E text length; P tokens of a frame, where T are a chunk's.
Packed bytes are typed INT8 everywhere: the runtimes that must carry them have no common 4-bit or FP8 type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longtake.plugins.kernels import COMPUTE_DTYPES, Dims, Kernel

DOMAIN = "longtake"
PLUGIN_NAMESPACE = "longtake"
PLUGIN_VERSION = "1"
PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}  # of an ONNX node


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of an op. `dtype` is "compute" (the activation dtype), "int8", "int32", "fp32" or "fp8" (E4M3).

    `shape` names dimensions by letter or gives a formula in them, such as "D/2", "H*D", "T+F" or "T-2": what comes out
    has the shape that its formulas say (see shapes.py).
    channels_last: a weight [N,C,t,y,x] that lies in memory with its channels last, where a library reads it.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    channels_last: bool = False


@dataclass(frozen=True)
class OpSpec:
    """What an op looks like.

    name: torch op name (`longtake::<name>`), also the ONNX op type and the plugin name.
    aliases: output index -> input index that it is written over, in place.
    may_share: output index -> input index that may lie in the output's last bytes: whoever writes an element there has
        read the input's element of that place, and nobody else reads it.
    check: raises LongtakeError for dims that contradict each other, beyond what the shapes say.
    multiple: what its features must be a multiple of.
    most: the largest sizes of dims that vary in an exported body, where there is a bound.
    free: dims that vary in its exported body although they do not in those of other ops.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[int, int], ...] = ()
    may_share: tuple[tuple[int, int], ...] = ()
    check: Callable[[Dims], None] | None = None
    multiple: int = 16
    most: tuple[tuple[str, int], ...] = ()
    free: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs: the order of a launch's addresses."""
        return (*self.inputs, *self.outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in that order."""
        return tuple(tensor.name for tensor in self.tensors)


@dataclass(frozen=True)
class Library:
    """A launcher in Python, which calls a library or kernels of its own.

    method: a method's name in longtake/machine/capability.py. load: imports and returns the launchers by method, each
    made from (op, dims): nothing of a library is imported before one is wanted.
    """

    method: str
    load: Callable[[], Mapping[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Op:
    """All that is known of an op.

    reference: the plain PyTorch truth; inputs as in the spec. It exports to ONNX as it stands.
    ways: what it can be run by. methods: those to try for (compute capability, dims, what attention is computed in), the
        fastest first; None: all, in their order. otherwise: what helps where none runs it.
    sizes: dims that tests, sanitizer and benches run it with, the plain ones first.
    inputs: tensors by name that random numbers won't do for, from (spec, dims, compute dtype, generator).
    indices: write slots, or tables, to try it with. tolerance: relative L2 error by compute dtype; none: bits are equal.
    quantized: the op that gives the last output as E4M3 codes. first_frame: the op that stands for this one where a
        stream's first latent means one frame. repeats: frames made of each, by an op that only repeats.
    splits_by_frame: whether it may be run on some frames after others, each output frame from those at its place.
    codes: the 8-bit codes (codes.py) that a convolution reads, or that an op before one writes. in_codes: what it is
        called in codes, without their name, if not as before: an upsampling and the convolution behind it are folded (conv8).
    over_heads: whether its first launch finds the largest of something over all heads, fp32 in its workspace: where ranks
        have some heads each, they must exchange it before the second.
    """

    spec: OpSpec
    reference: Callable[..., Any]
    ways: tuple[Kernel | Library, ...]
    sizes: tuple[dict[str, int], ...]
    inputs: Callable[[OpSpec, Dims, Any, Any], Mapping[str, Any]] | None = None
    methods: Callable[[str, Dims, str], Sequence[str]] | None = None
    otherwise: str = ""
    indices: tuple[tuple[int, ...], ...] = ((0,),)
    tolerance: Mapping[str, float] = field(default_factory=dict)
    quantized: str = ""
    first_frame: str = ""
    repeats: int = 0
    splits_by_frame: bool = False
    codes: str = ""
    in_codes: str = ""
    over_heads: bool = False

    @property
    def name(self) -> str:
        """That of its spec."""
        return self.spec.name

    @property
    def kernel(self) -> Kernel | None:
        """Our kernel, if it has one: then it is a plugin as well. The others run between engines only."""
        return next((way for way in self.ways if isinstance(way, Kernel)), None)

    @property
    def runs_in(self) -> Literal["kernel", "library"]:
        """Whether a kernel of ours runs it anywhere, or only a library."""
        return "kernel" if self.kernel else "library"

    @property
    def compute_dtypes(self) -> tuple[str, ...]:
        """The activation dtypes that its inputs may have; bf16 comes out of an op without any."""
        return COMPUTE_DTYPES if any(t.dtype == "compute" for t in self.spec.inputs) else COMPUTE_DTYPES[:1]

    @property
    def in_place(self) -> bool:
        """Whether it writes over an input."""
        return bool(self.spec.aliases)

    @property
    def reads_table(self) -> bool:
        """Whether it reads the slots that a table lists."""
        return any(tensor.shape == ("W",) for tensor in self.spec.inputs)

    @property
    def unpacks_weight(self) -> bool:
        """Whether it makes a weight of 4-bit values and their scales."""
        return self.spec.names[:2] == ("values", "scales")

    @property
    def of_frames(self) -> bool:
        """Whether it works on a video stream's frames, [T, Y, X, C]."""
        return self.spec.inputs[0].shape[1:3] == ("Y", "X")

    @property
    def extends_stream(self) -> bool:
        """Whether it puts a stream's history before its frames, and keeps the new one."""
        return self.of_frames and self.in_place

    @property
    def doubles_frames(self) -> bool:
        """Whether two frames come out for each."""
        return self.spec.outputs[0].shape[0] == "2*T"

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Frames, rows and columns that a convolution sees; none of another op."""
        weights = (tensor for tensor in self.spec.inputs if tensor.channels_last)
        return next((tuple(map(int, tensor.shape[2:])) for tensor in weights), ())
