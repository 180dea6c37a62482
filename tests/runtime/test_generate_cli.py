"""`longtake generate` through main([...]): files, messages, exit codes, Ctrl-C. On the toy backend."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from longtake.commands.main import main
from longtake.formats.recipe import recipe_named
from longtake.runtime.generator import Generator
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.start import Request

STORY = """
seed: 3
steps: 2
guidance: 2
shots:
  - {prompt: a red one, chunks: 2}
  - {prompt: a blue two, chunks: 1, then: [{prompt: a white two}]}
"""
FRAMES = 29 + 3 * 32


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.yaml").write_text(STORY)
    return "story.yaml"


@pytest.fixture
def opened(toy: Any, make_generator: Callable[[Any], Generator], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the command open the toy backend."""
    monkeypatch.setattr(Generator, "from_engines", classmethod(lambda cls, *a, **k: make_generator(toy)))
    return toy


def frames_in(path: Path | str) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def same_session(a: str, b: str) -> bool:
    one, other = snapshot_from_file(a), snapshot_from_file(b)
    return (one.identity, one.position) == (other.identity, other.position) and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors | other.tensors
    )


def test_a_story_becomes_a_video_a_report_and_a_sheet(story: str, opened: Any, capsys: Any) -> None:
    assert main(["generate", story, "--out", "out/video.mp4"]) == 0
    said = capsys.readouterr()
    assert "backend: toy (made for tests)" in said.out
    for path in ("out/video.mp4", "out/video.png", "out/video.json"):
        assert path in said.out and Path(path).is_file()
    assert sorted(os.listdir("out")) == ["video.json", "video.mp4", "video.png"]
    assert frames_in("out/video.mp4") == FRAMES
    report = json.loads(Path("out/video.json").read_text())
    assert report["kind"] == "generate" and report["complete"] and report["backend"] == "toy"
    assert (report["chunks"], report["frames"], report["steps"], report["seed"]) == (4, FRAMES, 2, 3)
    assert report["resolution"] == "128x128" and (report["chunk_latents"], report["window_latents"]) == (8, 32)
    assert set(report["fps"]) == {"dit", "vae", "end_to_end"} and all(rate > 0 for rate in report["fps"].values())
    assert set(report["stage_ms"]) == {"conditions", "denoise", "clean", "decode"} and report["first_chunk_s"] > 0
    assert report["peak_gb"] == 0.123 and report["gpu"] is None and report["versions"]["torch"] == torch.__version__
    assert "frames a second" in said.out and "a white two" in said.err  # the table, and the progress bar's prompt


def test_overrides_and_one_prompt(story: str, opened: Any) -> None:
    arguments = ["--steps", "3", "--guidance", "1", "--seed", "9", "--report", "r.json", "--out", "v.mp4"]
    assert main(["generate", "--prompt", "a seven", "--chunks", "2", *arguments]) == 0
    report = json.loads(Path("r.json").read_text())
    assert (report["steps"], report["guidance"], report["seed"], report["frames"]) == (3, 1.0, 9, 61)
    assert len(opened.calls) == 2 * 4


def test_more_chunks_than_the_story_has(story: str, opened: Any) -> None:
    assert main(["generate", story, "--chunks", "5", "--out", "v.mp4"]) == 0
    assert frames_in("v.mp4") == FRAMES + 32


def test_save_and_go_on(story: str, opened: Any, capsys: Any) -> None:
    assert main(["generate", story, "--out", "whole.mp4", "--save-session", "whole.st"]) == 0
    assert main(["generate", story, "--chunks", "3", "--out", "a.mp4", "--save-session", "s.st"]) == 0
    assert main(["generate", "--load-session", "s.st", "--out", "b.mp4", "--save-session", "b.st"]) == 0
    assert frames_in("a.mp4") == 93 and frames_in("b.mp4") == 32
    assert same_session("b.st", "whole.st")
    capsys.readouterr()
    assert main(["generate", "--load-session", "b.st"]) == 2
    assert "the saved session has nothing left to do" in capsys.readouterr().err
    assert main(["generate", "--load-session", "b.st", "--prompt", "a two", "--chunks", "2", "--out", "c.mp4"]) == 0
    assert frames_in("c.mp4") == 64


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ctrl_c_keeps_finished_frames_and_the_session(
    story: str, opened: Any, capsys: Any, sent: signal.Signals, code: int
) -> None:
    """A signal in a pass of chunk 2: two chunks are kept, playable; the session goes on as if nothing had happened."""
    assert main(["generate", story, "--out", "whole.mp4", "--save-session", "whole.st"]) == 0
    calls = opened.count
    passes = 2 * 2 + 2
    start = 2 * passes + 4 + 3  # two chunks with 2 prompts encoded, then into the third

    def interrupt(call: int) -> None:
        if call == calls + start:
            os.kill(os.getpid(), sent)

    opened.hook = interrupt
    assert main(["generate", story, "--out", "cut.mp4", "--save-session", "cut.st"]) == code
    said = capsys.readouterr()
    assert "interrupted: the frames finished so far" in said.out and "Traceback" not in said.err
    assert frames_in("cut.mp4") == 61 and json.loads(Path("cut.json").read_text())["complete"] is False
    opened.hook = lambda call: None
    assert main(["generate", "--load-session", "cut.st", "--out", "rest.mp4", "--save-session", "rest.st"]) == 0
    assert frames_in("rest.mp4") == 64 and same_session("rest.st", "whole.st")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert sorted(Path().glob(".*")) == []


def test_ctrl_c_before_the_first_chunk_leaves_nothing(story: str, opened: Any, capsys: Any) -> None:
    opened.hook = lambda call: os.kill(os.getpid(), signal.SIGINT) if call == 3 else None
    assert main(["generate", story, "--out", "out/v.mp4"]) == 130
    assert "nothing to keep" in capsys.readouterr().err
    assert not Path("out").exists() or os.listdir("out") == []


