"""Per-layer times in trtexec's `--exportProfile` format, whoever measured them, and as a readable table.

The format is a list: {"count": runs}, then one {"name", "timeMs", "averageMs", "medianMs", "percentage"} a layer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import read_json
from longtake.training.models.network_spec import NetworkSpec

WARM_UP = 2
KERNEL_SUFFIX = "_kernel_time"  # how ONNX Runtime marks the event that covers a node's arithmetic


class LayerTimes:
    """Times by layer in milliseconds, in order of first appearance: one value a run."""

    def __init__(self) -> None:
        self.by_layer: dict[str, list[float]] = defaultdict(list)

    def add(self, layer: str, milliseconds: float) -> None:
        self.by_layer[layer].append(milliseconds)

    def drop_first(self, runs: int) -> LayerTimes:
        """Without the first `runs` values of each layer (warm-up)."""
        kept = LayerTimes()
        for layer, values in self.by_layer.items():
            kept.by_layer[layer] = values[runs:]
        return kept

    def as_json(self) -> list[dict[str, Any]]:
        """trtexec's export-profile format."""
        totals = {layer: sum(values) for layer, values in self.by_layer.items() if values}
        whole = sum(totals.values()) or 1.0
        runs = max((len(values) for values in self.by_layer.values()), default=0)
        rows = [
            {
                "name": layer,
                "timeMs": round(total, 6),
                "averageMs": round(total / len(self.by_layer[layer]), 6),
                "medianMs": round(statistics.median(self.by_layer[layer]), 6),
                "percentage": round(100 * total / whole, 3),
            }
            for layer, total in totals.items()
        ]
        return [{"count": runs}, *rows]


def profile_from_file(path: Path) -> list[dict[str, Any]]:
    """Read a profile that trtexec or this module wrote.

    Raises:
        IntegrityError: it is not in that format.
    """
    rows = read_json(path)
    good = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) and "count" in rows[0]
    if not good or any("name" not in row or "averageMs" not in row for row in rows[1:]):
        raise IntegrityError(f"{path} is no profile", expected='[{"count": ...}, {"name", "averageMs", ...}, ...]')
    return rows


def table(rows: list[dict[str, Any]], top: int = 20) -> list[str]:
    """The slowest `top` layers as lines, with what the rest adds up to."""
    layers = sorted(rows[1:], key=lambda row: -row["averageMs"])
    whole = sum(row["averageMs"] for row in layers)
    lines = [f"{'ms':>10} {'median':>10} {'%':>6}  layer"]
    for row in layers[:top]:
        median, share = row.get("medianMs", row["averageMs"]), row.get("percentage", 0.0)
        lines.append(f"{row['averageMs']:10.4f} {median:10.4f} {share:6.2f}  {row['name']}")
    rest = layers[top:]
    if rest:
        lines.append(f"{sum(row['averageMs'] for row in rest):10.4f} {'':10} {'':6}  ({len(rest)} more layers)")
    lines.append(f"{whole:10.4f} {'':10} {'':6}  sum of {len(layers)} layers, mean of {rows[0]['count']} runs")
    return lines


def timing_feed(spec: NetworkSpec) -> dict[str, np.ndarray]:
    """Inputs in fp32, int32 and int8 that cost what real ones do: the longest window read, its last slot written."""
    largest = {name: sizes[2] for name, sizes in spec.profile}
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for b in spec.inputs:
        shape = [largest[size] if isinstance(size, str) else size for size in b.shape]
        if b.name == "table":
            feed[b.name] = np.array([*range(shape[0] - 1), -1], np.int32)
        elif b.name == "write_slot":
            feed[b.name] = np.full(shape, largest["W"] - 1, np.int32)
        elif b.dtype in ("int32", "int8"):
            feed[b.name] = np.ones(shape, np.int32 if b.dtype == "int32" else np.int8)
        else:
            feed[b.name] = rng.standard_normal(shape, np.float32)
    return feed


def reference_profile(view: Path, feed: Mapping[str, np.ndarray], runs: int, threads: int) -> list[dict[str, Any]]:
    """Per-node times of ONNX Runtime on the CPU over the view file `view`: a reference, no TensorRT figure.

    Raises:
        LongtakeError: ONNX Runtime cannot load the file or run it with `feed`.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="longtake-profile-") as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.intra_op_num_threads = True, threads
        options.profile_file_prefix = str(Path(folder) / "ort")
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(view), options, providers=["CPUExecutionProvider"])
            read = {value.name for value in session.get_inputs()}
            for _ in range(runs + WARM_UP):
                session.run(None, {name: value for name, value in feed.items() if name in read})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise LongtakeError(f"ONNX Runtime cannot run {view}", got=str(error).splitlines()[0]) from None
    return times_from_ort_events(events).drop_first(WARM_UP).as_json()


def times_from_ort_events(events: Iterable[Mapping[str, Any]]) -> LayerTimes:
    """Layer times from ONNX Runtime's trace events; a node is named `op: node name`.

    The time of an `If` holds that of the nodes inside its branch, which are therefore left out.
    """
    times, inside_until = LayerTimes(), -1.0
    nodes = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(KERNEL_SUFFIX)]
    for event in sorted(nodes, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] < inside_until:
            continue
        op = event["args"].get("op_name", "?")
        times.add(f"{op}: {event['name'].removesuffix(KERNEL_SUFFIX)}", event["dur"] / 1000)
        if op == "If":
            inside_until = event["ts"] + event["dur"]
    return times


def trtexec_profile(trtexec: Path, plan: Path, runs: int) -> list[dict[str, Any]]:
    """Per-layer times of a plugin-free plan through trtexec. Thin adapter, not run: no trtexec was at hand.

    Raises:
        UnavailableError: trtexec failed; its last line is quoted.
    """
    with tempfile.TemporaryDirectory(prefix="longtake-profile-") as folder:
        exported = Path(folder) / "profile.json"
        command = [str(trtexec), f"--loadEngine={plan}", f"--exportProfile={exported}", f"--iterations={runs}"]
        command += ["--separateProfileRun", f"--warmUp={WARM_UP}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not exported.is_file():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UnavailableError(
                f"trtexec could not profile {plan.name}",
                got=said[-1] if said else f"exit code {done.returncode}",
                fix="profile through TensorRT from Python: --without-trtexec",
            )
        return profile_from_file(exported)
