"""The capability table: every row, every reason, and the choice it leads to."""

from __future__ import annotations

import pytest

from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.recipe import recipe_named
from longtake.machine.capability import TABLE, Machine, Row, backend_for, lookup, verdict_for, version_key

H100 = Machine("9.0", "tensorrt_rtx", "1.6.1.120")
RTX_5090 = Machine("12.0", "tensorrt_rtx", "1.7.1.116")
RTX_4090 = Machine("8.9", "tensorrt_rtx", "1.7.1.116")
LAPTOP = Machine(None, "tensorrt_rtx", "1.7.1.116")


def _version_inside(row: Row) -> str:
    return row.since or ("1.0" if row.below else "99.0")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.backend}-{row.flavour}-{row.since}-{row.status}")
def test_every_row_can_be_reached(row: Row) -> None:
    capability = row.capabilities[0] if row.capabilities else "8.9"
    precision = row.precisions[0] if row.precisions else "bf16"
    verdict = lookup(row.backend, row.flavour, _version_inside(row), capability, precision)
    assert (verdict.status, verdict.reason) == (row.status, row.reason)


def test_only_what_was_run_says_runs() -> None:
    ran = {(row.backend, row.capabilities, row.precisions) for row in TABLE if row.status == "runs"}
    assert ran == {("segmented", ("9.0",), ("w4a16", "fp8", "bf16")), ("reference", (), ())}


@pytest.mark.parametrize(
    ("backend", "flavour", "version", "capability", "precision", "status"),
    [
        ("fused", "tensorrt_rtx", "1.7.1.116", "12.0", "nvfp4", "built, not run"),
        ("fused", "tensorrt_rtx", "1.7.1.116", "8.9", "nvfp4", "no"),
        ("fused", "tensorrt_rtx", "1.7.1.116", "8.9", "w4a16", "built, not run"),
        ("fused", "tensorrt_rtx", "1.6.1.120", "9.0", "w4a16", "no"),
        ("fused", "tensorrt_rtx", "1.7.1.116", "9.0", "w4a16", "no"),
        ("fused", "tensorrt_rtx", "1.10.0", "8.9", "bf16", "built, not run"),
        ("fused", "tensorrt", "10.13", "9.0", "bf16", "not run"),
        ("fused", "tensorrt", "10.13", "12.0", "nvfp4", "no"),
        ("segmented", "tensorrt_rtx", "1.6.1.120", "9.0", "bf16", "runs"),
        ("segmented", "tensorrt_rtx", "1.6.1.120", "9.0", "nvfp4", "no"),
        ("segmented", "tensorrt_rtx", "1.7.1.116", "9.0", "bf16", "no"),
        ("segmented", "tensorrt_rtx", "1.7.1.116", "7.5", "bf16", "no"),
        ("segmented", "tensorrt_rtx", "1.5.0", "9.0", "bf16", "no"),
        ("segmented", "tensorrt", "10.13", "9.0", "w4a16", "not run"),
        ("segmented", "tensorrt_rtx", "1.6.1.120", "9.0", "fp8", "runs"),
        ("segmented", "tensorrt_rtx", "1.7.1.116", "9.0", "fp8", "no"),
        ("fused", "tensorrt_rtx", "1.7.1.116", "8.9", "fp8", "built, not run"),
        ("fused", "tensorrt_rtx", "1.7.1.116", "8.6", "fp8", "no"),
    ],
)
def test_known_answers(backend: str, flavour: str, version: str, capability: str, precision: str, status: str) -> None:
    assert lookup(backend, flavour, version, capability, precision).status == status


def test_8_bits_on_ampere_are_refused_with_what_to_use_instead() -> None:
    verdict = lookup("fused", "tensorrt_rtx", "1.7.1.116", "8.6", "fp8")
    assert "no FP8 arithmetic" in verdict.reason and "w4a16" in verdict.fix


def test_a_no_always_names_a_reason_and_a_fix() -> None:
    machines = [
        Machine(c, f, v)
        for c in (None, "7.5", "8.9", "9.0", "12.0")
        for f, v in ((None, ""), ("tensorrt", "10.0"), ("tensorrt_rtx", "1.6.1"), ("tensorrt_rtx", "1.7.1"))
    ]
    for name in ("tiny_nvfp4_sm120", "tiny_w4a16_sm89", "tiny_w4a16_sm90"):
        for machine in machines:
            for backend in ("fused", "segmented"):
                verdict = verdict_for(machine, recipe_named(name), backend)
                assert verdict.usable or (verdict.reason and verdict.fix), (machine, name, backend)


def test_versions_compare_as_numbers() -> None:
    assert version_key("1.10") > version_key("1.7.1.116") > version_key("1.7")


def test_the_recipes_own_mode_is_chosen_where_it_works() -> None:
    choice = backend_for(H100, recipe_named("tiny_w4a16_sm90"))
    assert choice.backend == "segmented"
    assert "1.6.1.120" in choice.reason and "9.0" in choice.reason
    unseen = backend_for(RTX_5090, recipe_named("tiny_nvfp4_sm120"))
    assert unseen.backend == "fused" and "built, not run" in unseen.reason


@pytest.mark.parametrize(
    ("machine", "recipe", "why"),
    [
        (LAPTOP, "tiny_nvfp4_sm120", "no NVIDIA GPU"),
        (Machine("9.0"), "tiny_w4a16_sm90", "no TensorRT flavour"),
        (Machine("9.0", "tensorrt_rtx", "1.7.1"), "tiny_w4a16_sm90", "refuse compute capability 9.0"),
        (RTX_4090, "tiny_nvfp4_sm120", "no FP4 arithmetic on compute capability 8.9"),
        (RTX_5090, "tiny_w4a16_sm89", "for compute capability 8.9, this GPU has 12.0"),
        (Machine("9.0", "tensorrt_rtx", "1.6.1", nvrtc=False), "tiny_w4a16_sm90", "NVRTC"),
    ],
)
def test_the_default_falls_to_the_reference_and_says_why(machine: Machine, recipe: str, why: str) -> None:
    choice = backend_for(machine, recipe_named(recipe))
    assert choice.backend == "reference"
    assert why in choice.reason


def test_asked_for_and_missing_is_an_error_with_the_fix() -> None:
    with pytest.raises(UnavailableError) as caught:
        backend_for(LAPTOP, recipe_named("tiny_nvfp4_sm120"), asked="fused")
    assert "backend fused cannot run recipe tiny_nvfp4_sm120 here" in str(caught.value)
    assert "no NVIDIA GPU" in str(caught.value) and "--backend reference" in str(caught.value)
    assert caught.value.exit_code != 0
    with pytest.raises(UnavailableError, match="1.6.1.120"):
        backend_for(Machine("9.0", "tensorrt_rtx", "1.7.1"), recipe_named("tiny_w4a16_sm90"), asked="segmented")


def test_a_backend_the_recipe_was_not_built_for_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="is built segmented, not fused"):
        backend_for(H100, recipe_named("tiny_w4a16_sm90"), asked="fused")


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(LongtakeError, match=r"fused \| segmented \| reference"):
        backend_for(LAPTOP, recipe_named("tiny_nvfp4_sm120"), asked="fast")


def test_without_onnxruntime_the_reference_is_an_error_too() -> None:
    with pytest.raises(UnavailableError, match="pip install onnxruntime"):
        backend_for(Machine(onnxruntime=False), recipe_named("tiny_nvfp4_sm120"))
