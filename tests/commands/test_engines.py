"""`longtake engines`: what it prints, and what it refuses before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from longtake.commands import engines as cli
from longtake.commands.main import parsed
from longtake.engines.build import PlanResult
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.plan import PlanManifest
from longtake.machine.flavour import Flavour


def run(*words: str) -> int:
    return cli.run(*parsed("engines", list(words)))


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, TensorRT-RTX 1.7."""
    monkeypatch.setattr(cli, "gpu_compute_capability", lambda: None)
    monkeypatch.setattr(cli, "flavour_for", lambda capability: Flavour("tensorrt_rtx", "1.7.1.116", None, "no GPU"))


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="did you mean 'tiny_nvfp4_sm120'"):
        run("--recipe", "tiny_nvfp4_sm12", "--out", str(tmp_path))


def test_a_recipe_for_another_machine_stops_all_before_the_first_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "build", lambda *args: pytest.fail("work had started"))
    with pytest.raises(UnavailableError, match="tiny_w4a16_sm90 cannot be built on this machine"):
        run("--recipe", "tiny_nvfp4_sm120", "--recipe", "tiny_w4a16_sm90", "--out", str(tmp_path))


def test_by_default_everything_buildable_is_built_and_the_rest_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake_build(recipe, onnx, out, flavour, *rest):  # noqa: ANN001, ANN002, ANN202
        manifest = PlanManifest(
            "dit.plan", "dit", "", 12_340_000, "", flavour.name, flavour.version, "12.0",
            {"sink_attention_nvfp4": {}}, {}, recipe.name, "tiny", 321, 4.56,
        )  # fmt: skip
        return [PlanResult(out / "dit.plan", manifest, recipe.name == "tiny_bf16_sm89")]

    monkeypatch.setattr(cli, "build", fake_build)
    monkeypatch.setattr(cli, "export", lambda recipe, checkpoints, onnx, how: None)
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    assert run("--out", str(tmp_path)) == 0
    text = capsys.readouterr().out
    for name in ("tiny_bf16_sm89", "tiny_w4a16_sm89", "tiny_nvfp4_sm120"):
        assert f"{name}: tensorrt_rtx 1.7.1.116 for compute capability" in text
    assert "tiny_w4a16_sm90: left out" in text and "tiny_bf16_sm90: left out" in text
    assert text.count("12.34") == 6 and text.count("321  sink_attention_nvfp4") == 3
    assert text.count("kept") == 1 and text.count("4.6") == 2
