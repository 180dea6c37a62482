"""What bad pictures, clips and memory budgets get, through the real command line. Nothing is left half-written."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from longtake.commands.main import main
from longtake.runtime.generator import Generator
from longtake.video import write_video

PARTS = ("got:", "expected:", "fix:")
Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, toy: Any, make_generator: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """refused(code, words): `longtake generate` on the toy backend must exit with `code`, say why, and write nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generator, "from_engines", classmethod(lambda cls, *a, **k: make_generator(toy)))

    def run(code: int, *words: object, prompt: bool = True) -> str:
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        given = ["--prompt", "a red two"] if prompt else []
        assert main(["generate", *given, *map(str, words)]) == code
        said = capsys.readouterr().err
        assert said.count("longtake: error: ") == 1 and "Traceback" not in said, said
        for part in PARTS:
            assert part in said, said
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
        return said

    return run


def png(path: Path, width: int = 64, height: int = 64) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_no_picture_there(refused: Refused) -> None:
    assert "image nowhere.png does not exist" in refused(2, "--image", "nowhere.png")


def test_a_folder_for_a_picture(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is not a file" in refused(2, "--image", "folder.png")
    assert "is not a file" in refused(2, "--image", "")


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"no picture at all",
    "pickle": lambda content: pickle.dumps({"pixels": 1}),
    "truncated": lambda content: content[: len(content) // 2],
    "only a header": lambda content: content[:30],
    "damaged": lambda content: content[:80] + bytes(200) + content[280:],
    "svg": lambda content: b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>",
    "gif": lambda content: b"GIF89a" + bytes(40),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_whole_picture(refused: Refused, tmp_path: Path, case: str) -> None:
    (tmp_path / "p.png").write_bytes(CONTENTS[case](png(tmp_path / "good.png")))
    assert "cannot read image p.png" in refused(2, "--image", "p.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (15, 64)])
def test_a_picture_that_is_too_small(refused: Refused, tmp_path: Path, size: tuple[int, int]) -> None:
    png(tmp_path / "p.png", *size)
    said = refused(2, "--image", "p.png")
    assert "image p.png is too small" in said and f"{size[0]}x{size[1]} pixels" in said


def test_a_picture_that_claims_to_be_huge(refused: Refused, tmp_path: Path) -> None:
    """A bomb: the header alone says 40,000 x 40,000; nothing of that size may be allocated."""
    content = png(tmp_path / "p.png")
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + content[24:29]
    (tmp_path / "p.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert "image p.png is too large" in refused(2, "--image", "p.png")


def test_a_story_with_a_picture_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("image: p.png\nshots: [{prompt: x}]\n")
    assert "image p.png does not exist" in refused(2, "s.yaml", prompt=False)
    (tmp_path / "s.yaml").write_text("image: [1]\nshots: [{prompt: x}]\n")
    assert "does not fit the schema at image" in refused(2, "s.yaml", prompt=False)
    (tmp_path / "s.yaml").write_text("imge: p.png\nshots: [{prompt: x}]\n")
    assert "did you mean 'image'?" in refused(2, "s.yaml", prompt=False)


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_a_clip_that_is_none(refused: Refused, tmp_path: Path, toy: Any) -> None:
    assert "nowhere.mp4 does not exist" in refused(2, "--continue-from", "nowhere.mp4")
    assert "is not a file" in refused(2, "--continue-from", tmp_path)
    (tmp_path / "c.mp4").write_bytes(b"no video at all")
    assert "cannot read c.mp4" in refused(2, "--continue-from", "c.mp4")
    write_video(tmp_path / "c.mp4", np.zeros((28, 64, 64, 3), np.uint8), 24)
    toy.new_encoder = lambda: None
    said = refused(2, "--continue-from", "c.mp4")
    assert "c.mp4 is too short to go on from" in said and "28 frames" in said and "at least 29" in said


LATENTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another name": ({"z": torch.zeros(8, 16, 8, 8)}, "holds no latents"),
    "no tensors": ({}, "holds no latents"),
    "another preset": ({"latents": torch.zeros(8, 48, 44, 80)}, "do not fit"),
    "part of a chunk": ({"latents": torch.zeros(7, 16, 8, 8)}, "do not fit"),
    "no frames": ({"latents": torch.zeros(0, 16, 8, 8)}, "do not fit"),
    "two videos": ({"latents": torch.zeros(2, 8, 16, 8, 8)}, "do not fit"),
    "integers": ({"latents": torch.zeros(8, 16, 8, 8, dtype=torch.int32)}, "do not fit"),
    "nan": ({"latents": torch.full((8, 16, 8, 8), float("nan"))}, "not all finite"),
}


@pytest.mark.parametrize("case", LATENTS)
def test_latents_that_do_not_fit(refused: Refused, tmp_path: Path, case: str) -> None:
    tensors, says = LATENTS[case]
    save_file(tensors, str(tmp_path / "c.safetensors"))
    assert says in refused(2, "--continue-from", "c.safetensors")


def test_a_file_of_latents_that_is_damaged_or_none(refused: Refused, tmp_path: Path, capsys: Any) -> None:
    save_file({"latents": torch.zeros(8, 16, 8, 8)}, str(tmp_path / "c.safetensors"))
    content = (tmp_path / "c.safetensors").read_bytes()
    for damaged in (b"", content[: len(content) // 2], pickle.dumps({"latents": 1})):
        (tmp_path / "c.safetensors").write_bytes(damaged)
        assert "no readable file of latents" in refused(4, "--continue-from", "c.safetensors")
    assert "does not exist" in refused(2, "--continue-from", "nowhere.safetensors")
    words = ["--out", "v.mp4", "--steps", "1", "--save-session", "s.safetensors"]
    assert main(["generate", "--prompt", "a seven", *words]) == 0
    capsys.readouterr()
    said = refused(2, "--continue-from", "s.safetensors")
    assert "is a saved session, not a clip" in said and "--load-session" in said
    assert "a saved session has begun already" in refused(2, "--load-session", "s.safetensors", "--image", "p.png")


def test_starts_that_contradict_each_other(refused: Refused, tmp_path: Path) -> None:
    png(tmp_path / "p.png")
    assert "from an image or from a clip" in refused(2, "--image", "p.png", "--continue-from", "c.mp4")
    assert "a clip's prompt was given, but no clip" in refused(2, "--clip-prompt", "x")
    assert "the clip's prompt is empty" in refused(2, "--clip-prompt", " ", "--continue-from", "c.mp4")


def test_a_backend_without_an_encoder_says_so(refused: Refused, tmp_path: Path, toy: Any) -> None:
    png(tmp_path / "p.png")

    def missing() -> None:
        from longtake.errors import LongtakeError

        raise LongtakeError("no VAE encoder", got="old engines", expected="vae_encoder_first", fix="build them again")

    toy.new_encoder = missing
    assert "no VAE encoder" in refused(2, "--image", "p.png")


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no recipe was named"),
        (["--recipe", "tiny_bf16_sm9"], "unknown recipe"),
        (["--engines", "nowhere"], "holds no engines"),
        (["--recipe", "tiny_bf16_sm90", "--device", "cuda:99"], "there is no GPU cuda:99"),
        (["--recipe", "tiny_bf16_sm90", "--device", "gpu"], "unknown device"),
    ],
)
def test_a_bad_budget_request(words: list[str], says: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["budget", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and "fix:" in said and "Traceback" not in said
