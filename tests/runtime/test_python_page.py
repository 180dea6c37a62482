"""docs/python.md, executed; the shapes it tells of the 5B preset are the preset's."""

from __future__ import annotations

import re
from typing import Any

import pytest

from longtake.paths import REPOSITORY
from longtake.training.models.families import preset_named

PAGE = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    scope: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec", dont_inherit=True), scope)  # noqa: S102
    assert len(blocks) == 9 and "there is no VAE to decode with" in capsys.readouterr().out


def test_the_shapes_of_the_large_preset() -> None:
    preset = preset_named("wan2.2-ti2v-5b")
    latents = [1, preset.chunk_latents, preset.vae.z_channels, *preset.latent_hw]
    assert PAGE.count(str(latents)) == 2
    assert str([1, preset.text.length, preset.text.dim]) in PAGE
    assert str([4 * preset.chunk_latents, preset.height, preset.width, 3]) in PAGE
