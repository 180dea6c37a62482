"""The linear ops through cuBLASLt, which torch calls: launchers like those of our kernels, over the same addresses.

The output goes where the executor wants it and nothing is allocated but cuBLASLt's workspace, which torch keeps for each
stream (32 MiB on Hopper, CUBLASLT_WORKSPACE_SIZE changes it), so a CUDA graph can capture a launch. prepare() multiplies
once: what fails must fail before the run, and cuBLAS's handle and workspace must be there before a capture.

bf16: bias and GELU (tanh) are the product's epilogue, in fp32 before the one rounding.
fp8: E4M3 codes with scales of 1, A by rows and B by columns, as cuBLASLt wants them; [N, K] is B by columns as it stands.
Whole ones (linear_rows_fp8) have a scale a row of W and the bias in the epilogue; A's scales, one a token, are 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.errors import UnavailableError
from longtake.plugins.device_memory import on_stream, tensor_at
from longtake.plugins.kernels import Dims
from longtake.plugins.launch import LibraryLauncher
from longtake.plugins.shapes import shape_of, torch_dtype
from longtake.plugins.spec import Op

FAST_ACCUMULATION = True
"""Hopper's tensor cores add E4M3 products up in about 14 bits. With fast accumulation a sum stays in there to its end;
without, cuBLASLt moves it to fp32 registers every 128 products or so. On an H100 a product is off by 0.2 to 0.4 %
(relative L2), promoted by 0.07 %, at nearly the same speed (`longtake bench kernels linear`). Rounding to E4M3
costs 3.7 %: fast accumulation is not what limits accuracy."""

SIZE_STEP = 16  # cuBLASLt's FP8 wants K and N in multiples of it


class CublasLtLinear(LibraryLauncher):
    """One of linear/op.py. dims: T, N and K. fast: whether FP8 products are added up with fast accumulation."""

    method = "cublaslt"

    def __init__(self, op: Op, dims: Dims, fast: bool = FAST_ACCUMULATION) -> None:
        super().__init__(op, dims)
        self.fast = fast
        self._one: Tensor | None = None
        if self.spec.inputs[0].dtype == "fp8" and (dims["N"] % SIZE_STEP or dims["K"] % SIZE_STEP):
            what, got = "cuBLASLt does not multiply these sizes in FP8", f"N={dims['N']}, K={dims['K']}"
            raise UnavailableError(what, got=got, expected=f"multiples of {SIZE_STEP}", fix=op.otherwise)

    def make_ready(self) -> None:
        """See LibraryLauncher: multiply zeros."""
        self._one = self.ones("cuda")
        zeros = (self._one.new_zeros(shape_of(t, self.dims), dtype=torch_dtype(t)) for t in self.spec.tensors)
        try:
            self.multiply(*zeros, one=self._one)
        except RuntimeError as error:
            what, got = f"cuBLASLt does not run {self.spec.name}", f"{self.dims}: {error}"
            raise UnavailableError(what, got=got, fix=self.op.otherwise) from None

    def run(self, pointers: Sequence[int], stream: int, workspace: int) -> None:
        """See LibraryLauncher."""
        shown = zip(pointers, self.spec.tensors)
        tensors = [tensor_at(pointer, shape_of(t, self.dims), torch_dtype(t)) for pointer, t in shown]
        with on_stream(stream):
            self.multiply(*tensors, one=self._one)

    def ones(self, device: str) -> Tensor:
        """What `multiply` takes as the scale of FP8 activations: fp32 1, or one for each token."""
        return torch.ones((self.dims["T"], 1) if self.spec.name == "linear_rows_fp8" else (), device=device)

    def multiply(self, *tensors: Tensor, one: Tensor | None) -> None:
        """Inputs, then the output, all contiguous; `one` is `ones` on their device."""
        *inputs, out = tensors
        x, weight, scaled_mm = inputs[0], inputs[1].t(), torch.ops.aten._scaled_mm.out
        if self.spec.name == "linear_fp8":
            scaled_mm(x, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=self.fast, out=out)
        elif self.spec.name == "linear_rows_fp8":
            scales, bias = inputs[2][None], inputs[3]
            scaled_mm(x, weight, one, scales, bias, out_dtype=torch.bfloat16, use_fast_accum=self.fast, out=out)
        elif self.spec.name == "linear_gelu_bf16":
            torch.ops.aten._addmm_activation.out(inputs[2], x, weight, use_gelu=True, out=out)
        else:
            torch.addmm(inputs[2], x, weight, out=out)
