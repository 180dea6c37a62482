"""What runs the ops of this family's blocks: the references themselves, or the operators that are exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from longtake.plugins.frame_attention.reference import frame_attention
from longtake.plugins.gated_ffn.reference import gated_ffn
from longtake.plugins.gdn_scan.reference import gdn_scan, gdn_scan_camera
from longtake.plugins.ray_transform.reference import ray_prepare_gdn, ray_prepare_softmax, ray_restore
from longtake.plugins.short_conv.reference import short_conv
from longtake.plugins.slot_write.reference import slot_write


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
    short_conv,
    gdn_scan,
    gdn_scan_camera,
    ray_prepare_gdn,
    ray_prepare_softmax,
    ray_restore,
    gated_ffn,
    frame_attention,
    slot_write,
)


def registered() -> Kit:
    """The operators that the exporter makes nodes of."""
    import torch

    import longtake.plugins.ops  # noqa: F401  (registers torch.ops.longtake)

    ops = torch.ops.longtake

    def clipped(name: str) -> Callable[..., Any]:
        return lambda *inputs: getattr(ops, f"{name}_clip" if inputs[-1] else name)(*inputs[:-1])

    plain = {name: getattr(ops, name) for name in Kit._fields if not name.startswith("ray_prepare")}
    return Kit(**plain, ray_prepare_gdn=clipped("ray_prepare_gdn"), ray_prepare_softmax=clipped("ray_prepare_softmax"))
