"""What stands beside every plan, `<plan>.json`, and the check that comes before anything is deserialised.

A plan is executable code, and TensorRT's own validity check detects no tampering: only the digest here does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.machine.flavour import Flavour
from longtake.plugins.nvrtc import source_digest
from longtake.plugins.registry import kernel_of
from longtake.plugins.spec import PLUGIN_VERSION
from longtake.record import Kind
from longtake.version import __version__

KIND = Kind(
    "a plan manifest", "`longtake engines`", "build it again: longtake engines --recipe NAME", format=2, oldest=2
)
REBUILD = "build it again: longtake engines --recipe {recipe}"


@dataclass(frozen=True)
class PlanManifest:
    """Everything a plan depends on.

    plan: file name. network: engine spec name, or that of a segment. onnx_sha256: digest of the ONNX it came from.
    plugins: op name -> {"version", "kernel" (source digest)} of the ops inside the plan. spec: its bindings.
    layers, seconds: what the build said, for people.
    scratch_bytes: device memory that a context wants while it runs, as the build said; None if it did not.
    cuda: major version that the TensorRT which built it is for. longtake: the version of ours that did.
    """

    plan: str
    network: str
    sha256: str
    size: int
    onnx_sha256: str
    flavour: str
    version: str
    compute_capability: str
    plugins: dict[str, dict[str, str]]
    spec: dict[str, Any]
    recipe: str
    preset: str
    layers: int = 0
    seconds: float = 0.0
    scratch_bytes: int | None = None
    cuda: str = ""
    longtake: str = __version__

    @classmethod
    def read(cls, plan: Path) -> PlanManifest:
        """The manifest beside `plan`.

        Raises:
            IntegrityError: there is none, it is not one, or of another format.
        """
        path = manifest_path(plan)
        if not path.is_file():
            raise IntegrityError(f"{plan} has no manifest", expected=f"{path.name} beside it", fix=KIND.remake)
        return KIND.read(cls, path)

    def write(self, plan: Path) -> None:
        """Write it beside `plan`, atomically."""
        KIND.write(self, manifest_path(plan))


def manifest_path(plan: Path) -> Path:
    """`dit.plan` -> `dit.plan.json`."""
    return plan.with_name(plan.name + ".json")


def plugin_identities(ops: Sequence[str]) -> dict[str, dict[str, str]]:
    """Version and kernel digest of each op, as recorded in manifests."""
    return {op: {"version": PLUGIN_VERSION, "kernel": source_digest(kernel_of(op).source)} for op in sorted(set(ops))}


def read_plan(
    plan: Path,
    flavour: Flavour,
    compute_capability: str | None,
    *,
    network: str | None = None,
    spec: dict[str, Any] | None = None,
) -> tuple[bytes, PlanManifest]:
    """The bytes of a plan, checked against its manifest and this machine; only these bytes may be deserialised.

    Args:
        compute_capability: of the GPU at hand, or None to leave that out (inspecting on a machine without one).
        network, spec: what the caller takes the plan for, if it knows.

    Raises:
        IntegrityError: missing, truncated, altered or swapped, or made for another spec.
        UnavailableError: made for another TensorRT, GPU or plugin version.
    """
    manifest = PlanManifest.read(plan)
    fix = REBUILD.format(recipe=manifest.recipe)
    content = _intact_bytes(plan, manifest, fix)
    there, wanted = (
        f"{manifest.plan}, network {manifest.network}",
        f"{plan.name}, network {network or manifest.network}",
    )
    _require_same(IntegrityError, f"{plan} was swapped: its manifest describes another plan", there, wanted, fix)
    if spec is not None and spec != manifest.spec:
        got, expected = _first_difference(manifest.spec, spec), _first_difference(spec, manifest.spec)
        raise IntegrityError(f"{plan} was built for another engine spec", got=got, expected=expected, fix=fix)
    _require_machine(plan, manifest, flavour, compute_capability or manifest.compute_capability, fix)
    return content, manifest


def verify_plan(plan: Path, flavour: Flavour, compute_capability: str | None, **expected: Any) -> PlanManifest:
    """`read_plan` for callers that only want the verdict."""
    return read_plan(plan, flavour, compute_capability, **expected)[1]


def _require_same(error: type[LongtakeError], what: str, got: object, expected: object, fix: str) -> None:
    if got != expected:
        raise error(what, got=got, expected=expected, fix=fix)


def _intact_bytes(plan: Path, manifest: PlanManifest, fix: str) -> bytes:
    if not plan.is_file():
        raise LongtakeError(f"{plan} does not exist", expected="the plan its manifest describes", fix=fix)
    size = f"{plan.stat().st_size} bytes"
    _require_same(IntegrityError, f"{plan} is truncated or altered", size, f"{manifest.size} bytes", fix)
    content = plan.read_bytes()
    digest = f"sha256 {hashlib.sha256(content).hexdigest()}"
    _require_same(IntegrityError, f"{plan} was altered", digest, f"sha256 {manifest.sha256}", fix)
    return content


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    key = next((k for k in (*one, *other) if one.get(k) != other.get(k)), "")
    mine, theirs = one.get(key), other.get(key)
    if isinstance(mine, list) and isinstance(theirs, list):
        return f"{key}: {next((a for a in mine if a not in theirs), f'{len(mine)} entries')}"
    return f"{key}: {mine}"


def _require_machine(plan: Path, manifest: PlanManifest, flavour: Flavour, compute_capability: str, fix: str) -> None:
    built = f"{manifest.flavour} {manifest.version}"
    _require_same(UnavailableError, f"{plan} was built by another TensorRT", built, flavour.label, fix)
    if flavour.cuda:
        built, here = f"CUDA {manifest.cuda or 'not recorded'}", f"CUDA {flavour.cuda}"
        _require_same(UnavailableError, f"{plan} was built for another CUDA", built, here, fix)
    what = f"{plan} was built by another version of longtake"
    _require_same(UnavailableError, what, manifest.longtake, __version__, fix)
    built, here = (f"compute capability {it}" for it in (manifest.compute_capability, compute_capability))
    other = f"build a recipe for {here}: longtake engines --recipe NAME (longtake doctor tells which)"
    _require_same(UnavailableError, f"{plan} was built for another GPU", built, here, other)
    for op, identity in manifest.plugins.items():
        what = f"{plan} was built with another version of plugin {op}"
        try:
            current = plugin_identities([op])[op]
        except LongtakeError as error:
            raise UnavailableError(
                f"{plan} was built with a plugin that is not known here",
                got=op,
                expected=str(error.expected or "one of ours"),
                fix=fix,
            ) from None
        _require_same(UnavailableError, what, identity, current, fix)
