"""Weights that were exchanged behind somebody's back: saved sessions of others, engines of another export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import sha256
from longtake.formats.bundle import KIND, Bundle
from longtake.formats.exported import Export, ExportedFile, ExportedNetwork
from longtake.formats.recipe import recipe_named
from longtake.machine.flavour import Flavour
from longtake.paths import REPOSITORY
from longtake.runtime import snapshot
from longtake.runtime.snapshot import _digest
from longtake.runtime.sources import source_from_name
from longtake.training.models.checkpoint import weights_digests

Make = Callable[[Any], Any]
STUDENT = {"dit": "a" * 64, "vae": "c" * 64}
TEACHER = {"dit": "b" * 64, "vae": "c" * 64}
RECIPE = recipe_named("tiny_nvfp4_sm120")


def saved(make_toy: Any, make_generator: Make, folder: Path, weights: dict[str, str]) -> Path:
    toy = make_toy()
    toy.weights = weights
    with make_generator(toy).session(["x"] * 3, seed=3, steps=1, guidance=1.0) as session:
        next(session)
        session.save(folder / "s.safetensors")
    return folder / "s.safetensors"


def test_a_session_of_other_weights_is_refused(make_toy: Any, make_generator: Make, tmp_path: Path) -> None:
    path, toy = saved(make_toy, make_generator, tmp_path, STUDENT), make_toy()
    toy.weights = TEACHER
    with pytest.raises(LongtakeError) as caught:
        make_generator(toy).load_session(path)
    assert str(caught.value) == (
        "the saved session has another model: its cache is of other weights\n"
        "  got: dit aaaaaaaaaaaa…\n  expected: dit bbbbbbbbbbbb…\n"
        "  fix: use engines of the checkpoint that it was saved with, or start a new session"
    )


def test_a_session_of_the_same_weights_goes_on_without_a_word(
    make_toy: Any, make_generator: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, toy = saved(make_toy, make_generator, tmp_path, STUDENT), make_toy()
    toy.weights = dict(STUDENT)
    with make_generator(toy).load_session(path) as session:
        assert session.next_index == 1 and len(list(session)) == 2
    assert "weights" not in caplog.text


def test_a_session_saved_before_weights_were_told_loads_with_a_warning(
    make_toy: Any, make_generator: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, toy = saved(make_toy, make_generator, tmp_path, {}), make_toy()
    with safe_open(str(path), "pt") as opened:
        about = json.loads(opened.metadata()["session"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    first = ("preset", "model", "cache", "seed", "steps", "guidance", "negative_prompt", "shift", "family")
    about |= {"version": 2, "identity": {name: about["identity"][name] for name in first}}
    text = json.dumps(about)
    header = {"format": "longtake-session", "session": text, "sha256": _digest(text, tensors)}
    save_file(tensors, str(path), metadata=header)
    toy.weights = STUDENT
    said: list[
        str
    ] = []  # not through logging: a linter's own settings, earlier in a run of the suite, may have disabled it
    monkeypatch.setattr(snapshot.log, "warning", said.append)
    with make_generator(toy).load_session(path) as session:
        assert len(list(session)) == 2
    assert "nothing says whether the saved session is of these weights" in said[0]


def test_a_checkpoint_is_told_by_its_dit_and_vae(tmp_path: Path) -> None:
    folder = REPOSITORY / "training/checkpoints/tiny-4step"
    assert weights_digests(folder) == {kind: sha256(folder / f"{kind}.safetensors") for kind in ("dit", "vae")}
    assert weights_digests(tmp_path) == {}


# ---- engines ---------------------------------------------------------------------------------------------------------


def exported(folder: Path, content: bytes, steps: int, **told: Any) -> Export:
    """An export whose one file holds `content`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dit.onnx").write_bytes(content)
    files = {"dit.onnx": ExportedFile(sha256(folder / "dit.onnx"), len(content))}
    export = Export(
        RECIPE.onnx_name, "tiny", RECIPE.precision, RECIPE.cache, {"dit": ExportedNetwork(files)}, ("red",),
        sampling={"steps": steps, "guidance": 1.0, "shift": 5.0}, **{"inputs": "i" * 64, "weights": STUDENT, **told},
    )  # fmt: skip
    export.write(folder)
    return export


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A bundle of no plans, built from an export of a 4-step student."""
    exported(tmp_path / "export" / RECIPE.onnx_name, b"student", 4)
    folder = tmp_path / "engines" / RECIPE.name
    folder.mkdir(parents=True)
    Bundle.of(
        folder, RECIPE, Flavour("tensorrt_rtx", "1.7", None, "a test"), tmp_path / "export" / RECIPE.onnx_name, []
    ).write()
    return folder


def test_engines_of_the_export_beside_them_open(engines: Path, tmp_path: Path) -> None:
    source = source_from_name(engines)
    assert source.sampling is not None and source.sampling.steps == 4 and source.weights == STUDENT
    # exported again by other code, to the same files
    exported(tmp_path / "export" / RECIPE.onnx_name, b"student", 4, inputs="j" * 64)
    assert source_from_name(engines).weights == STUDENT


def test_engines_of_another_export_are_refused(engines: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "export" / RECIPE.onnx_name
    exported(onnx, b"teacher", 16, inputs="j" * 64, weights=TEACHER)
    with pytest.raises(IntegrityError) as caught:
        source_from_name(engines)
    assert str(caught.value) == (
        f"the engines in {engines} were built from another export than the one in {onnx}\n"
        "  got: dit.onnx changed since\n  expected: the exported files that the engines were built from\n"
        f"  fix: longtake engines --recipe {RECIPE.name} --onnx {onnx.parent} --out {engines.parent}"
    )


def test_engines_whose_export_is_gone_open_and_know_their_weights(engines: Path, tmp_path: Path) -> None:
    (tmp_path / "export" / RECIPE.onnx_name / "export.json").unlink()
    source = source_from_name(engines)
    assert source.weights == STUDENT and source.sampling is None


def test_old_engines_are_told_by_the_export_s_inputs(engines: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "export" / RECIPE.onnx_name
    path = engines / "bundle.json"
    told = json.loads(path.read_text()) | {"onnx_files": {}}
    del told["weights"]
    KIND.write(told, path)
    assert source_from_name(engines).weights == STUDENT
    exported(onnx, b"student", 4, inputs="j" * 64)
    with pytest.raises(IntegrityError, match="built from another export(.|\n)*got: inputs jjjjjjjjjjjj"):
        source_from_name(engines)


def test_an_old_export_is_told_by_its_inputs(tmp_path: Path) -> None:
    export = exported(tmp_path, b"x", 4, weights={})
    assert source_from_name(tmp_path).weights == {"export": "i" * 64}
    replace(export, inputs="").write(tmp_path)
    assert source_from_name(tmp_path).weights == {} and "weights" in asdict(export)
