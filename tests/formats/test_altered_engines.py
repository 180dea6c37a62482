"""A folder of engines that was altered anywhere, or mixed of two builds, is refused before anything is deserialised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_folders import build, opened, reseal

from longtake.errors import LongtakeError
from longtake.files import read_json
from longtake.formats.bundle import Bundle
from longtake.formats.plan import manifest_path
from longtake.runtime.backends.trt.networks import networks_in


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("engines")
    return build(place / "one", 1), build(place / "other", 2)


@pytest.fixture
def folder(two: tuple[Path, Path], tmp_path: Path) -> Path:
    (tmp_path / "onnx").symlink_to(two[0].parent / "onnx")
    return Path(shutil.copytree(two[0], tmp_path / "engines"))


def test_an_intact_folder_opens(folder: Path) -> None:
    assert opened(folder) == 7


def of_other(folder: Path, other: Path, *names: str) -> None:
    for name in names:
        shutil.copy(other / name, folder / name)


MIXED: dict[str, tuple[str, ...]] = {
    "a plan": ("dit.plan",),
    "a manifest": ("dit.plan.json",),
    "a plan with its manifest": ("dit.plan", "dit.plan.json"),
    "two plans with manifests": ("context.plan", "context.plan.json", "vae_steady.plan", "vae_steady.plan.json"),
    "what reads a picture": ("vae_encoder_first.plan", "vae_encoder_first.plan.json"),
    "the bundle": ("bundle.json",),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_two_builds_do_not_mix(folder: Path, two: tuple[Path, Path], mixed: str) -> None:
    of_other(folder, two[1], *MIXED[mixed])
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


@pytest.mark.parametrize("files", ["", [], {}, {"dit.plan": 7}, {"dit.plan": "0" * 64}, None])
def test_a_bundle_that_names_no_plans(folder: Path, files: object) -> None:
    reseal(folder, files=files)
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


def test_plans_exchanged_within_a_folder(folder: Path) -> None:
    for end in ("plan", "plan.json"):
        one, other = folder / f"dit.{end}", folder / f"context.{end}"
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


MANIFEST: dict[str, Any] = {
    "format": 3, "version": "1.6.1.120", "flavour": "tensorrt", "cuda": "12", "longtake": "9.9", "compute_capability": "8.9",
    "spec": {}, "network": "context", "plan": "context.plan",
    "plugins": {"sink_attention_nvfp4": {"version": "0", "kernel": "0"}},
}  # fmt: skip
OTHER_TYPES: list[tuple[str, Any]] = [
    ("plugins", 7), ("plugins", [1]), ("plugins", {"other": {}}), ("plugins", {"x": 5}), ("spec", "x"), ("spec", []),
    ("size", "many"), ("size", 10**40), ("sha256", None), ("recipe", 7), ("seconds", "x"), ("layers", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*MANIFEST.items(), *OTHER_TYPES], ids=str)
def test_a_field_of_a_manifest_altered_with_all_digests_right(folder: Path, key: str, value: Any) -> None:
    path = manifest_path(folder / "dit.plan")
    told = {**read_json(path), key: value}
    path.write_text(json.dumps(told))
    reseal(folder)
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


BUNDLE: dict[str, Any] = {
    "format": 1, "version": "1.6.1.120", "flavour": "tensorrt", "versions": {"longtake": "9.9"}, "onnx": 7,
    "vocabulary": "words", "recipe_fields": {}, "memory": [7],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BUNDLE.items(), ids=str)
def test_a_field_of_the_bundle_altered_with_all_digests_right(folder: Path, key: str, value: Any) -> None:
    if key == "format":
        told = read_json(folder / "bundle.json")
        (folder / "bundle.json").write_text(json.dumps({**told, key: value}))
    else:
        reseal(folder, **{key: value})
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


def test_an_export_that_is_a_link_to_itself(folder: Path) -> None:
    (folder.parent / "round").symlink_to("round")
    reseal(folder, onnx="../round")
    with pytest.raises(LongtakeError, match="longtake engines --recipe"):
        opened(folder)


def test_another_vocabulary_is_an_altered_bundle(folder: Path) -> None:
    told = read_json(folder / "bundle.json")
    (folder / "bundle.json").write_text(json.dumps({**told, "vocabulary": told["vocabulary"][::-1]}))
    with pytest.raises(LongtakeError, match="was altered after it was written(.|\n)*longtake engines --recipe"):
        opened(folder)


def test_no_plan_is_handed_out_unless_all_are_right(folder: Path) -> None:
    """The last plan that would be loaded is the damaged one; what is read meanwhile is not even kept."""
    names = networks_in(Bundle.read(folder))
    (folder / f"{names[-1]}.plan").write_bytes(b"x" * 20_000)
    with pytest.raises(LongtakeError, match=f"{names[-1]}.plan was altered"):
        opened(folder)
