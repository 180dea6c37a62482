"""One DiT pass taken apart: milliseconds of the engines' segments and of each kind of kernel between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.runtime.backends.segments.network import SegmentedNetwork
from longtake.runtime.profile.gpu import steps_profile
from longtake.training.models.network_spec import Binding

RUNS = 3


def dit_breakdown(backend: Any) -> dict[str, float]:
    """Milliseconds by kind of step ("segments" are linears and pointwise work), launched one by one; {} if uncut."""
    network = backend.networks["dit"]
    if not isinstance(network, SegmentedNetwork):
        return {}
    tensors = random_pass(backend)
    torch.cuda.synchronize(backend.device)  # the inputs were written on another stream
    with torch.no_grad(), torch.cuda.device(backend.device), torch.cuda.stream(torch.cuda.Stream(backend.device)):
        rows = steps_profile(network, tensors, RUNS)[1:]
    found: dict[str, float] = {}
    for row in rows:
        _, kind, name = row["name"].split(maxsplit=2)
        label = "segments" if kind == "segment" else name
        found[label] = found.get(label, 0.0) + row["averageMs"]
    return {label: round(spent, 3) for label, spent in found.items()} | {"sum": round(sum(found.values()), 3)}


def random_pass(backend: Any) -> dict[str, Tensor]:
    """Every binding of the DiT with random content and a full window; an output over an input is that input."""
    spec = backend.specs["dit"]
    tensors = {b.name: random_binding(backend, b) for b in spec.inputs}
    tensors |= {b.name: backend.allocate(b) for b in spec.outputs if b.name not in dict(spec.aliases)}
    window = tensors["table"].numel()
    tensors["table"].copy_(torch.tensor([*range(window - 1), -1]))
    tensors["write_slot"].fill_(window - 1)
    return tensors | {output: tensors[source] for output, source in spec.aliases}


def random_binding(backend: Any, binding: Binding) -> Tensor:
    """Small normal numbers, or for packed bytes any byte that is no NaN as an E4M3 scale."""
    tensor: Tensor = backend.allocate(binding)
    if tensor.dtype.is_floating_point:
        return tensor.normal_(0, 0.5).abs_() if binding.name.startswith("amax") else tensor.normal_(0, 0.5)
    return tensor.random_(0, 64) if tensor.dtype == torch.int8 else tensor.zero_()
