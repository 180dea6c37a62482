"""Environment variables: at most five, in one table, with errors that name them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longtake import settings
from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.settings import settings_from_environment

REPOSITORY = Path(__file__).parents[2]


def test_defaults() -> None:
    found = settings_from_environment({})
    assert found.log_level == "warning" and found.flavour == "auto" and found.trtexec is None
    assert found.threads >= 1 and found.cache_dir == found.home == Path.home() / ".cache" / "longtake"


def test_values() -> None:
    given = {"LONGTAKE_HOME": "/c", "LONGTAKE_LOG": "DEBUG", "LONGTAKE_THREADS": "3", "LONGTAKE_TRTEXEC": "/t"}
    found = settings_from_environment(given)
    assert (found.cache_dir, found.log_level, found.threads, found.trtexec) == (Path("/c"), "debug", 3, Path("/t"))


def test_the_old_name_is_read_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    settings._say_old.cache_clear()
    found = settings_from_environment({"LONGTAKE_CACHE_DIR": "/old"})
    assert found.home == found.cache_dir == Path("/old")
    assert "LONGTAKE_CACHE_DIR is called LONGTAKE_HOME now" in caplog.text and "LONGTAKE_HOME=/old" in caplog.text
    caplog.clear()
    both = settings_from_environment({"LONGTAKE_CACHE_DIR": "/old", "LONGTAKE_HOME": "/new"})
    assert both.home == both.cache_dir == Path("/new") and not caplog.text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LONGTAKE_LOG", "loud", "debug | info"),
        ("LONGTAKE_THREADS", "0", "a whole number"),
        ("LONGTAKE_THREADS", "many", "a whole number"),
        ("LONGTAKE_FLAVOUR", "vanilla", "auto | tensorrt | tensorrt_rtx"),
    ],
)
def test_bad_values(name: str, value: str, expected: str) -> None:
    with pytest.raises(LongtakeError) as caught:
        settings_from_environment({name: value})
    assert f"bad environment variable {name}" in str(caught.value) and expected in str(caught.value)
    assert f"unset {name}" in str(caught.value)


def test_a_bad_variable_stops_any_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LONGTAKE_LOG", "loud")
    assert main(["generate", "story.yaml"]) == 2
    assert "bad environment variable LONGTAKE_LOG" in capsys.readouterr().err


def test_the_table_is_complete_and_nobody_else_reads_the_environment() -> None:
    table = set(re.findall(r"^\| (LONGTAKE_\w+)", settings.__doc__ or "", re.MULTILINE))
    source = Path(settings.__file__).read_text()
    assert len(table) <= 5 and set(re.findall(r'"(LONGTAKE_\w+)"', source)) == table | {"LONGTAKE_CACHE_DIR"}
    for folder in ("training", "export", "plugins", "engines", "runtime"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            torchrun = "parallel" in path.parts  # reads what torchrun sets, and no setting of ours
            workers = path.parts[-2:] == ("experiment", "scheduler.py")  # hands its own on, and each its GPU
            encoder = path.name == "fragments.py"  # quiets the AV1 encoder, which takes no option for it
            if path.name != "settings.py" and not torchrun and not workers and not encoder:
                assert not re.search(r"os\.environ\b|getenv", path.read_text()), f"{path} reads the environment"


def test_without_a_home_the_cache_is_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As services and containers run: no HOME, and a user id that the system's list lacks."""

    def nobody(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings._private_folder.cache_clear()
    found = settings_from_environment({}).cache_dir
    assert found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700
    assert settings_from_environment({"LONGTAKE_HOME": "/c"}).cache_dir == Path("/c")
    settings._private_folder.cache_clear()
    found.chmod(0o777)  # where anyone can write, anyone can leave compiled code to be run
    other = settings_from_environment({}).cache_dir
    assert other != found and other.parent == tmp_path and other.stat().st_mode & 0o777 == 0o700
    settings._private_folder.cache_clear()
