"""docs/add-a-training-option.md: its field, put where it says, does what its table says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from longtake.commands.options import instances, parser_of
from longtake.commands.run_files import values_of_file
from longtake.errors import LongtakeError
from longtake.options import Command, recorded, settings_of
from longtake.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "add-a-training-option.md").read_text(encoding="utf-8")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """training/stages/options.py with the page's field at the end of `DiTOptions`."""
    (field,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    before, after = (
        (REPOSITORY / "training" / "stages" / "options.py")
        .read_text(encoding="utf-8")
        .split("\n\n\n@dataclass(frozen=True)\nclass FolderOptions")
    )
    path = tmp_path / "changed_options.py"
    path.write_text(f"{before}\n{field}\n\n@dataclass(frozen=True)\nclass FolderOptions{after}", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_options", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_options", module)
    spec.loader.exec_module(module)
    return module


def test_one_field_is_an_option(options: ModuleType, tmp_path: Path) -> None:
    command = Command(run=lambda: 0, options=(options.StageOptions,), description="")
    parser = parser_of("train", command)
    said = " ".join(parser.format_help().split())
    assert "--latent-noise STD noise on the latents that the DiT is trained on (default 0)" in said
    (given,) = instances("train", command, parser.values(["--latent-noise", "0.1"]), {})
    assert given.latent_noise == 0.1
    assert settings_of(given)["latent_noise"] == 0.1, "a resumed run is compared by it"
    assert recorded(given, "dit")["latent_noise"] == 0.1 and "latent_noise" not in recorded(given, "vae")
    with pytest.raises(LongtakeError, match=r"bad --latent-noise\n.*got: 2.0\n.*0 to 1\n.*--latent-noise 0.0"):
        instances("train", command, parser.values(["--latent-noise", "2"]), {})
    (tmp_path / "run.yaml").write_text("latent-noise: 0.2\n")
    assert values_of_file(tmp_path / "run.yaml", command) == {"latent_noise": 0.2}
