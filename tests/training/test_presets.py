"""Preset files: what is shipped, what a file of one's own may say, and what a wrong one gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.formats.recipe import recipe_from_file
from longtake.training.models.families import preset_from_file, preset_named
from longtake.training.models.presets import PRESETS, SHIPPED, TINY, WAN22_TI2V_5B

WHOLE = (SHIPPED / "tiny.yaml").read_text(encoding="utf-8")


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_shipped_ones() -> None:
    worlds = {"sana-wm", "sana-wm-release", "world-tiny"}
    assert set(PRESETS) == {"tiny", "wan2.2-ti2v-5b", "wan2.2-ti2v-5b-check", *worlds}
    check = PRESETS["wan2.2-ti2v-5b-check"]
    assert (check.dit.dim, check.dit.layers, check.vae.decoder_dim, check.height) == (3072, 2, 32, 128)
    assert check.text.length == WAN22_TI2V_5B.text.length and check.family == "wan"
    assert TINY.checkpoints == "training/checkpoints/tiny" and TINY.digests == {}


def test_a_file_says_what_differs_from_its_base(tmp_path: Path) -> None:
    written(tmp_path, "base: tiny\ndit: {layers: 2}\ncheckpoints: here", "low.yaml")
    mine = preset_from_file(written(tmp_path, "base: low.yaml\nheight: 64"))
    assert (mine.name, mine.dit.layers, mine.dit.dim, mine.height, mine.width) == ("mine", 2, 256, 64, 128)
    assert mine.checkpoints == str(tmp_path / "checkpoints" / "mine")  # nobody else's
    assert preset_named("low.yaml", tmp_path).checkpoints == str(tmp_path / "here")
    assert preset_from_file(written(tmp_path, WHOLE, "tiny.yaml")) == TINY  # the same under the same name


BAD: dict[str, tuple[str, str]] = {
    "unknown key": (WHOLE + "heigth: 64", r"(?s)unknown key in preset .*mine.yaml.*'heigth'.*did you mean 'height'"),
    "unknown inner key": (WHOLE.replace("layers: 6", "layer: 6"),
                          r"(?s)unknown key in dit of preset .*mine.yaml.*did you mean 'layers'"),
    "doubled key": (WHOLE + "width: 64", r"(?s)mine.yaml is not valid YAML.*'width' is there twice"),
    "text for a number": (WHOLE.replace("layers: 6", "layers: six"),
                          r"(?s)mine.yaml: bad dit layers.*'six'.*expected: a whole number"),
    "a number for a list": (WHOLE.replace("[1, 2, 2, 4]", "4"), r"(?s)bad vae dim_mult.*expected: a list, of each a whole number"),
    "a list for a mapping": (WHOLE.replace("{steps: 16, guidance: 3.0}", "[16]"), r"sampling of preset .*is not a mapping"),
    "unknown family": (WHOLE.replace("family: wan", "family: gan"), r"(?s)unknown family.*got: gan.*expected: sana_wm, wan"),
    "no family": (WHOLE.replace("family: wan", ""), r"(?s)preset .*mine.yaml lacks keys.*family"),
    "missing inner key": (WHOLE.replace("heads: 4, channels", "channels"), r"(?s)dit of preset .*lacks keys.*'heads'"),
    "heads": (WHOLE.replace("heads: 4, channels", "heads: 3, channels"), "dit of preset .*mine.yaml: heads do not fit the DiT"),
    "nothing": (WHOLE.replace("layers: 6", "layers: 0"), r"(?s)dit of preset .*: bad layers.*1 or more"),
    "no whole token": (WHOLE.replace("height: 128", "height: 100"), "preset mine: the size is no multiple of a token's 32x32"),
    "another VAE's latents": (WHOLE.replace("z_channels: 16", "z_channels: 48"), "preset mine: the VAE does not fit the DiT"),
    "levels": (WHOLE.replace("[1, 2, 2, 4]", "[1, 2, 2]"), "vae of preset .*: the levels do not fit the VAE"),
    "text length": (WHOLE.replace("heads: 4, length: 32", "heads: 4, length: 8"), "the text encoder does not fit the DiT"),
    "text kind": (WHOLE.replace("kind: words", "kind: clip"), r"(?s)text of preset .*: bad kind.*words \| umt5"),
    "window": (WHOLE + "window_chunks: 2", "preset mine: the window is too small"),
    "steps": (WHOLE.replace("steps: 16", "steps: 0"), "sampling of preset .*: bad steps"),
    "base": ("base: tony", r"(?s)bad base.*got: tony.*did you mean 'tiny'"),
    "its own base": ("base: mine.yaml", "bad base"),
    "empty": ("", "preset .*mine.yaml is not a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file(tmp_path: Path, case: str) -> None:
    text, says = BAD[case]
    with pytest.raises(LongtakeError, match=says):
        preset_from_file(written(tmp_path, text))


def test_a_name_that_is_taken_or_none(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"(?s)has the name of a shipped one.*give the file another name"):
        preset_from_file(written(tmp_path, WHOLE.replace("height: 128", "height: 64"), "tiny.yaml"))
    with pytest.raises(LongtakeError, match=r"a preset cannot be called '.*mine'"):
        preset_from_file(written(tmp_path, WHOLE, "my mine.yaml"))
    for name in ("tinny", "tiny.yaml/none.yaml"):
        with pytest.raises(LongtakeError, match=r"(?s)unknown preset.*expected: sana-wm, .*tiny, wan2.2"):
            preset_named(name, tmp_path)


def test_a_recipe_names_a_preset_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    written(tmp_path / "presets", "base: tiny\nheight: 64")
    text = "preset: presets/mine.yaml\nprecision: bf16\ncache: bf16\ncompute_capability: 9.0\nmode: segmented\n"
    path = written(tmp_path, text + "gate: {dit: 0, vae: 0, text_encoder: 0, context: 0, ssim: 1}", "r.yaml")
    monkeypatch.chdir("/")
    recipe = recipe_from_file(path)
    assert (recipe.preset, recipe.onnx_name, recipe.model.height) == ("mine", "mine_bf16", 64)
    assert recipe.compute_capability == "9.0"
    path.write_text(path.read_text().replace("presets/mine.yaml", "mine.yaml"))
    with pytest.raises(LongtakeError, match=r"(?s)unknown preset.*got: mine.yaml"):
        recipe_from_file(path)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "base: tiny\nheigth: 64")
    assert main(["random-weights", "--preset", str(path), "--out", str(tmp_path / "w")]) == 2
    assert "did you mean 'height'?" in capsys.readouterr().err
