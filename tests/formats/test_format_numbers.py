"""Every file between stages has a format number: a newer one is refused with what to do, and so is what is too old."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.commands.main import main
from longtake.errors import IntegrityError
from longtake.files import read_json, write_json
from longtake.formats import bundle, exported, plan
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.plan import PlanManifest, manifest_path
from longtake.formats.recipe import recipe_named
from longtake.formats.segmented_graph import SegmentedGraph
from longtake.machine.flavour import Flavour
from longtake.record import Kind
from longtake.runtime.snapshot import FORMAT, _digest, snapshot_from_file
from longtake.training.models.checkpoint import load_into, save_checkpoint
from longtake.training.models.side_file import SideFile

RECIPE = recipe_named("tiny_bf16_sm90")


def an_export(folder: Path) -> tuple[Path, Callable[[], object]]:
    Export(RECIPE.onnx_name, "tiny", "bf16", "bf16", {}, ("a",)).write(folder)
    return folder / "export.json", lambda: Export.read(folder)


def a_checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "dit.safetensors"
    save_checkpoint(path, nn.Linear(4, 3).state_dict(), SideFile("dit", "tiny"))
    return folder / "dit.json", lambda: load_into(nn.Linear(4, 3), path, kind="dit", preset="tiny")


def a_bundle(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = Bundle.of(folder, RECIPE, Flavour("tensorrt_rtx", "1.7.1", None, "a test"), folder, []).write()
    return path, lambda: Bundle.read(folder)


def a_plan(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "dit.plan"
    PlanManifest("dit.plan", "dit", "", 0, "", "tensorrt_rtx", "1.7", "12.0", {}, {}, RECIPE.name, "tiny").write(path)
    return manifest_path(path), lambda: PlanManifest.read(path)


def a_cut_network(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "dit.segments.json"
    SegmentedGraph("dit", (), (), (), {}, (), ()).write(path)
    return path, lambda: SegmentedGraph.read(path)


FILES = {
    an_export: "run `longtake export --force`",
    a_checkpoint: "copy the file again",
    a_bundle: "build it again: longtake engines --recipe NAME",
    a_plan: "build it again: longtake engines --recipe NAME",
    a_cut_network: "build it again: longtake engines --recipe NAME",
}
KINDS = {an_export: exported.KIND, a_bundle: bundle.KIND, a_plan: plan.KIND}
NUMBERS = {make: 2 for make in KINDS}  # those that are refused without a digest, or without versions
every_file = pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)


@every_file
def test_a_newer_file_is_refused_with_what_to_do(make: Callable, tmp_path: Path) -> None:
    path, read = make(tmp_path)
    assert read_json(path)["format"] == NUMBERS.get(make, 1)
    read()
    write_json(path, {**read_json(path), "format": 7})
    with pytest.raises(IntegrityError) as caught:
        read()
    assert (
        f"{path.name} was made by a newer version of longtake\n  got: format 7\n  expected: format {NUMBERS.get(make, 1)}"
        in str(caught.value)
    )
    assert f"fix: update longtake, or {FILES[make]}" in str(caught.value)


@every_file
def test_a_number_that_is_none_is_refused(make: Callable, tmp_path: Path) -> None:
    path, read = make(tmp_path)
    for number in ("1", 1.5, True, None):
        write_json(path, {**read_json(path), "format": number})
        with pytest.raises(IntegrityError, match=f"{path.name} has no format number"):
            read()


@every_file
def test_a_file_from_before_there_were_numbers_is_read_or_made_anew(make: Callable, tmp_path: Path) -> None:
    path, read = make(tmp_path)
    write_json(path, {key: value for key, value in read_json(path).items() if key not in ("format", "digest")})
    if make not in NUMBERS:
        read()
        return
    with pytest.raises(IntegrityError) as caught:
        read()
    assert f"{path.name} was made by an older version of longtake" in str(caught.value)
    assert FILES[make] in str(caught.value)


@pytest.mark.parametrize("make", [an_export, a_bundle], ids=lambda make: make.__name__)
def test_a_flipped_bit_anywhere_is_seen(make: Callable, tmp_path: Path) -> None:
    path, read = make(tmp_path)
    content, value = path.read_bytes(), read_json(path)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(flipped)
        try:
            same = read_json(path) == value  # a space for a line's end
        except IntegrityError:
            same = False
        if not same:
            with pytest.raises(IntegrityError, match=f"fix: .*{'export' if make is an_export else 'engines'}"):
                read()


@every_file
def test_what_cannot_be_read_names_the_key(make: Callable, tmp_path: Path) -> None:
    path, read = make(tmp_path)
    whole = read_json(path)
    for key in sorted({"vocabulary", "sha256", "files", "plugins", "steps"} & whole.keys())[:1]:
        KINDS[make].write({**whole, key: 5}, path) if make in KINDS else write_json(path, {**whole, key: 5})
        with pytest.raises(IntegrityError, match=rf"{path.name} is not a[\s\S]*got: {key}: 5[\s\S]*fix: "):
            read()


def test_an_older_file_than_is_read_says_how_to_make_it_anew(tmp_path: Path) -> None:
    kind = Kind("an export description", "`longtake export`", "run `longtake export --force`", format=3, oldest=2)
    kind.require_format(2, tmp_path)
    with pytest.raises(
        IntegrityError, match=r"made by an older version[\s\S]*got: format 1[\s\S]*format 2 to 3[\s\S]*--force"
    ):
        kind.require_format(1, tmp_path)


def test_a_newer_session_is_refused_with_what_to_do(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path, tensors = tmp_path / "s.st", {"decoder.0": torch.zeros(1)}
    text = json.dumps({"version": 4})
    save_file(tensors, str(path), metadata={"format": FORMAT, "session": text, "sha256": _digest(text, tensors)})
    with pytest.raises(
        IntegrityError, match=r"s.st was made by a newer version[\s\S]*fix: update longtake, or start a new session"
    ):
        snapshot_from_file(path)


def test_the_command_says_so_and_exits_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = an_export(tmp_path)
    write_json(path, {**read_json(path), "format": math.factorial(4)})
    assert main(["generate", "--prompt", "x", "--engines", str(tmp_path), "--out", str(tmp_path / "v.mp4")]) == 4
    said = capsys.readouterr().err
    assert "made by a newer version of longtake" in said and "format 24" in said and "fix: update longtake" in said


@pytest.mark.parametrize(
    "sampling", [{}, "x", [4, 1], {"steps": -5, "guidance": 1}, {"steps": True, "guidance": 1}, {"steps": 4, "guidance": 10**400}], ids=["no field", "text", "a list", "steps below 0", "steps a bool", "guidance without end"]
)  # fmt: skip
def test_an_export_tells_how_to_sample_or_is_refused(tmp_path: Path, sampling: object) -> None:
    path, read = an_export(tmp_path)
    exported.KIND.write({**read_json(path), "sampling": sampling}, path)  # with the right digest of itself
    with pytest.raises(IntegrityError):
        read()
