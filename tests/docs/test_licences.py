"""docs/licences.md names all that an image made by the Dockerfile installs, as the wheels themselves tell their licences."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest
from packaging.requirements import Requirement

from longtake.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def installed_by_the_image() -> list[str]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(line).name for line in [*PROJECT["dependencies"], *extras["serve"], *extras["rtx"]]]


def names_in(row: list[str]) -> list[str]:
    """The packages of a row: "**av** (PyAV)" is av, "CUDA parts of torch" is none."""
    plain = re.sub(r"\*\*| \(.*?\)|of `.*?`: ", "", row[0])
    return [name for name in plain.split(", ") if " " not in name]


def row_of(name: str) -> list[str]:
    return next((row for row in ROWS if name in names_in(row)), [])


@pytest.mark.parametrize("name", installed_by_the_image())
def test_every_package_has_a_row(name: str) -> None:
    assert row_of(name), f"docs/licences.md does not name {name}"


@pytest.mark.parametrize("name", installed_by_the_image())
def test_the_licence_is_the_wheel_s(name: str) -> None:
    """Where a wheel tells its licence by one SPDX name of the kinds below, the page says that kind."""
    try:
        said = metadata(name).get("License-Expression") or ""
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    for kind in ("MIT", "BSD", "Apache", "MPL"):
        if said.startswith(kind):
            assert kind in row_of(name)[1], f"{name}: {said}"


def test_no_row_is_of_a_package_that_is_gone() -> None:
    named = {name for row in ROWS[1:] for name in names_in(row)}
    assert len(named) > 30 and named <= set(installed_by_the_image()), named - set(installed_by_the_image())
