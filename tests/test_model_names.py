"""Models by name: what a name says, where what is made of a model lies, and what is refused."""

from __future__ import annotations

import errno
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longtake.chain import HowToExport
from longtake.commands import export as export_cli
from longtake.commands.main import main, parsed
from longtake.errors import GateError, LongtakeError
from longtake.formats import model_name
from longtake.formats.exported import KIND, UNRECORDED, Checked, Export
from longtake.formats.model_name import (
    asked_for,
    card_of,
    checked_name,
    claim,
    claimed,
    known_names,
    model_in,
    write_name,
)
from longtake.formats.recipe import recipe_named
from longtake.preparation import model_and_recipe, prepared
from longtake.runtime.generator import Generator
from longtake.runtime.sources import source_from_name
from longtake.training.models.checkpoint import side_file
from longtake.training.models.side_file import SideFile

RECIPE = recipe_named("tiny_nvfp4_sm120")
STUDENT = model_name.shipped()["tiny-4step"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(("model", "name"), [("mine", f"mine@{RECIPE.name}"), ("", RECIPE.name)])
def test_a_full_name_is_put_together_and_cut_in_one_place(model: str, name: str) -> None:
    assert model_name.full_name(model, RECIPE.name) == name
    assert model_name.parts_of_full(name) == (model, RECIPE.name)
    others = [path for path in tree_of_serving() if '"@"' in path.read_text()]
    assert not others, "cut it with parts_of_full"


def tree_of_serving() -> list[Path]:
    return sorted((Path(model_name.__file__).parents[2] / "runtime" / "serve").glob("*.py"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint folder called mine, of a DiT alone; its digest is of no file."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "dit.safetensors").write_bytes(b"weights")
    SideFile("dit", "tiny", sha256="a" * 64).write(side_file(folder / "dit.safetensors"))
    return folder


def made(model: str, recipe: str = RECIPE.name, **told: object) -> Path:
    """An export without files, where one of a model and recipe lies."""
    folder = model_name.folder_of(model, recipe) / "onnx"
    of = recipe_named(recipe)
    checked = told.pop("checked", Checked("passed", ""))
    export = Export(of.onnx_name, "tiny", of.precision, of.cache, {}, ("a",), model=model, checked=checked, **told)  # type: ignore[arg-type]
    export.write(folder)
    return folder


def test_shipped_and_own_models_have_names(own: Path, home: Path) -> None:
    assert asked_for("tiny-4step").model == model_in(STUDENT) and asked_for("tiny-4step").recipe is None
    assert asked_for(f"tiny@{RECIPE.name}").recipe == RECIPE
    model = model_in(own)
    assert (model.name, model.preset, model.weights) == ("mine", "tiny", {"dit": "a" * 64})
    assert asked_for(str(own)).model == model  # a folder wherever a name is
    with pytest.raises(LongtakeError, match="there is no such model or recipe"):
        asked_for("mine")
    claim(model)
    assert asked_for("mine").model == card_of("mine") == model
    assert model.folder(RECIPE) == home / "models" / "mine" / RECIPE.name
    write_name(own, "other-name")
    assert model_in(own).name == "other-name" and SideFile.read(side_file(own / "dit.safetensors")).sha256 == "a" * 64


def test_a_mistyped_folder_is_said_to_be_none(own: Path) -> None:
    with pytest.raises(LongtakeError, match="(?s)holds no model.*got: no such folder"):
        model_in(own.parent / "mien")
    (own / "dit.json").unlink()
    with pytest.raises(LongtakeError, match="(?s)holds no model.*got: no dit.json"):
        model_in(own)


def test_a_copied_link_names_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(STUDENT, tmp_path / "copy", symlinks=True)
    words = "--precision bf16 --data digits --steps 1 --out".split()
    for command in (
        ["export", "--model", str(copy), "--no-parity"],
        ["generate", "--model", str(copy), "--prompt", "x"],
        ["train", "--stage", "dit", "--vae", str(copy), *words, str(tmp_path / "run")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "is a link to a file that is not there" in said and "got: ../tiny/vae." in said, said
        assert "cp -rL" in said
    (copy / "vae.safetensors").unlink()
    (copy / "vae.json").unlink()
    shutil.copytree(STUDENT, copy, dirs_exist_ok=True)  # as `cp -rL` does
    assert model_in(copy).weights == model_in(STUDENT).weights


@pytest.mark.parametrize("name", ["tiny", "tiny-4step"])
def test_shipped_names_are_reserved(name: str, own: Path) -> None:
    with pytest.raises(LongtakeError, match=f"(?s)the name {name} is that of a shipped model.*--name my-{name}"):
        model_in(shutil.copytree(own, own.parent / name))
    with pytest.raises(LongtakeError, match="is that of a shipped model"):
        checked_name(name)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", ".x", "a/b", "ä"])
def test_bad_names(name: str) -> None:
    with pytest.raises(LongtakeError, match="(?s)bad model name.*expected: letters, digits"):
        checked_name(name)


def test_two_checkpoints_under_one_name(own: Path, home: Path) -> None:
    claim(model_in(own))
    claim(model_in(own))  # again is no conflict
    kept = made("mine")
    SideFile("dit", "tiny", sha256="b" * 64).write(side_file(own / "dit.safetensors"))
    with pytest.raises(LongtakeError) as caught:
        claim(model_in(own))
    said = str(caught.value)
    assert "two different checkpoints are called mine" in said and "--replace" in said
    assert "dit aaaaaaaaaaaa" in said and "dit bbbbbbbbbbbb" in said
    assert kept.is_dir()
    claim(model_in(own), replaced=True)
    assert card_of("mine") == model_in(own) and not kept.exists()


def other(own: Path) -> model_name.Model:
    """The model in `own`, trained further."""
    SideFile("dit", "tiny", sha256="b" * 64).write(side_file(own / "dit.safetensors"))
    return model_in(own)


def test_a_name_is_taken_once_something_was_made_of_it(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--checkpoints", str(own), "--recipe", "tiny_bf16_sm90", "--name", "again", "--no-parity"]
    said = []
    for _ in range(2):
        assert main(words) == 2  # there is a DiT alone
        said.append(capsys.readouterr().err)
        assert "again" not in known_names()
        other(own)
    assert said[0] == said[1] and "text_encoder" in said[1]
    made("again")
    assert "again" in known_names()
    SideFile("dit", "tiny", sha256="c" * 64).write(side_file(own / "dit.safetensors"))
    assert main(words) == 2 and "two different checkpoints are called again" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_who_wants_a_name_under_which_something_is_made_waits(own: Path, fails: bool) -> None:
    first, second = model_in(own), other(own)
    with ThreadPoolExecutor() as pool, suppress(InterruptedError):
        with claimed(first), claimed(first):  # the same model for two recipes: nobody waits
            waiting = pool.submit(lambda: claimed(second).__enter__())
            with pytest.raises(FuturesTimeout):
                waiting.result(0.3)
            assert card_of("mine") == first
            if fails:
                raise InterruptedError
            made("mine")
    if fails:
        waiting.result(5)
        assert card_of("mine") == second
    else:
        with pytest.raises(LongtakeError, match="two different checkpoints are called mine"):
            waiting.result(5)
        assert card_of("mine") == first


def test_own_and_shipped_models_stand_side_by_side(own: Path) -> None:
    claim(model_in(own))
    folders = made("mine"), made("tiny-4step")
    assert source_from_name(f"mine@{RECIPE.name}").onnx == folders[0]
    assert source_from_name(f"tiny-4step@{RECIPE.name}").onnx == folders[1]
    assert source_from_name("mine").model == "mine"  # without one, doctor's pick
    with pytest.raises(LongtakeError, match=f"(?s)several models are there.*mine, tiny-4step.*mine@{RECIPE.name}"):
        source_from_name(RECIPE.name)  # a recipe alone opens nobody's export by chance
    shutil.rmtree(folders[1])
    assert source_from_name(RECIPE.name).model == "mine"
    with pytest.raises(
        LongtakeError, match="(?s)nothing is built for model tiny-4step.*longtake export --model tiny-4step"
    ):
        source_from_name("tiny-4step")
    assert main(["budget", "--recipe", RECIPE.name]) == 0, "what a recipe takes does not depend on the model"
    assert main(["budget", "--engines", f"mine@{RECIPE.name}"]) == 0


def test_what_to_do_about_a_folder_names_the_folder(own: Path) -> None:
    """Its model's name is known once it was exported."""
    with pytest.raises(LongtakeError) as caught:
        source_from_name(str(own))
    assert (
        caught.value.fix is not None and f"longtake export --model {shlex.quote(str(own))} --recipe" in caught.value.fix
    )


def test_a_recipe_of_another_preset(own: Path) -> None:
    with pytest.raises(LongtakeError, match="(?s)wan2.2-ti2v-5b_bf16_sm90 is not for model tiny.*tiny_nvfp4_sm120"):
        asked_for("tiny@wan2.2-ti2v-5b_bf16_sm90")


def test_a_hub_id_is_answered_with_how_to_download_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for ask in (asked_for, model_and_recipe):
        with pytest.raises(LongtakeError) as caught:
            ask("Wan-AI/Wan2.2-TI2V-5B")
        said = str(caught.value)
        assert "hf download Wan-AI/Wan2.2-TI2V-5B --local-dir" in said and "longtake convert --dit" in said


def test_downloads_are_looked_for_where_hugging_face_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    snapshot = tmp_path / "hub" / "models--somebody--a-model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    with pytest.raises(LongtakeError, match=f"{snapshot} holds no model"):
        model_and_recipe("somebody/a-model")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(LongtakeError, match="hf download somebody/a-model"):
        model_and_recipe("somebody/a-model")


def test_an_at_in_a_folder_s_path_is_no_recipe(own: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(own, tmp_path / "me@work" / "mine")
    plain, none = model_and_recipe(str(folder))
    assert plain.checkpoints == folder and none is None and asked_for(str(folder)).model == plain
    model, recipe = model_and_recipe(f"{folder}@{RECIPE.name}")
    assert (model.checkpoints, recipe) == (folder, RECIPE) and asked_for(f"{folder}@{RECIPE.name}").recipe == RECIPE
    odd = shutil.copytree(own, tmp_path / "mine@home")
    with pytest.raises(LongtakeError, match="(?s)bad model name.*mine@home.*--name"):
        asked_for(str(odd))


def test_names_that_are_near() -> None:
    with pytest.raises(LongtakeError, match="did you mean 'tiny-4step'"):
        asked_for("tiny-4steps")


# ---- states of an export ---------------------------------------------------------------------------------------------


def test_a_failed_export_is_refused_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    folder = made("tiny-4step", checked=Checked("failed", "dit, first chunk: 0.2, at most 0.0001"))
    with pytest.raises(
        GateError, match="(?s)is not known to compute.*got: failed: dit, first chunk: 0.2.*--force"
    ) as caught:
        Generator.from_engines(folder)
    assert caught.value.exit_code == 5
    words = ["--model", f"tiny-4step@{RECIPE.name}"]
    assert main(["generate", "--prompt", "a green seven", *words]) == 5
    assert main(["engines", *words]) in (5, 3)  # 3: no TensorRT here
    assert "longtake export --force" in capsys.readouterr().err
    line = Checked("failed", "x").require(folder, force=True)
    assert line is not None and "taken by --force" in line


def test_no_state_is_a_failed_one(tmp_path: Path) -> None:
    folder = made("tiny", checked=UNRECORDED)
    told = asdict(Export.read(folder))
    del told["checked"]
    KIND.write(told, folder / "export.json")
    with pytest.raises(GateError, match="no comparison with PyTorch is recorded"):
        Generator.from_engines(folder)


def test_an_unchecked_export_is_taken_with_a_line() -> None:
    line = Checked("unchecked", "--no-parity").require(Path("x"), force=False)
    assert line == "export x: unchecked (--no-parity)"
    assert Checked("passed", "").require(Path("x"), force=False) is None


def test_what_is_recorded_before_a_comparison() -> None:
    assert HowToExport(skeleton=True).unchecked.state == "unchecked"
    assert HowToExport(parity=False).unchecked == Checked("unchecked", "--no-parity")
    assert HowToExport().unchecked.state == "failed"  # a crash in the middle leaves it so


def test_export_options_that_contradict(own: Path) -> None:
    with pytest.raises(LongtakeError, match="both name what is exported"):
        export_cli.ExportOptions(model="tiny", checkpoints=own)
    with pytest.raises(LongtakeError, match="(?s)--model names a recipe.*--recipe"):
        export_cli.exports_of(export_cli.ExportOptions(model=RECIPE.name))
    pairs = export_cli.exports_of(export_cli.ExportOptions(model="tiny-4step"))
    assert [(recipe.name, model.name) for recipe, model in pairs] == [(RECIPE.name, "tiny-4step")]
    named = replace(export_cli.ExportOptions(checkpoints=own, recipe=(RECIPE.name,)), name="called-so")
    assert export_cli.exports_of(named)[0][1].name == "called-so"


# ---- the short way ---------------------------------------------------------------------------------------------------


def test_what_is_there_is_opened_and_what_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake import preparation as pretrained

    calls: list[Path] = []

    def failing(recipe: object, checkpoints: Path, folder: Path, how: HowToExport) -> None:
        calls.append(folder)
        raise GateError("it differs")

    monkeypatch.setattr("longtake.chain.export", failing)
    model = model_in(STUDENT)
    folder = made("tiny-4step", weights=model.weights)
    assert pretrained.prepared(model, RECIPE, on_cpu=True) == folder and not calls
    made("tiny-4step", weights=model.weights, checked=Checked("failed", "the comparison did not end"))
    with pytest.raises(GateError, match="it differs"):
        pretrained.prepared(model, RECIPE, on_cpu=True)
    assert pretrained.prepared(model, RECIPE, on_cpu=True, force=True) == folder and len(calls) == 2
    (folder / "export.json").write_text("{")  # damaged, or of another version
    with pytest.raises(GateError):
        pretrained.prepared(model, RECIPE, on_cpu=True)
    made("tiny-4step", weights={"dit": "0" * 64})  # of other weights
    with pytest.raises(GateError):
        pretrained.prepared(model, RECIPE, on_cpu=True)


def test_a_model_without_calibration_gets_a_recipe_that_needs_none(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    from longtake.preparation import best_recipe

    assert best_recipe(model_in(STUDENT), on_cpu=True) == RECIPE
    found = best_recipe(model_in(own), on_cpu=True)
    assert found.precision in ("bf16", "w4a16") and "mine is not calibrated for tiny_nvfp4_sm120" in caplog.text


def test_a_diffusers_folder_is_told_by_its_sizes(tmp_path: Path) -> None:
    import json

    from longtake.preparation import _preset_of

    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    sizes = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48}
    config.write_text(json.dumps(sizes))
    assert _preset_of(tmp_path).name == "wan2.2-ti2v-5b"
    config.write_text(json.dumps(sizes | {"num_layers": 31}))
    with pytest.raises(
        LongtakeError, match="(?s)no preset fits the transformer.*'layers': 31.*longtake convert --preset"
    ):
        _preset_of(tmp_path)


def test_training_takes_a_shipped_model_by_its_name_wherever_it_takes_a_folder() -> None:
    for name, words, field in (
        ("train", ["--stage", "dit", "--init", "tiny", "--vae", "tiny"], "init"),
        ("distill", ["--teacher", "tiny", "--vae", "tiny"], "teacher"),
    ):
        given = {key: value for made in parsed(name, [*words, "--out", "x"]) for key, value in vars(made).items()}
        assert given[field] == given["vae"] == model_name.shipped()["tiny"]


def test_a_home_that_cannot_be_written_to_is_said_in_words(
    home: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    model = model_in(own, "mine")
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(LongtakeError, match="mine is not prepared, and cannot be") as caught:
        prepared(model, recipe_named("tiny_nvfp4_sm120"), on_cpu=True)
    assert "LONGTAKE_HOME" in str(caught.value.fix)
    with pytest.raises(PermissionError):  # of something else: as it is
        monkeypatch.setattr("longtake.preparation.claimed", lambda model: refused(Path("/elsewhere")))
        prepared(model, recipe_named("tiny_nvfp4_sm120"), on_cpu=True)
