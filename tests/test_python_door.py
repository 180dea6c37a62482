"""The door for programs: types, strings as prompts, a callback a step, words that tell what a thing is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_backend import ToyBackend, toy_tokenize

import longtake
from longtake import CancelledError, LongtakeError, Sampling, Step, Video
from longtake.paths import REPOSITORY
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.view import View
from longtake.training.models.text.words import Tokenizer


@pytest.fixture
def generator() -> Generator:
    return Generator(ToyBackend(), toy_tokenize)


@pytest.mark.slow
def test_a_user_s_script_passes_mypy_strict(tmp_path: Path) -> None:
    script = Path(__file__).parent / "user" / "script.py"
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file", "/dev/null", "--follow-imports", "silent"]
    done = subprocess.run([*words, str(script)], capture_output=True, text=True, cwd=REPOSITORY, timeout=500)
    assert done.returncode == 0, done.stdout
    assert len(script.read_text().splitlines()) >= 60


FIRST = """
from longtake import generate
assert generate("a green seven rises", chunks=1, steps=1).frames.shape == (29, 128, 128, 3)
"""
SECOND = """
import time
from longtake import Generator
for _ in range(2):
    with Generator.from_pretrained("tiny-4step", device="cpu") as generator:
        print(time.process_time(), time.perf_counter())
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_second_call_opens_in_seconds(tmp_path: Path) -> None:
    """Seconds of the process's own work, the start of Python and PyTorch included: a busy machine makes only others wait."""
    home = {"LONGTAKE_HOME": str(tmp_path), "LONGTAKE_THREADS": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(script: str) -> str:
        words = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.run(
            words, env={**os.environ, **home}, cwd=REPOSITORY, stdout=-1, text=True, check=True
        ).stdout

    run(FIRST)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx")}
    begun = time.perf_counter()
    fresh, again = (tuple(map(float, line.split())) for line in run(SECOND).splitlines())
    print(
        f"opened after {fresh[0]:.1f} s of work, {fresh[1] - begun:.1f} s by the clock; again in {again[0] - fresh[0]:.1f} s"
    )
    assert made and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.onnx")} == made
    assert fresh[0] < 5 and again[0] - fresh[0] < 5


def test_opening_what_is_there_does_not_load_the_exporter() -> None:
    script = "import sys, longtake.pretrained, longtake.preparation; print('onnxscript' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == ["False"]


def test_every_public_name_is_there() -> None:
    for name in longtake.__all__:
        assert getattr(longtake, name) is not None
    assert longtake.Generator.__mro__[1] is Generator


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seed": -1}, "bad seed"),
        ({"steps": "4"}, "bad number of denoise steps"),
        ({"guidance": "2"}, "bad guidance scale"),
        ({"sampling": Sampling(steps=4), "steps": 4}, "steps and guidance are part of sampling"),
        ({"noise": [1.0]}, "this is no noise"),
        ({"on_step": 3}, "on_step is no function"),
        ({"image": 3}, "this is not an image"),
        ({"chunks": 0}, "bad number of chunks"),
        ({"chunks": 2, "noise": torch.zeros(1, 8, 16, 16, 16)}, "the noise of chunk 1 does not fit"),
        ({"view": View(action="w-24")}, "preset tiny has no camera"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_model_is_made_ready(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], says: str
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was made ready")

    monkeypatch.setattr(longtake.Generator, "from_pretrained", opened)
    with pytest.raises(LongtakeError, match=says):
        longtake.generate("a green seven rises", **given)


def test_a_string_is_a_prompt_or_a_story(generator: Generator, tmp_path: Path) -> None:
    assert [chunk.prompt for chunk in generator.session("a green seven rises")] == ["a green seven rises"]
    assert len(list(generator.session("a green seven rises", chunks=3))) == 3
    with pytest.raises(LongtakeError, match="story nothing.yaml does not exist"):
        generator.session("nothing.yaml")
    (tmp_path / "own.yaml").write_text("shots:\n  - prompt: a red two\n    chunks: 2\n")
    assert generator.session(str(tmp_path / "own.yaml")).remaining == 2
    assert generator.session("demo").remaining == generator.session("demo.yaml").remaining > 2


def test_a_callback_sees_each_step(generator: Generator) -> None:
    seen: list[Step] = []
    with generator.session("a seven", steps=3, chunks=2, on_step=seen.append) as session:
        chunks = list(session)
    with generator.session("a seven", steps=3, chunks=2) as plain:
        without = [chunk.latents for chunk in plain]
    assert [(step.chunk, step.index, step.steps) for step in seen] == [(c, i, 3) for c in (0, 1) for i in range(3)]
    assert seen[0].preview.shape == chunks[0].latents.shape
    assert [step.timestep for step in seen[:3]] == sorted((step.timestep for step in seen[:3]), reverse=True)
    assert all(torch.equal(chunk.latents, other) for chunk, other in zip(chunks, without))


def test_a_callback_can_cancel_and_the_session_goes_on(generator: Generator) -> None:
    calls: list[int] = []

    def stop(step: Step) -> None:
        calls.append(step.index)
        if len(calls) == 2:
            step.cancel()

    with generator.session("a seven", steps=4, on_step=stop) as session:
        with pytest.raises(CancelledError):
            next(session)
        assert calls == [0, 1]
        chunk: Chunk = next(session)
    assert chunk.index == 0


def test_what_a_callback_raises_comes_out_and_nothing_is_lost(generator: Generator) -> None:
    def broken(step: Step) -> None:
        raise ValueError("mine")

    with generator.session("a seven", steps=2, on_step=broken) as session:
        with pytest.raises(ValueError, match="mine"):
            next(session)
        assert session.next_index == 0


def test_things_tell_what_they_are(generator: Generator, tmp_path: Path) -> None:
    assert "tiny_bf16_sm90: toy backend on cpu, 128x128" in repr(generator)
    session = generator.session("a green seven", chunks=2)
    assert "chunk 0 is next, 2 left" in repr(session)
    chunk = next(session)
    assert "tensor(" not in repr(chunk) and "a green seven" in repr(chunk)
    session.close()
    assert "closed" in repr(session)
    video = Video(np.zeros((29, 16, 16, 3), np.uint8), 24, {})
    assert repr(video) == "<Video: 29 frames 16x16, 1.2 s at 24 a second>"
    with pytest.raises(LongtakeError, match=r"(?s)must be an mp4.*video.save\('.*x.mp4'\)"):
        video.save(tmp_path / "x.avi")
    assert video.save(tmp_path / "x.mp4").stat().st_size > 500
    (tmp_path / "theirs.mp4").write_bytes(b"not a video of ours")
    with pytest.raises(LongtakeError):
        video.save(tmp_path / "theirs.mp4")


def test_a_place_for_the_video_is_looked_at_before_it_is_made(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: object) -> Generator:
        raise AssertionError("the work begins")

    monkeypatch.setattr(longtake.Generator, "from_pretrained", opened)
    (tmp_path / "theirs.mp4").write_bytes(b"not a video of ours")
    ours = Video(np.zeros((29, 16, 16, 3), np.uint8), 24, {}).save(tmp_path / "ours.mp4")
    for out, more, said in (
        ("x.avi", {}, r"(?s)must be an mp4.*out='.*x.mp4'"),
        ("theirs.mp4", {}, "a file that longtake did not write"),
        ("ours.mp4", {"continue_from": str(ours)}, "would replace continue_from: they are the same file"),
    ):
        with pytest.raises(LongtakeError, match=said):
            longtake.generate("a seven", out=tmp_path / out, **more)
    for wrong, said in (
        ({"chunks": "2"}, "(?s)bad number of chunks.*'2'.*a whole number"),
        ({"chunks": 0}, "bad number of chunks"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "nothing.yaml"}, "story nothing.yaml does not exist"),
        ({"chunk": 2}, "(?s)unknown key in generate.*'chunk'.*did you mean 'chunks'"),
    ):
        with pytest.raises(LongtakeError, match=said):
            longtake.generate(**{"prompt": "a seven", **wrong})  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the work begins"):
        longtake.generate("a seven", out=tmp_path / "ours.mp4")


def test_a_session_is_not_saved_over_a_file_of_others(generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"theirs")
    with generator.session("a seven") as session:
        with pytest.raises(LongtakeError, match="the session would replace a file that longtake did not write"):
            session.save(tmp_path / "photo.png")
        session.save(tmp_path / "s.safetensors")
        session.save(tmp_path / "s.safetensors")
    assert (tmp_path / "photo.png").read_bytes() == b"theirs"


def test_numbers_of_numpy_are_numbers(generator: Generator) -> None:
    plain = Sampling(timesteps=(999, 500), shift=5, guidance=1)
    theirs = Sampling(timesteps=tuple(np.float32([999, 500])), shift=np.float32(5), guidance=np.float32(1))
    sessions = [generator.session("a seven", sampling=one, seed=np.int64(1)) for one in (plain, theirs)]  # type: ignore[arg-type]
    assert torch.equal(*(next(session).latents for session in sessions))
    for bad in ("3", True):
        with pytest.raises(LongtakeError, match="bad guidance scale"):
            generator.session("a seven", guidance=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [object(), 7, [[0]]])
def test_what_is_no_picture_is_refused(generator: Generator, image: Any) -> None:
    generator.backend.new_encoder = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(LongtakeError, match="(?s)this is not an image.*a PIL image"):
        generator.session("a seven", image=image)


def test_latents_of_numpy_are_a_clip(generator: Generator) -> None:
    latents = np.zeros((1, 8, 16, 8, 8), np.float32)
    with generator.session("a seven", continue_from=latents) as session:
        assert session.next_index == 1
    with generator.session("a seven") as session:
        assert session.feed(latents[:, :8, :, ::-1], "a two").index == 0


NAN = torch.full((1, 8, 16, 8, 8), float("nan"))
FRAMES = np.zeros((29, 128, 128, 3), np.uint8)
NO_LATENTS = [
    (3.0, r"(?s)these are no latents.*float.*of torch or numpy.*generator.encode\(frames\)"),
    ([FRAMES], r"(?s)these are no latents.*list"),
    (np.array(["a"]), "these are no latents"),
    (NAN, "latents.* are not all finite"),
    (NAN.half() / 0, "latents.* are not all finite"),
    (NAN.new_full(NAN.shape, float("inf")).numpy(), "latents.* are not all finite"),
    (NAN.nan_to_num().int(), r"(?s)torch.int32 \(1, 8, 16, 8, 8\).*expected: .*, "),
    (FRAMES, r"(?s)torch.uint8 \(29, 128, 128, 3\)"),
]


@pytest.mark.parametrize(("given", "said"), NO_LATENTS)
def test_what_are_no_latents_is_refused_in_words(generator: Generator, given: Any, said: str) -> None:
    with generator.session("a seven") as session:
        with pytest.raises(LongtakeError, match=said):
            session.feed(given, "a seven")
        assert session.next_index == 0
    with pytest.raises(LongtakeError, match=said) as caught:
        generator.session("a seven", continue_from=given)
    assert "generator.encode(frames)" in str(caught.value) or "finite" in said


@pytest.mark.parametrize("video", [[FRAMES[0]], 3, torch.zeros(29, 128, 128, 3), FRAMES.astype(np.float32), FRAMES[0]])
def test_what_are_no_frames_is_refused_in_words(generator: Generator, video: Any) -> None:
    with pytest.raises(LongtakeError, match=r"(?s)these are no frames.*expected: uint8 \[T, H, W, 3\].*np.stack"):
        generator.encode(video)


def test_a_live_prompt_of_unknown_words_is_refused_at_once() -> None:
    words = Generator(ToyBackend(), Tokenizer(["a", "red", "two"]))
    embeddings = {"a two": torch.zeros(1, 32, 128)}
    with (
        words.session("a red two", endless=True) as session,
        words.session("a two", embeddings=embeddings, guidance=1) as given,
    ):
        for change in (session.change_prompt, session.cut, lambda prompt: session.extend(1, prompt)):
            with pytest.raises(LongtakeError, match="(?s)does not know most of these words.*3 of 3.*such as a, red"):
                change("quick brown fox")
        with pytest.raises(LongtakeError, match="(?s)no embeddings of this prompt were given.*'a red two'.*'a two'"):
            given.change_prompt("a red two")
        assert next(session).prompt == "a red two" and session.cut("a two") == 1
        assert given.cut("a two") == 0 and next(given).prompt == "a two"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"script": 3}, "(?s)this is no script.*got: 3.*a list of prompts.*fix"),
        ({"script": {"shots": []}}, "(?s)this is no script.*shots.*a Story or its path"),
        ({"script": None}, "this is no script"),
        ({"script": []}, "(?s)the script is empty.*expected.*fix"),
        ({"noise": NAN.numpy()}, r"(?s)this is no noise.*ndarray.*torch.as_tensor\(noise\)"),
        ({"noise": 7}, "(?s)this is no noise.*int"),
        ({"on_step": 3}, "(?s)on_step is no function.*got: 3.*a Step"),
    ],
)
def test_what_a_session_cannot_use_is_refused_before_it_is_made(
    generator: Generator, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(LongtakeError, match=said):
        generator.session(**{"script": "a seven", **wrong})


def test_an_unknown_solver_is_refused_when_it_is_named() -> None:
    with pytest.raises(LongtakeError, match="(?s)unknown solver.*'ddim'.*unipc, euler"):
        Sampling(solver="ddim")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", object()])
def test_a_device_that_is_none_is_refused_in_words(device: Any) -> None:
    said = "(?s)unknown device.*cuda:N.*leave out device" if device != "cuda:99" else "(?s)cuda:99 is not there.*cpu"
    for opened in (longtake.Generator.from_pretrained, Generator.from_checkpoint):
        with pytest.raises(LongtakeError, match=said):
            opened("tiny-4step", device=device)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": "4"}, {"guidance": float("nan")}, {"guidance": "3"}])
def test_the_fix_of_bad_sampling_is_the_model_s_own(generator: Generator, wrong: dict[str, Any]) -> None:
    with pytest.raises(LongtakeError, match="fix: pass (steps=4|guidance=1) .*leave .* out for the model's own"):
        generator.session("a seven", **wrong)
