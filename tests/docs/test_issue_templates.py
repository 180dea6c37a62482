"""Issue templates are forms as GitHub reads them, ask for doctor's output and the report, and name commands that exist."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from longtake import settings
from longtake.commands.main import COMMANDS, parsed, split
from longtake.paths import REPOSITORY

FOLDER = REPOSITORY / ".github" / "ISSUE_TEMPLATE"
FORMS = ("bug", "wrong_result", "feature")


def form(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))
    return found


def test_there_are_three_and_their_settings() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*(f"{name}.yml" for name in FORMS), "config.yml"}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_a_form(name: str) -> None:
    given = form(name)
    assert set(given) == {"name", "description", "labels", "body"} and isinstance(given["labels"], list)
    ids = [field["id"] for field in given["body"]]
    assert len(set(ids)) == len(ids) <= 5 and "doctor" in ids
    for field in given["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"} and field["type"] == "textarea"
        assert set(field["attributes"]) <= {"label", "description", "render"} and field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in given["body"])


@pytest.mark.parametrize("name", FORMS)
def test_what_it_asks_for_can_be_had(name: str) -> None:
    text = (FOLDER / f"{name}.yml").read_text(encoding="utf-8")
    for command in re.findall(r"`longtake ([^`]+)`", text):
        if command != "--version":
            known, words = split(shlex.split(command))
            assert known in COMMANDS and isinstance(parsed(known, words), list)
    assert set(re.findall(r"LONGTAKE_\w+", text)) <= set(re.findall(r"LONGTAKE_\w+", settings.__doc__ or ""))


def test_a_wrong_result_comes_with_its_report() -> None:
    asked = {field["id"]: field for field in form("wrong_result")["body"]}
    assert asked["report"]["validations"]["required"] and asked["check"]["validations"]["required"]
