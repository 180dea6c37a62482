"""The linear ops through cuBLASLt, which torch calls: launchers like those of our kernels, over the same addresses.

The output goes where the executor wants it and nothing is allocated but cuBLASLt's workspace, which torch keeps for each
stream (32 MiB on Hopper, CUBLASLT_WORKSPACE_SIZE changes it), so a CUDA graph can capture a launch. prepare() multiplies
once: what fails must fail before the run, and cuBLAS's handle and workspace must be there before a capture.

bf16: bias and GELU (tanh) are the product's epilogue, in fp32 before the one rounding.
fp8: E4M3 codes with scales of 1, A by rows and B by columns, as cuBLASLt wants them; [N, K] is B by columns as it stands.
Whole ones (linear_rows_fp8) have a scale a row of W and the bias in the epilogue; A's scales, one a token, are 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.errors import LongtakeError, UnavailableError
from longtake.machine.capability import linear_method
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.kernels import Dims, shape_of
from longtake.plugins.launch import TORCH_DTYPES, OpLauncher, compute_capability_of
from longtake.plugins.spec import LINEAR_OPS

log = logging.getLogger(__name__)

FAST_ACCUMULATION = True
"""Hopper's tensor cores add E4M3 products up in about 14 bits. With fast accumulation a sum stays in there to its end;
without, cuBLASLt moves it to fp32 registers every 128 products or so. On an H100 a product is off by 0.2 to 0.4 %
(relative L2), promoted by 0.07 %, at nearly the same speed (`longtake bench kernels linear`). Rounding to E4M3
costs 3.7 %: fast accumulation is not what limits accuracy."""

SIZE_STEP = 16  # cuBLASLt's FP8 wants K and N in multiples of it


class CublasLtLinear(OpLauncher):
    """One of LINEAR_OPS. dims: T, N and K. fast: whether FP8 products are added up with fast accumulation."""

    method = "cublaslt"

    def __init__(self, op_name: str, dims: Dims, fast: bool = FAST_ACCUMULATION) -> None:
        super().__init__(LINEAR_OPS[op_name], dims)
        self.fast = fast
        self._one: Tensor | None = None
        if op_name.endswith("fp8") and (dims["N"] % SIZE_STEP or dims["K"] % SIZE_STEP):
            raise UnavailableError(
                "cuBLASLt does not multiply these sizes in FP8", got=f"N={dims['N']}, K={dims['K']}",
                expected=f"multiples of {SIZE_STEP}", fix="set linears: engine in the recipe",
            )  # fmt: skip

    def prepare(self) -> CublasLtLinear:
        """See OpLauncher.prepare. Raises UnavailableError if the library declines the sizes. Takes memory for a moment."""
        if self._one is None:
            one = self.ones("cuda")
            kinds = [TORCH_DTYPES["bf16" if t.dtype == "compute" else t.dtype] for t in self._tensors]
            try:
                self.multiply(*(one.new_zeros(s, dtype=t) for s, t in zip(self._shapes(), kinds)), one=one)
            except RuntimeError as error:
                raise UnavailableError(
                    f"cuBLASLt does not run {self.spec.name}", got=f"{self.dims}: {error}",
                    fix="set linears: engine in the recipe",
                ) from None  # fmt: skip
            self._one = one
        return self

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See OpLauncher.launch."""
        self._check(pointers, workspace, table_len)
        self.prepare()
        kinds = (TORCH_DTYPES["bf16" if t.dtype == "compute" else t.dtype] for t in self._tensors)
        tensors = [tensor_at(*given) for given in zip(pointers, self._shapes(), kinds)]
        with on_stream(stream):
            self.multiply(*tensors, one=self._one)

    def ones(self, device: str) -> Tensor:
        """What `multiply` takes as the scale of FP8 activations: fp32 1, or one for each token."""
        return torch.ones((self.dims["T"], 1) if self.spec.name == "linear_rows_fp8" else (), device=device)

    def multiply(self, *tensors: Tensor, one: Tensor | None) -> None:
        """Inputs, then the output, all contiguous; `one` is `ones` on their device."""
        *given, out = tensors
        x, weight = given[0], given[1].t()
        if self.spec.name == "linear_fp8":
            _scaled_mm(x, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=self.fast, out=out)
        elif self.spec.name == "linear_rows_fp8":
            _scaled_mm(
                x, weight, one, given[2][None], given[3], out_dtype=torch.bfloat16, use_fast_accum=self.fast, out=out
            )
        elif self.spec.name == "linear_gelu_bf16":
            torch.ops.aten._addmm_activation.out(given[2], x, weight, use_gelu=True, out=out)
        else:
            torch.addmm(given[2], x, weight, out=out)

    @property
    def _tensors(self) -> tuple[Any, ...]:
        return (*self.spec.inputs, *self.spec.outputs)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(tensor, self.dims) for tensor in self._tensors]


def _scaled_mm(*tensors: Any, **options: Any) -> None:
    torch.ops.aten._scaled_mm.out(*tensors, **options)


def linear_launcher(op_name: str, dims: Dims, compute_capability: str = "") -> OpLauncher:
    """The library's launcher of a linear op for this GPU, prepared.

    Raises:
        UnavailableError: the capability table has none, or the library declines the sizes.
        LongtakeError: no such op.
    """
    if op_name not in LINEAR_OPS:
        raise LongtakeError("no library runs this op", got=op_name, expected=", ".join(LINEAR_OPS))
    compute_capability = compute_capability_of(compute_capability)
    kind = op_name.rpartition("_")[2]
    method = linear_method(compute_capability, kind)
    if method is None:
        raise UnavailableError(
            f"no library runs {op_name} here", got=f"compute capability {compute_capability}",
            fix="set linears: engine in the recipe",
        )  # fmt: skip
    log.info("%s [%s] runs through %s", op_name, " x ".join(str(dims[n]) for n in "TKN"), method)
    return CublasLtLinear(op_name, dims).prepare()
