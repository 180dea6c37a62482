"""`longtake doctor` reports what is there, what is missing, and the command that helps, and never fails on it."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from longtake.commands import doctor, probes
from longtake.commands import main as cli
from longtake.formats.recipe import recipe_for, recipe_named, recipe_names
from longtake.machine import machine
from longtake.machine.capability import Machine
from longtake.machine.flavour import Installed


def _run(as_json: bool = False) -> int:
    return doctor.run(doctor.DoctorOptions(json=as_json))


def test_reports_this_machine_and_exits_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    text = capsys.readouterr().out
    for word in ("Python", "GPU", "TensorRT", "ONNX Runtime", "NVRTC", "tiny_nvfp4_sm120", "tiny_w4a16_sm90"):
        assert word in text


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reference_works"] is True
    assert {item["recipe"] for item in report["recipes"]} >= {"tiny_nvfp4_sm120", "tiny_bf16_sm90"}


def test_without_onnxruntime_it_fails_and_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> str:
        raise ModuleNotFoundError("No module named 'onnxruntime'")

    monkeypatch.setattr(doctor, "onnxruntime_works", absent)
    assert _run() != 0
    text = capsys.readouterr().out
    assert "ONNX Runtime (the reference backend): pip install onnxruntime" in text
    assert "No module named 'onnxruntime'" in text


def test_without_any_tensorrt_it_still_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.machine.flavour.installed_flavours", list)
    monkeypatch.setattr(machine, "installed_flavours", list)
    monkeypatch.setattr(doctor, "trtexec_finding", lambda: probes.Finding("trtexec", "not installed"))
    assert _run() == 0
    text = capsys.readouterr().out
    assert "TensorRT (building and running engines): pip install tensorrt-rtx-cu13==" in text
    assert "no TensorRT flavour is installed" in text


def test_an_unfit_flavour_is_judged_not_hidden() -> None:
    assert machine.flavour_to_judge("9.0", [Installed("tensorrt_rtx", "1.7.1")]) == ("tensorrt_rtx", "1.7.1")
    assert machine.flavour_to_judge("9.0", [Installed("tensorrt", "10.13", complete=False)]) == (None, "")


def test_recipes_on_a_hopper_machine() -> None:
    hopper = Machine("9.0", "tensorrt_rtx", "1.6.1.120")
    found = doctor.recipe_finding(hopper, recipe_named("tiny_w4a16_sm90"))
    assert (found.backend, found.native) == ("segmented", "segmented: runs")
    other = doctor.recipe_finding(hopper, recipe_named("tiny_nvfp4_sm120"))
    assert other.backend == "reference"
    assert "before 1.7 cannot load plugins" in other.reason and "segmented" in other.fix


def test_recipes_without_a_gpu_are_built_not_run() -> None:
    found = doctor.recipe_finding(Machine(None, "tensorrt_rtx", "1.7.1.116"), recipe_named("tiny_nvfp4_sm120"))
    assert (found.backend, found.native) == ("reference", "fused: build, don't run")
    assert "no NVIDIA GPU" in found.reason


def test_a_probe_that_raises_becomes_a_finding() -> None:
    def broken() -> str:
        raise OSError("libfoo.so: cannot open shared object file")

    found = probes.attempt("foo", "nothing", "pip install foo", broken)
    assert not found.ok and "libfoo.so" in found.found and found.fix == "pip install foo"


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.shutil, "disk_usage", lambda _: argparse.Namespace(free=1e9))
    found = probes.disk_finding(tmp_path / "models" / "not-there-yet")
    assert not found.ok and "1.0 GB free" in found.found and "not-there-yet" in found.fix


def test_the_disk_that_counts_is_the_one_of_exports_and_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "not-there-yet"))
    assert _run() == 0
    assert f"GB free in {tmp_path / 'not-there-yet'}" in capsys.readouterr().out


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/nope", "read-only"])
def test_a_home_that_cannot_be_written_to_is_said_with_its_variable(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    if home == "read-only":  # whoever runs the tests may write everywhere
        denied = OSError(errno.EROFS, os.strerror(errno.EROFS))
        monkeypatch.setattr(probes.tempfile, "TemporaryFile", Mock(side_effect=denied))
    monkeypatch.setenv("LONGTAKE_HOME", folder := str(tmp_path / home))
    assert _run() == 0
    text = capsys.readouterr().out
    assert f"! {folder} cannot be written to" in text
    assert "disk (builds): set LONGTAKE_HOME to a folder that you can write to" in text


def test_what_serving_needs_is_listed_and_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        probes.importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else found(name)
    )
    assert _run() == 0
    text = capsys.readouterr().out
    assert "! no fastapi, uvicorn" in text and "serve (longtake serve): pip install 'longtake[serve]'" in text
    assert cli.main(["serve"]) == 3
    told = capsys.readouterr().err
    assert "no fastapi, uvicorn" in told and "pip install 'longtake[serve]'" in told
    monkeypatch.undo()
    assert probes.serve_finding().ok


def test_columns_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if line.startswith("recipe "))
    rows = [line for line in lines if line.split(" ")[0] in recipe_names()]
    assert len(rows) == len(recipe_names())
    for column in ("runs here by", "its own plans", "why"):
        at = head.index(column)
        assert all(row[at - 1] == " " and row[at] != " " for row in rows), column


def test_the_command_line_reaches_it_and_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]
    assert all(importlib.util.find_spec(module) for module, _ in cli.COMMANDS.values())


@pytest.mark.parametrize(
    ("capability", "recipe"),
    [(None, "tiny_nvfp4_sm120"), ("12.0", "tiny_nvfp4_sm120"), ("9.0", "tiny_w4a16_sm90"), ("8.9", "tiny_w4a16_sm89")],
)
def test_the_recipe_that_fits(capability: str | None, recipe: str) -> None:
    assert recipe_for(capability) == recipe
