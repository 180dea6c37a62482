"""Choose among a convolution's plans: what is built and timed once a GPU, and remembered in the cache folder.

cuDNN's first guess can be half as fast as the best of its plans, so several are timed; how many is bounded by number and
by time, because some are compiled on the spot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.cuda_streams import event_times
from longtake.errors import LongtakeError, UnavailableError
from longtake.files import read_json, write_json
from longtake.plugins.conv.cudnn_conv import CudnnConv
from longtake.plugins.kernels import Dims
from longtake.settings import settings_from_environment

log = logging.getLogger(__name__)

PLANS, SECONDS = 8, 1.0  # per convolution at most, at a start; the first plan that runs is always tried
REPEATS = 3
WORKSPACE_BYTES = 128 << 20  # plans that want more are left out
FILE = "conv_plans.json"


def timed_plans(
    conv: CudnnConv, pointers: Mapping[str, int], plans: int = PLANS, seconds: float = SECONDS
) -> Iterator[dict[str, Any]]:
    """Build and time plans one by one: {plan, workspace, ms}, or {plan, note} for one that fails.

    `pointers`: of tensors of the graph's sizes. Stops after `plans` that ran or `seconds` from the first one on.
    """
    begun, ran = time.perf_counter(), 0
    for plan in conv.plans:
        if ran and (ran >= plans or time.perf_counter() - begun > seconds):
            return
        row: dict[str, Any] = {"plan": plan}
        try:
            row["workspace"] = conv.build(plan)
            if row["workspace"] > WORKSPACE_BYTES:
                raise UnavailableError("too large a workspace", got=row["workspace"], expected=WORKSPACE_BYTES)
            row["ms"] = _time(conv, plan, pointers, row["workspace"])
            ran += 1
        except Exception as error:  # cuDNN's types, RuntimeError, LongtakeError
            row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield row


def _time(conv: CudnnConv, plan: str, pointers: Mapping[str, int], workspace: int) -> float:
    memory = torch.empty(workspace + 1, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream

    def work() -> None:
        conv.run(plan, pointers, memory.data_ptr(), stream)

    work()  # to warm up
    return min(event_times(work, REPEATS))


def choice_key(op_name: str, dims: Dims) -> str:
    """What a choice depends on: the op, its sizes, the GPU and cuDNN's version."""
    sizes = "x".join(str(dims[letter]) for letter in "TYXCN")
    return f"{op_name} {sizes}, {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"


def _file() -> Path:
    return settings_from_environment().cache_dir / FILE


def remembered(key: str) -> str:
    """The plan chosen for `key` at an earlier start, or ""."""
    try:
        found = read_json(_file()).get(key, "")
    except (LongtakeError, OSError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""


def remember(key: str, plan: str) -> None:
    """Keep a choice; a folder that cannot be written costs time at the next start only."""
    try:
        kept = read_json(_file()) if _file().is_file() else {}
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), {**kept, key: plan})
    except (LongtakeError, OSError, TypeError) as error:
        log.warning("the choice of convolution plans is not kept: %s", error)
