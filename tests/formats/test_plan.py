"""No plan that is not exactly what its manifest says, for this machine, is ever deserialised."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import read_json, write_json
from longtake.formats.plan import (
    PlanManifest,
    manifest_path,
    plugin_identities,
    verify_plan,
)
from longtake.machine.flavour import Flavour

RTX = Flavour("tensorrt_rtx", "1.7.1.116", None, "test")
SPEC = {"name": "dit", "inputs": [["latents", "fp32", [1, 2]]], "outputs": []}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path, content = tmp_path / "dit.plan", b"plan bytes" * 100
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    plugins = plugin_identities(["sink_attention_nvfp4"])
    manifest = PlanManifest(
        "dit.plan", "dit", digest, len(content), "0" * 64, RTX.name, RTX.version, "8.9", plugins, SPEC, "r", "tiny"
    )
    manifest.write(path)
    return path


def edit(plan: Path, /, **changes: object) -> None:
    write_json(manifest_path(plan), {**read_json(manifest_path(plan)), **changes})


def test_an_intact_plan_passes(plan: Path) -> None:
    assert verify_plan(plan, RTX, "8.9", network="dit", spec=SPEC) == PlanManifest.read(plan)


def flip_bit(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[17] ^= 1
    plan.write_bytes(content)


def swap(plan: Path) -> None:
    other = plan.with_name("vae_first.plan")
    for source, target in ((plan, other), (manifest_path(plan), manifest_path(other))):
        shutil.copy(source, target)
    other.replace(plan)
    edit(plan, plan="vae_first.plan", network="vae_first")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda plan: manifest_path(plan).unlink(), IntegrityError, "has no manifest"),
        (lambda plan: manifest_path(plan).write_text("{}"), IntegrityError, "made by an older version"),
        (lambda plan: manifest_path(plan).write_text('{"format": 2}'), IntegrityError, "not a plan manifest"),
        (lambda plan: manifest_path(plan).write_text("{"), IntegrityError, "not valid JSON"),
        (lambda plan: edit(plan, format=99), IntegrityError, "made by a newer version"),
        (lambda plan: plan.unlink(), LongtakeError, "does not exist"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), IntegrityError, "truncated or altered"),
        (flip_bit, IntegrityError, "was altered"),
        (swap, IntegrityError, "was swapped"),
        (lambda plan: edit(plan, spec={**SPEC, "inputs": []}), IntegrityError, "another engine spec"),
        (lambda plan: edit(plan, version="1.6.1.120"), UnavailableError, "another TensorRT"),
        (lambda plan: edit(plan, flavour="tensorrt"), UnavailableError, "another TensorRT"),
        (lambda plan: edit(plan, compute_capability="12.0"), UnavailableError, "another GPU"),
        (
            lambda plan: edit(plan, plugins={"sink_attention_nvfp4": {"version": "0", "kernel": "0"}}),
            UnavailableError,
            "another version of plugin sink_attention_nvfp4",
        ),
    ],
)
def test_bad_plans_are_refused_with_the_reason(
    plan: Path, damage: Callable[[Path], None], error: type[LongtakeError], says: str
) -> None:
    damage(plan)
    with pytest.raises(error, match=says) as caught:
        verify_plan(plan, RTX, "8.9", network="dit", spec=SPEC)
    assert caught.value.exit_code != 0
    assert caught.value.got is not None or caught.value.expected is not None


def test_the_message_shows_what_differs(plan: Path) -> None:
    edit(plan, version="1.6.1.120")
    with pytest.raises(UnavailableError) as caught:
        verify_plan(plan, RTX, "8.9")
    message = str(caught.value)
    assert "got: tensorrt_rtx 1.6.1.120" in message
    assert "expected: tensorrt_rtx 1.7.1.116" in message
    assert "fix: build it again: longtake engines --recipe r" in message


def test_another_network_than_asked_for_is_a_swap(plan: Path) -> None:
    with pytest.raises(IntegrityError, match="was swapped"):
        verify_plan(plan, RTX, "8.9", network="context")


def test_kernel_identity_follows_the_source(plan: Path) -> None:
    assert plugin_identities(["kv_cache_write_bf16"]) != plugin_identities(["sink_attention_bf16"])
    assert replace(PlanManifest.read(plan)).plugins["sink_attention_nvfp4"]["version"] == "1"
