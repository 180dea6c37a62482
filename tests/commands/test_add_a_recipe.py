"""docs/add-a-recipe.md, executed: a recipe and a preset of one's own, and folders that open without them."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.commands.main import main
from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, write_json
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Export
from longtake.formats.recipe import Recipe, recipe_from_file, recipe_named
from longtake.paths import REPOSITORY
from longtake.runtime.generator import Generator
from longtake.runtime.sources import source_from_name
from longtake.training.models.families import preset_named
from longtake.training.models.load import load_models, read_side

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "add-a-recipe.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.-]+\.yaml)`:.*?```yaml\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for line in re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL).group(1).splitlines()  # type: ignore[union-attr]
]


def write_files(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's folder after its commands but the last; without its YAML files."""
    folder = tmp_path_factory.mktemp("page")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert [main(words) for words in COMMANDS[:-1]] == [0] * (len(COMMANDS) - 1)
    for name in FILES:
        (folder / name).unlink()
    return folder


def test_the_page(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder alone is enough, for every command that takes one."""
    monkeypatch.chdir(made)
    assert main(COMMANDS[-1]) == 0 and (made / "video.mp4").is_file()
    assert main(["budget", "--engines", "onnx/small_w4a16", "--json"]) == 0
    assert main(["profile", "--engines", "onnx/small_w4a16", "--network", "context", "--runs", "1"]) == 0
    with closing(Generator.from_engines("onnx/small_w4a16").backend) as backend:
        assert (backend.preset.name, backend.preset.dit.dim, backend.recipe.name) == ("small", 64, "small_w4a16")
    capsys.readouterr()


@pytest.mark.slow
def test_check_from_the_folder_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert main(["check", "--engines", "onnx/small_w4a16", "--report", "r.json"]) == 0
    assert read_json(made / "r.json")["recipe"] == "small_w4a16"


@pytest.mark.parametrize("what, name, old, new, says", [
    ("recipe", "small_w4a16.yaml", "mode: segmented", "mode: segmented\nattention: fp8",
     r"(?s)made by another recipe of the name small_w4a16.*got: {'attention': 'bf16'}.*expected: {'attention': 'fp8'}"),
    ("preset", "small.yaml", "height: 64", "height: 32",
     r"(?s)made by another preset of the name small.*got: {'height': 64}.*expected: {'height': 32}"),
])  # fmt: skip
def test_another_one_of_the_same_name(
    made: Path, tmp_path: Path, what: str, name: str, old: str, new: str, says: str
) -> None:
    write_files(tmp_path)
    folder = made / "onnx" / "small_w4a16"
    same = recipe_from_file(tmp_path / "small_w4a16.yaml")
    Export.read(folder).require_recipe(same, folder)
    (tmp_path / name).write_text(FILES[name].replace(old, new))
    other = recipe_from_file(tmp_path / "small_w4a16.yaml")
    with pytest.raises(LongtakeError, match=says):
        Export.read(folder).require_recipe(other, folder)
    with pytest.raises(LongtakeError, match=says):
        source_from_name(folder).recipe.require_same(other, folder)
    Export.read(folder).require_recipe(replace(same, gate=replace(same.gate, dit=0.5)), folder)


def test_a_checkpoint_of_another_preset_of_the_same_name(made: Path, tmp_path: Path) -> None:
    write_files(tmp_path)
    preset = preset_named("small.yaml", tmp_path)
    assert read_side(made / "weights" / "dit.safetensors", "dit", preset).preset == "small"
    (tmp_path / "small.yaml").write_text(FILES["small.yaml"].replace("heads: 2", "heads: 4"))
    other = preset_named("small.yaml", tmp_path)
    with pytest.raises(IntegrityError, match=r"(?s)of another preset 'small': its dit is described otherwise"):
        load_models(other, made / "weights")
    read_side(made / "weights" / "vae.safetensors", "vae", other)  # which is the same


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "docs" / "recipes_library").glob("tiny*.yaml")), ids=lambda p: p.stem
)
def test_an_export_for_a_recipe_that_is_not_shipped(path: Path, tmp_path: Path) -> None:
    recipe = recipe_from_file(path)
    export = Export(recipe.onnx_name, recipe.preset, recipe.precision, recipe.cache, {}, (), recipe.linears)
    replace(export, recipe=recipe.whole).write(tmp_path)
    assert source_from_name(tmp_path).recipe == recipe


def test_folders_of_the_version_before(tmp_path: Path) -> None:
    """They are refused, with the command that makes them anew."""
    recipe = recipe_named("tiny_bf16_sm90")
    Export(recipe.onnx_name, "tiny", "bf16", "bf16", {}, ()).write(tmp_path)
    told = read_json(tmp_path / "export.json")
    write_json(tmp_path / "export.json", {key: value for key, value in told.items() if key != "recipe"})
    with pytest.raises(IntegrityError, match="longtake export"):
        source_from_name(tmp_path)


def test_a_bundle_of_an_own_preset(tmp_path: Path) -> None:
    write_files(tmp_path)
    recipe = recipe_from_file(tmp_path / "small_w4a16.yaml")
    path = _bundle(tmp_path / "engines", recipe, tmp_path)
    (tmp_path / "small.yaml").unlink()
    assert Bundle.read(tmp_path / "engines").recipe == recipe
    assert json.loads(path.read_text())["recipe_fields"]["own_preset"]["dit"]["dim"] == 64
    assert main(["budget", "--engines", str(tmp_path / "engines")]) == 0


def _bundle(folder: Path, recipe: Recipe, onnx: Path) -> Path:
    folder.mkdir()
    return Bundle(recipe, "tensorrt_rtx", "1.7", onnx, {}, {}, (), folder=folder).write()
