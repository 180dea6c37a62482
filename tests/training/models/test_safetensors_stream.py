"""The stream writer writes what safetensors itself writes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from safetensors.torch import save_file

from longtake.training.models.safetensors_stream import write_tensors


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.bool, torch.int64)
    tensors = {f"{kind}.{i}": torch.ones(5, i + 1).to(kind) for i, kind in enumerate(dtypes)}
    tensors |= {"b": torch.randn(3, 4), "a": torch.randn(4, 3).T, "no rows": torch.zeros(0, 4), "ä": torch.tensor(1.5)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    out, done = io.BytesIO(), list[int]()
    digest = write_tensors(out, tensors, tensors.__getitem__, done.append)
    assert out.getvalue() == (tmp_path / "theirs.safetensors").read_bytes()
    assert digest == hashlib.sha256(out.getvalue()).hexdigest()
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())
