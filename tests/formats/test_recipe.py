"""The shipped recipes, and what a wrong one gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from longtake.errors import LongtakeError
from longtake.formats.recipe import RECIPES, recipe_for, recipe_from_file, recipe_named, recipe_names
from longtake.machine.capability import lookup
from longtake.paths import REPOSITORY

REAL = "wan2.2-ti2v-5b"
FLAVOUR_OF = {"9.0": "1.6.1.120"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_named_after_what_it_holds(name: str) -> None:
    recipe = recipe_named(name)
    target = f"sm{recipe.compute_capability.replace('.', '')}"
    assert recipe.name == f"{recipe.preset}_{recipe.precision}_{target}" == name
    ran_by = ("_library" if recipe.linears == "library" else "") + (
        "_vae_library" if recipe.vae_ops == "library" else ""
    )
    assert recipe.onnx_name == f"{recipe.preset}_{recipe.precision}{ran_by}"


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_has_a_way_to_run(name: str) -> None:
    recipe = recipe_named(name)
    version = FLAVOUR_OF.get(recipe.compute_capability, "1.7.1.116")
    assert lookup(recipe.mode, "tensorrt_rtx", version, recipe.compute_capability, recipe.precision).usable


def test_recipes_that_share_onnx_files_share_a_cache() -> None:
    caches = {(r.onnx_name, r.cache) for r in map(recipe_named, recipe_names())}
    assert len(caches) == len({name for name, _ in caches})


def test_a_recipe_of_the_real_model_says_how_large_a_card_must_be() -> None:
    for name in recipe_names(REAL):
        assert recipe_named(name).memory_gb in (16, 24, 80), name


def test_a_recipe_at_a_reduced_depth_is_that_of_the_real_model() -> None:
    for reduced in map(recipe_named, recipe_names(f"{REAL}-check")):
        real = recipe_named(reduced.name.replace("-check", ""))
        assert replace(reduced, name=real.name, preset=real.preset, memory_gb=real.memory_gb) == real


def test_the_documentation_lists_every_recipe_as_it_is() -> None:
    lines = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    documented = {row[0].strip("`"): row[2:6] for row in rows if len(row) == 7}
    recipes = map(recipe_named, (*recipe_names("tiny"), *recipe_names(REAL)))
    assert documented == {r.name: [r.precision, r.cache, r.attention, r.mode] for r in recipes}


@pytest.mark.parametrize(
    "capability, recipe",
    [("9.0", "w4a16_sm90"), ("8.9", "w4a16_sm89"), ("8.6", "w4a16_sm86"), ("12.0", "nvfp4_sm120")],
)
def test_the_recipe_for_a_gpu_is_looked_for_within_the_preset(capability: str, recipe: str) -> None:
    assert recipe_for(capability, REAL) == f"{REAL}_{recipe}"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"attention": "int8"}, r"bad attention[\s\S]*bf16 \| fp8"),
        ({"memory_gb": -1}, "bad memory_gb"),
        ({"memory_gb": "24 GB"}, "bad memory_gb"),
        ({"vae_latents_per_step": 1}, "unknown key"),
        ({"vae_fold_upsampling": False}, "unknown key"),
        ({"linears": "library", "mode": "fused"}, r"got: bf16, fused\n  expected: fp8, bf16 or w4a16, segmented"),
        ({"linears": "library", "precision": "nvfp4"}, r"a library cannot run these linears\n  got: nvfp4, segmented"),
        ({"linears": "cublas"}, r"bad linears[\s\S]*engine \| library"),
        ({"vae_ops": "kernel"}, r"bad vae_ops[\s\S]*engine \| library"),
        ({"vae_conv": "int4"}, r"bad vae_conv[\s\S]*bf16 \| fp8 \| int8 \| calibrated"),
        ({"vae_conv": "fp8"}, r"an engine cannot run 8-bit convolutions[\s\S]*vae_ops: library beside it"),
        ({"precision": "fp6"}, r"bad precision[\s\S]*nvfp4 \| w4a16 \| fp8 \| bf16"),
        ({"atention": "bf16"}, r"did you mean 'attention'"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    given = yaml.safe_load((RECIPES / "tiny_bf16_sm90.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**given, **change}))
    with pytest.raises(LongtakeError, match=said):
        recipe_from_file(tmp_path / "mine.yaml")


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    text = (RECIPES / "tiny_bf16_sm90.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}\nprecision: bf16\n")
    with pytest.raises(LongtakeError, match="(?s)mine.yaml is not valid YAML.*'precision' is there twice"):
        recipe_from_file(tmp_path / "mine.yaml")
