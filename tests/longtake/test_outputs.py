"""What a command may write to, and how: nothing that is read, nothing that is not ours, modes, links and pipes as they are."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from films import frames_from_video

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.files import atomic_path, write_json
from longtake.outputs import claim_checkpoints, claim_outputs, written_by_us
from longtake.video import VideoWriter

PROMPT = "a green seven drifts left over a sea background, soft light"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_new_files_obey_the_umask(tmp_path: Path, umask: None, mask: int) -> None:
    os.umask(mask)
    write_json(tmp_path / "a.json", {})
    with VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(np.zeros((2, 32, 32, 3), np.uint8))
    assert mode(tmp_path / "a.json") == mode(tmp_path / "a.mp4") == 0o666 & ~mask


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_gives_its_mode(tmp_path: Path, umask: None, kept: int) -> None:
    (tmp_path / "a.json").touch()
    (tmp_path / "a.json").chmod(kept)
    write_json(tmp_path / "a.json", {"a": 1})
    assert mode(tmp_path / "a.json") == kept


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for target in ("there.json", "new.json"):
        (tmp_path / target).symlink_to(tmp_path / "disk" / target)
    (tmp_path / "disk" / "there.json").write_text("old")
    for target in ("there.json", "new.json"):
        write_json(tmp_path / target, 5)
        assert (tmp_path / target).is_symlink() and (tmp_path / "disk" / target).read_text() == "5\n"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new.json", "there.json"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 250 + ".json", "ä" * 120 + ".json", "a." + "j" * 250):
        write_json(tmp_path / name, 5)
        assert (tmp_path / name).read_text() == "5\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_pipe_stays_one_and_gets_what_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join(10)
    assert got == ['{\n  "a": 1\n}\n'] and (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_devices_and_open_files_stay_what_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = os.stat("/dev/null")
    write_json("/dev/null", 1)
    assert os.stat("/dev/null").st_rdev == before.st_rdev and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    print("before")
    write_json("/dev/stdout", 2)
    assert capfd.readouterr().out.endswith("2\n")  # behind what a file already holds, not over it
    with pytest.raises(OSError), atomic_path("/dev/full") as partial:
        partial.write_text("x")


def test_outputs_are_neither_inputs_nor_each_other(tmp_path: Path) -> None:
    picture, video = tmp_path / "a.png", tmp_path / "a.mp4"
    picture.write_bytes(b"longtake")  # even if it is ours
    (tmp_path / "link.png").symlink_to(picture)
    os.link(picture, tmp_path / "hard.png")
    for other in ("a.png", "link.png", "hard.png", "../" + tmp_path.name + "/a.png"):
        with pytest.raises(
            LongtakeError, match="the sheet would replace --image: they are the same file\n  got: .*png"
        ):
            claim_outputs({"--out": video, "the sheet": tmp_path / other}, {"--image": picture})
    with pytest.raises(
        LongtakeError, match=r"--out and --report are the same file[\s\S]*fix: choose another name for --rep"
    ):
        claim_outputs({"--out": video, "--report": tmp_path / "." / "a.mp4"})
    claim_outputs({"--out": Path("/dev/null"), "--report": Path("/dev/null")})
    claim_outputs({"--out": video, "--report": None}, {"--image": picture, "--story": None})


def test_a_file_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "ours.mp4", 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (48, 64, 64, 3), np.uint8))
    (tmp_path / "theirs.mp4").write_bytes(b"film" * 1000)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "dit.safetensors").write_bytes(b"weights")
    for name in ("ours.mp4", "empty.mp4", "new.mp4"):
        claim_outputs({"--out": tmp_path / name})
    for name in ("theirs.mp4", "dit.safetensors"):
        with pytest.raises(
            LongtakeError, match="--out would replace a file that longtake did not write\n  got: .*\n.*\n  fix: "
        ):
            claim_outputs({"--out": tmp_path / name})
    write_json(tmp_path / "dit.json", {"command": "longtake train"})
    assert written_by_us(tmp_path / "dit.safetensors")


def test_folders_disks_and_sockets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LongtakeError, match="is a folder"):
        claim_outputs({"--out": tmp_path})
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        with pytest.raises(
            LongtakeError, match="--out cannot be written\n  got: socket, a socket\n  expected: a file or a pipe"
        ):
            claim_outputs({"--out": Path("socket")})


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, how: Path(place) != tmp_path)  # root may write everywhere
    with pytest.raises(LongtakeError, match="--out cannot be written(.|\n)*is not writable"):
        claim_outputs({"--out": tmp_path / "new" / "a.mp4"})
    (tmp_path / "old").mkdir()
    claim_outputs({"--out": tmp_path / "old" / "a.mp4"})


def test_a_checkpoint_is_not_trained_onto_itself(tmp_path: Path) -> None:
    (tmp_path / "dit.safetensors").write_bytes(b"longtake")
    with pytest.raises(LongtakeError, match="dit.safetensors in --out would replace --init"):
        claim_checkpoints(tmp_path, {"--init": tmp_path}, ("dit",))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--image", "first.png", "--out", "first.mp4"], "the contact sheet beside --out would replace --image"),
        (["--out", "b.mp4", "--report", "b.mp4"], "the video (--out) and the report (--report) are the same file"),
        (["--out", "c.mp4", "--save-session", "c.mp4"], "the video (--out) and --save-session are the same file"),
        (["--continue-from", "clip.mp4", "--out", "clip.mp4"], "the video (--out) would replace --continue-from"),
        (["--out", "clip.mp4"], "the video (--out) would replace a file that longtake did not write"),
        (["--out", "first.mp4"], "the contact sheet beside --out would replace a file that longtake did not write"),
    ],
)
def test_generate_refuses_before_it_opens_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first.png", "clip.mp4"):
        Path(name).write_bytes(b"mine")
    assert main(["generate", "--prompt", PROMPT, "--engines", "nowhere", *words]) == 2
    assert says in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"first.png": b"mine", "clip.mp4": b"mine"}


def test_convert_does_not_write_over_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dit.safetensors").write_bytes(b"32 bits")
    Path("vae.safetensors").write_bytes(b"another model")
    for given, says in ((["--dit", "dit.safetensors"], "dit.safetensors in --out would replace --dit"),
                        (["--dit", "."], "dit.safetensors in --out would replace --dit"),
                        (["--vae", "other.pth"], "vae.safetensors in --out would replace a file that longtake did not")):  # fmt: skip
        assert main(["convert", "--preset", "tiny", *given, "--out", "."]) == 2
        assert says in capsys.readouterr().err
    assert Path("dit.safetensors").read_bytes() == b"32 bits"


def test_videos_say_whose_they_are(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(np.zeros((5, 32, 32, 3), np.uint8))
    assert written_by_us(tmp_path / "a.mp4") and len(frames_from_video(tmp_path / "a.mp4")[0]) == 5