def test_out_of_memory_keeps_finished_frames(story: str, opened: Any, capsys: Any) -> None:
    opened.fail_at(20, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"))
    assert main(["generate", story, "--out", "v.mp4"]) == 2
    error = capsys.readouterr().err
    assert "out of memory in chunk 2" in error and "fix:" in error and "Traceback" not in error
    assert frames_in("v.mp4") == 61


def test_a_decode_error_keeps_finished_frames(story: str, opened: Any) -> None:
    decoded: list[int] = []

    def fail() -> None:
        decoded.append(1)
        if len(decoded) > 20:
            raise RuntimeError("decoder broke")

    opened.on_decode = fail
    with pytest.raises(RuntimeError, match="decoder broke"):
        main(["generate", story, "--out", "v.mp4"])
    assert frames_in("v.mp4") == 61


BAD: list[tuple[list[str], int, list[str]]] = [
    ([], 2, ["nothing to generate", "--prompt"]),
    (["none.yaml"], 2, ["story none.yaml does not exist"]),
    (["story.yaml", "--prompt", "x"], 2, ["both a story and --prompt"]),
    (["--prompt", ""], 2, ["the prompt is empty"]),
    (["--prompt", "x" * 5000], 2, ["the prompt is too long", "at most 4096"]),
    (["--prompt", "\udcff"], 2, ["the prompt is not UTF-8 text"]),
    (["story.yaml", "--chunks", "0"], 2, ["bad number of chunks", "1 or more"]),
    (["story.yaml", "--steps", "0"], 2, ["bad number of denoise steps"]),
    (["story.yaml", "--out", "video.avi"], 2, ["the video must be an mp4", "--out video.mp4"]),
    (["story.yaml", "--out", "folder.mp4"], 2, ["is a folder"]),
    (["story.yaml", "--backend", "onnx"], 2, ["unknown backend", "auto | fused | segmented | reference"]),
    (["--load-session", "none.st"], 2, ["saved session none.st does not exist"]),
    (["--load-session", "none.st", "--seed", "1"], 2, ["a saved session fixes how it is sampled", "leave out --seed"]),
    (["--load-session", "story.yaml"], 4, ["no readable saved session"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), BAD)
def test_bad_input(story: str, opened: Any, capsys: Any, arguments: list[str], code: int, parts: list[str]) -> None:
    Path("folder.mp4").mkdir()
    assert main(["generate", *arguments]) == code
    error = capsys.readouterr().err
    for part in ("longtake: error:", *parts):
        assert part in error, error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--engines", "tiny_nvfp5_sm120"], 2, ["no such model or recipe", "did you mean 'tiny_nvfp4_sm120'?"]),
        (["--engines", "."], 2, ["holds no engines"]),
    ],
)
def test_engines_that_are_not_there(story: str, capsys: Any, arguments: list[str], code: int, parts: list[str]) -> None:
    assert main(["generate", story, *arguments]) == code
    error = capsys.readouterr().err
    for part in parts:
        assert part in error, error


NO_MODEL = [
    (["--seed", "-1"], "bad seed"),
    (["--steps", "0"], "bad number of denoise steps"),
    (["--guidance", "1000"], "bad guidance scale"),
    (["--negative-prompt", "x" * 5000], "the negative prompt is too long"),
    (["--action", "q-1"], "unknown key"),
    (["--speed", "99"], "bad speed"),
    (["--camera", "none.npy"], "the camera poses none.npy does not exist"),
    (["--image", "none.png"], "none.png"),
]


@pytest.mark.parametrize(("words", "says"), NO_MODEL)
def test_what_no_model_could_make_is_refused_before_one_is_opened(
    story: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], says: str
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Generator, "from_engines", classmethod(opened))
    assert main(["generate", story, *words]) == 2
    assert says in capsys.readouterr().err


def test_what_this_preset_cannot_make_is_refused_before_its_networks_are_opened(
    story: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = type("Source", (), {"recipe": recipe_named("tiny_bf16_sm90")})
    monkeypatch.setattr("longtake.runtime.generator.source_from_name", lambda name: source)
    assert main(["generate", story, "--action", "w-24"]) == 2
    assert "preset tiny has no camera" in capsys.readouterr().err
    Path(story).write_text(STORY + "height: 704\n")
    assert main(["generate", story]) == 2
    assert "height does not fit preset tiny" in capsys.readouterr().err


def test_a_request_is_what_a_session_takes() -> None:
    asked = [*signature(Generator.session).parameters][1:]
    assert asked == [field.name for field in fields(Request)]
    for name, parameter in list(signature(Generator.session).parameters.items())[2:]:
        assert parameter.default == getattr(Request, name), name


def test_a_story_of_another_preset(story: str, opened: Any, capsys: Any) -> None:
    Path(story).write_text(STORY + "height: 704\n")
    assert main(["generate", story]) == 2
    assert "height does not fit preset tiny" in capsys.readouterr().err


def test_help_teaches(capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["generate", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in ("then:", "Ctrl-C", "--load-session", "examples:"):
        assert word in text


def test_the_contact_sheet_of_a_long_video_stays_small() -> None:
    from longtake.commands.video_output import MOST_STILLS, ContactSheet

    sheet = ContactSheet()
    for index in range(1000):
        sheet.add(index, "x", False, np.zeros((4, 64, 64, 3), np.uint8))
    assert MOST_STILLS // 2 <= len(sheet.stills) <= MOST_STILLS
    assert sheet.stills[0].index == 0 and sheet.stills[-1].index > 900
