"""Which TensorRT flavour fits which machine, and what a machine without one is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longtake.errors import UnavailableError
from longtake.machine.flavour import Installed, choose, installed_flavours

FULL = Installed("tensorrt", "10.13.0")
STUB = Installed("tensorrt", "10.13.0", complete=False)
RTX_17 = Installed("tensorrt_rtx", "1.7.1.116")
RTX_16 = Installed("tensorrt_rtx", "1.6.1.120")


@pytest.mark.parametrize(
    ("capability", "installed", "name", "version"),
    [
        ("9.0", [FULL, RTX_16], "tensorrt", FULL.version),
        ("9.0", [STUB, RTX_16], "tensorrt_rtx", RTX_16.version),
        ("9.0", [RTX_16], "tensorrt_rtx", RTX_16.version),
        ("12.0", [RTX_17], "tensorrt_rtx", RTX_17.version),
        ("8.9", [RTX_16], "tensorrt_rtx", RTX_16.version),
        (None, [RTX_17], "tensorrt_rtx", RTX_17.version),
        (None, [FULL, RTX_17], "tensorrt_rtx", RTX_17.version),
    ],
)
def test_choice(capability: str | None, installed: list[Installed], name: str, version: str) -> None:
    choice = choose(capability, installed)
    assert (choice.name, choice.version) == (name, version)
    assert choice.reason


@pytest.mark.parametrize(
    ("capability", "installed", "says", "pip"),
    [
        ("9.0", [RTX_17], "refuse compute capability 9.0", "1.6.1.120"),
        ("9.0", [], "no usable TensorRT flavour", "1.6.1.120"),
        ("12.0", [], "no usable TensorRT flavour", "1.7.1.116"),
        (None, [], "no usable TensorRT flavour", "1.7.1.116"),
        (None, [STUB], "without its libraries", "1.7.1.116"),
        (None, [FULL], "cannot build engines without a GPU", "1.7.1.116"),
    ],
)
def test_refusal_says_what_to_install(capability: str | None, installed: list[Installed], says: str, pip: str) -> None:
    with pytest.raises(UnavailableError, match=says) as caught:
        choose(capability, installed)
    assert f"pip install tensorrt-rtx-cu13=={pip}" in str(caught.value)


def test_looking_does_not_import() -> None:
    code = (
        "import sys; from longtake.machine.flavour import installed_flavours; installed_flavours();"
        "sys.exit('tensorrt_rtx_bindings' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_installed_version_is_the_imported_one() -> None:
    found = {f.name: f for f in installed_flavours()}
    if "tensorrt_rtx" not in found:
        pytest.skip("TensorRT-RTX is not installed")
    from longtake.machine.flavour import load

    loaded = load(choose(None, [found["tensorrt_rtx"]]))
    assert loaded.module.__version__ == loaded.version == found["tensorrt_rtx"].version
