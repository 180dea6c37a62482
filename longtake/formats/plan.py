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
from longtake.plugins.kernels import kernels_of
from longtake.plugins.nvrtc import source_digest
from longtake.plugins.spec import PLUGIN_VERSION
from longtake.record import Kind

KIND = Kind("a plan manifest", "`longtake engines`", "build it again: longtake engines --recipe NAME")
REBUILD = "build it again: longtake engines --recipe {recipe}"


@dataclass(frozen=True)
class PlanManifest:
    """Everything a plan depends on.

    plan: file name. network: engine spec name, or that of a segment. onnx_sha256: digest of the ONNX it came from.
    plugins: op name -> {"version", "kernel" (source digest)} of the ops inside the plan. spec: its bindings.
    layers, seconds: what the build said, for people.
    scratch_bytes: device memory that a context wants while it runs, as the build said; None if it did not.
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
    return {op: {"version": PLUGIN_VERSION, "kernel": source_digest(kernels_of(op).source)} for op in sorted(set(ops))}


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
    _check_identity(plan, manifest, network, spec, fix)
    _check_machine(plan, manifest, flavour, compute_capability, fix)
    return content, manifest


def verify_plan(plan: Path, flavour: Flavour, compute_capability: str | None, **expected: Any) -> PlanManifest:
    """`read_plan` for callers that only want the verdict."""
    return read_plan(plan, flavour, compute_capability, **expected)[1]


def _intact_bytes(plan: Path, manifest: PlanManifest, fix: str) -> bytes:
    if not plan.is_file():
        raise LongtakeError(f"{plan} does not exist", expected="the plan its manifest describes", fix=fix)
    size = plan.stat().st_size
    if size != manifest.size:
        raise IntegrityError(
            f"{plan} is truncated or altered", got=f"{size} bytes", expected=f"{manifest.size} bytes", fix=fix
        )
    content = plan.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.sha256:
        raise IntegrityError(
            f"{plan} was altered", got=f"sha256 {digest}", expected=f"sha256 {manifest.sha256}", fix=fix
        )
    return content


def _check_identity(
    plan: Path, manifest: PlanManifest, network: str | None, spec: dict[str, Any] | None, fix: str
) -> None:
    if manifest.plan != plan.name or network not in (None, manifest.network):
        raise IntegrityError(
            f"{plan} was swapped: its manifest describes another plan",
            got=f"{manifest.plan}, network {manifest.network}",
            expected=f"{plan.name}, network {network or manifest.network}",
            fix=fix,
        )
    if spec is not None and spec != manifest.spec:
        raise IntegrityError(
            f"{plan} was built for another engine spec",
            got=_first_difference(manifest.spec, spec),
            expected=_first_difference(spec, manifest.spec),
            fix=fix,
        )


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    key = next((k for k in (*one, *other) if one.get(k) != other.get(k)), "")
    mine, theirs = one.get(key), other.get(key)
    if isinstance(mine, list) and isinstance(theirs, list):
        return f"{key}: {next((a for a in mine if a not in theirs), f'{len(mine)} entries')}"
    return f"{key}: {mine}"


def _check_machine(
    plan: Path, manifest: PlanManifest, flavour: Flavour, compute_capability: str | None, fix: str
) -> None:
    if (manifest.flavour, manifest.version) != (flavour.name, flavour.version):
        got = f"{manifest.flavour} {manifest.version}"
        raise UnavailableError(f"{plan} was built by another TensorRT", got=got, expected=flavour.label, fix=fix)
    if compute_capability not in (None, manifest.compute_capability):
        raise UnavailableError(
            f"{plan} was built for another GPU",
            got=f"compute capability {manifest.compute_capability}",
            expected=f"compute capability {compute_capability}",
            fix=f"build a recipe for compute capability {compute_capability}",
        )
    current = plugin_identities(list(manifest.plugins))
    for op, identity in manifest.plugins.items():
        if identity != current[op]:
            raise UnavailableError(
                f"{plan} was built with another version of plugin {op}", got=identity, expected=current[op], fix=fix
            )
