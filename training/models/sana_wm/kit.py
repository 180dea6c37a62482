"""What runs the ops of this family's blocks: the references themselves, or the operators that are exported."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch

from longtake.plugins.frame_attention.reference import frame_attention
from longtake.plugins.gated_ffn.reference import gated_ffn
from longtake.plugins.gdn_scan.reference import gdn_scan, gdn_scan_camera
from longtake.plugins.ray_transform.reference import ray_prepare_gdn, ray_prepare_softmax, ray_restore
from longtake.plugins.short_conv.reference import short_conv
from longtake.plugins.slot_write.reference import slot_write


def full_precision(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from making bf16 of what is stated to be fp32; does nothing where there is none, as in an export."""
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _stated(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` as it states, under autocast too."""

    @wraps(op)
    def run(*inputs: Any) -> Any:
        with full_precision(inputs[0]):
            return op(*inputs)

    return run


class Kit(NamedTuple):
    """See the references. ray_prepare_gdn and ray_prepare_softmax are told last whether a ray transform is clipped."""

    short_conv: Callable[..., Any]
    gdn_scan: Callable[..., Any]
    gdn_scan_camera: Callable[..., Any]
    ray_prepare_gdn: Callable[..., Any]
    ray_prepare_softmax: Callable[..., Any]
    ray_restore: Callable[..., Any]
    gated_ffn: Callable[..., Any]
    frame_attention: Callable[..., Any]
    slot_write: Callable[..., Any]


PLAIN = Kit(
    short_conv=short_conv,
    gdn_scan=_stated(gdn_scan),
    gdn_scan_camera=_stated(gdn_scan_camera),
    ray_prepare_gdn=_stated(ray_prepare_gdn),
    ray_prepare_softmax=_stated(ray_prepare_softmax),
    ray_restore=_stated(ray_restore),
    gated_ffn=_stated(gated_ffn),
    frame_attention=_stated(frame_attention),
    slot_write=slot_write,
)


def registered() -> Kit:
    """The operators that the exporter makes nodes of."""
    import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

    ops = torch.ops.longtake

    def clipped(name: str) -> Callable[..., Any]:
        return lambda *inputs: getattr(ops, f"{name}_clip" if inputs[-1] else name)(*inputs[:-1])

    plain = {name: getattr(ops, name) for name in Kit._fields if not name.startswith("ray_prepare")}
    return Kit(**plain, ray_prepare_gdn=clipped("ray_prepare_gdn"), ray_prepare_softmax=clipped("ray_prepare_softmax"))
