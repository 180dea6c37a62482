"""What bad input gets, through the real command line: one sentence, an exit code, and no half-written file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import pytest
import yaml

from longtake import files
from longtake.commands.main import main
from longtake.formats.exported import KIND
from longtake.formats.plan import PlanManifest
from longtake.formats.recipe import recipe_named
from longtake.training.models.network_spec import NETWORKS

RECIPE = recipe_named("tiny_bf16_sm90")
CHECKPOINTS = Path(__file__).parents[2] / RECIPE.model.checkpoints
PARTS = ("got:", "expected:", "fix:")


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": flip,
    "pickle": lambda content: pickle.dumps({"weights": 1}),
}


def names(folder: Path) -> set[str]:
    """Everything below `folder`, hidden files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """refused(code, words): runs the command, which must exit with `code`, say it in full, and leave no new file."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *words: object, parts: tuple[str, ...] = PARTS) -> str:
        before = names(tmp_path)
        assert main([str(word) for word in words]) == code, capsys.readouterr().err
        said = capsys.readouterr().err
        assert said.count("longtake: error: ") == 1 and "Traceback" not in said, said
        for part in parts:
            assert part in said, said
        assert {name for name in names(tmp_path) - before if Path(name).suffix} == set()
        return said

    return run


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder like one of `longtake export`; its files are stand-ins, which nothing opens before their digest fits."""
    return hand_made_export(tmp_path / RECIPE.onnx_name)


def hand_made_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    networks = {}
    for name in NETWORKS:
        contents = {f"{name}{end}": f"{name}{end}".encode() * 9 for end in (".onnx", ".onnx.data", ".ort.onnx")}
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        networks[name] = {"files": {file: {"sha256": digest(content)} for file, content in contents.items()}}
    index = {"onnx_name": RECIPE.onnx_name, "preset": RECIPE.preset, "precision": RECIPE.precision,
             "cache": RECIPE.cache, "networks": networks, "vocabulary": ["a"], "amax": {}, "inputs": "",
             "checked": {"state": "passed", "why": ""}}  # fmt: skip
    KIND.write(index, folder / "export.json")
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def readers(exported: Path) -> list[list[object]]:
    """Every command that reads exported networks."""
    return [
        ["generate", "--prompt", "a seven", "--engines", exported, "--backend", "reference", "--out", "v.mp4"],
        ["check", "--recipe", RECIPE.name, "--engines", exported, "--report", "r.json"],
        ["profile", "--engines", exported, "--backend", "reference", "--out", "p"],
    ]


# ---- exported networks, engines, checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGE, "swapped", "missing"])
def test_a_damaged_network(exported: Path, refused: Callable[..., str], damage: str) -> None:
    file = exported / "dit.ort.onnx"
    if damage == "missing":
        file.unlink()
    elif damage == "swapped":
        shutil.copy(exported / "vae_first.ort.onnx", file)
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for words in readers(exported):
        assert "dit.ort.onnx is not what was exported" in refused(4, *words)


@pytest.mark.parametrize("file", ["dit.onnx", "dit.onnx.data"])
def test_no_engine_is_built_from_a_damaged_network(exported: Path, refused: Callable[..., str], file: str) -> None:
    (exported / file).write_bytes(flip((exported / file).read_bytes()))
    recipe = exported.parent / "mine.yaml"  # one that is built without a GPU
    values = {**asdict(RECIPE), "compute_capability": "8.9"}
    recipe.write_text(
        yaml.safe_dump({key: value for key, value in values.items() if key not in ("name", "own_preset")})
    )
    words = ["engines", "--recipe", recipe, "--onnx", exported.parent, "--out", "built"]
    assert f"{file} is not what was exported" in refused(4, *words)
    assert f"{file} is not the file that was exported" in refused(4, "inspect", exported / "dit.onnx")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"onnx_name": "tiny_bf16"}', pickle.dumps({})],
    ids=["empty", "cut", "list", "null", "not UTF-8", "deep", "no networks", "pickle"],
)
def test_a_damaged_export_description(exported: Path, refused: Callable[..., str], content: bytes) -> None:
    (exported / "export.json").write_bytes(content)
    for words in readers(exported):
        assert "export.json" in refused(4, *words)


@pytest.mark.parametrize("key", ["networks", "vocabulary", "format"])
def test_an_export_description_of_another_shape(exported: Path, refused: Callable[..., str], key: str) -> None:
    index = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps({**index, key: 5}))
    for words in readers(exported):
        assert "export.json" in refused(4, *words)
    if key != "format":
        KIND.write({**index, key: 5}, exported / "export.json")
        for words in readers(exported):
            assert f"is not an export description\n  got: {key}: 5" in refused(4, *words)


def test_a_word_of_the_vocabulary_is_not_altered_unseen(exported: Path, refused: Callable[..., str]) -> None:
    path = exported / "export.json"
    path.write_text(path.read_text().replace('"a"', '"c"'))
    for words in readers(exported):
        said = refused(4, *words)
        assert "was altered after it was written" in said and "fix: run `longtake export --force`" in said


def test_an_export_of_another_recipe(exported: Path, refused: Callable[..., str]) -> None:
    index = json.loads((exported / "export.json").read_text())
    KIND.write({**index, "cache": "nvfp4", "precision": "nvfp4"}, exported / "export.json")
    assert "of another recipe" in refused(2, *readers(exported)[0])


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 9}', b'{"format": 1, "recipe_fields": {}}'])
def test_a_damaged_bundle(tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    (tmp_path / "bundle.json").write_bytes(content)
    for words in readers(tmp_path):
        assert "bundle.json" in refused(4, *words)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped"])
def test_a_damaged_plan(tmp_path: Path, refused: Callable[..., str], damage: str) -> None:
    plan, content = tmp_path / "dit.plan", os.urandom(999)
    plan.write_bytes(content)
    manifest = PlanManifest(
        "dit.plan", "dit", digest(content), 999, "", "tensorrt_rtx", "1.7", "12.0", {}, {}, RECIPE.name, "tiny"
    )
    manifest.write(plan)
    plan.write_bytes(os.urandom(999) if damage == "swapped" else DAMAGE[damage](content))
    assert "is not the plan that dit.plan.json describes" in refused(4, "inspect", plan)


@pytest.mark.parametrize("name", ["dit", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", [*DAMAGE, "swapped"])
def test_a_damaged_checkpoint(
    tmp_path: Path, exported: Path, refused: Callable[..., str], name: str, damage: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(CHECKPOINTS, folder)
    file = folder / f"{name}.safetensors"
    if damage == "swapped":
        shutil.copy(folder / ("vae.safetensors" if name != "vae" else "dit.safetensors"), file)
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    says = "is a pickle" if damage == "pickle" else "is not the file its side file describes"
    given = ["--checkpoints", folder]
    assert says in refused(4, "export", "--recipe", RECIPE.name, "--out", "e", *given)
    assert says in refused(4, "check", "--recipe", RECIPE.name, "--engines", exported, "--report", "r.json", *given)
    stage = "vae" if name == "vae" else "dit"
    assert says in refused(4, "train", "--stage", stage, "--init", folder, "--device", "cpu", "--out", "t")
    refused(4, "inspect", file)


def test_a_text_encoder_without_words(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(CHECKPOINTS, folder)
    about = json.loads((folder / "text_encoder.json").read_text())
    for words, says in (
        (5, "text_encoder.json is not a checkpoint's side file\n  got: vocabulary: 5"),
        (None, "has no vocabulary"),
    ):
        (folder / "text_encoder.json").write_text(json.dumps({**about, "vocabulary": words}))
        assert says in refused(4, "train", "--stage", "dit", "--init", folder, "--out", "t")


# ---- recipes, stories, prompts, options ----------------------------------------------------------------------------

BAD_RECIPES: dict[str, tuple[object, str]] = {
    "unknown key": ({"precison": "bf16"}, "did you mean 'precision'?"),
    "unknown gate": ({"gate": {"sim": 1}}, "did you mean 'ssim'?"),
    "gate is a list": ({"gate": [1]}, "is not a mapping"),
    "gate is text": ({"gate": {**asdict(RECIPE.gate), "dit": "small"}}, "bad gate dit"),
    "preset": ({"preset": ["tiny"]}, "bad preset"),
    "capability": ({"compute_capability": "sm"}, "bad compute_capability"),
    "mode": ({"mode": None}, "bad mode"),
    "not UTF-8": (b"\xff\xfe", "is not valid YAML"),
    "empty": (b"", "is not a mapping"),
    "deep": (b"[" * 1000, "is not valid YAML"),
    "date": (b"mode: 2020-99-99", "is not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    given, says = BAD_RECIPES[case]
    if isinstance(given, dict):
        values = {**{k: v for k, v in asdict(RECIPE).items() if k not in ("name", "own_preset")}, **given}
        given = yaml.safe_dump(values).encode()
    assert isinstance(given, bytes)
    (tmp_path / "mine.yaml").write_bytes(given)
    for words in (["export", "--out", "e"], ["engines", "--out", "e"], ["check", "--report", "r.json"]):
        assert says in refused(2, *words, "--recipe", "mine.yaml")
    assert says in refused(2, "generate", "--prompt", "a seven", "--engines", "mine.yaml")


BAD_STORIES: dict[str, tuple[bytes, str]] = {
    "unknown key": (b"shots: [{promt: x}]", "did you mean 'prompt'?"),
    "empty prompt": (b"shots: [{prompt: '  '}]", "is empty"),
    "huge prompt": (b"shots: [{prompt: " + b"x" * 5000 + b"}]", "is too long"),
    "not UTF-8": (b"shots: [{prompt: \xff}]", "is not UTF-8 text"),
    "deep": (b"[" * 1000, "is not valid YAML"),
    "date": (b"name: 2020-99-99\nshots: [{prompt: x}]", "is not valid YAML"),
    "number": (b"seed: " + b"9" * 5000 + b"\nshots: [{prompt: x}]", "is not valid YAML"),
    "resolution": (b"height: 700\nshots: [{prompt: x}]", "height does not fit preset tiny"),
    "length": (b"seconds: 99\nshots: [{prompt: x}]", "the length does not fit preset tiny"),
    "guidance": (b"guidance: 1000\nshots: [{prompt: x}]", "does not fit the schema at guidance"),
    "no number": (b"guidance: .nan\nshots: [{prompt: x}]", "'.nan' is no finite number"),
}


@pytest.mark.parametrize("case", BAD_STORIES)
def test_a_bad_story(tmp_path: Path, exported: Path, refused: Callable[..., str], case: str) -> None:
    content, says = BAD_STORIES[case]
    (tmp_path / "story.yaml").write_bytes(content)
    words = ["--engines", exported, "--backend", "torch", "--out", "v.mp4"]  # PyTorch needs no exported file
    assert says in refused(2, "generate", "story.yaml", *words)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "\udcff"], 2, "the prompt is not UTF-8 text"),
        (["--prompt", "x" * 5000], 2, "the prompt is too long"),
        (["--prompt", "a seven", "--negative-prompt", "\udcff"], 2, "the negative prompt is not UTF-8 text"),
        (["--prompt", "a seven", "--guidance", "nan"], 2, "bad guidance scale"),
        (["--prompt", "a seven", "--seed", "-1"], 2, "bad seed"),
        (["--prompt", "a seven", "--seed", str(2**70)], 2, "bad seed"),
        (["--prompt", "a seven", "--chunks", str(10**12)], 2, "not enough disk space"),
        (["--prompt", "a seven", "--out", "file/v.mp4"], 2, "file"),
        (["x" * 5000], 2, "cannot be used as a path"),
        (["--prompt", "a seven", "--out", "x" * 300 + ".mp4"], 2, "cannot be used as a path"),
    ],
)
def test_a_bad_wish(
    tmp_path: Path, exported: Path, refused: Callable[..., str], words: list[str], code: int, says: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    how = ["--engines", exported, "--backend", "torch", "--steps", "1"]
    assert says in refused(code, "generate", *words, *how, parts=("got:", "fix:"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stories", "0"], "bad --stories"),
        (["--recalibrate", "0"], "bad --recalibrate"),
        (["--text-dropout", "5"], "bad --text-dropout"),
        (["--batch", str(10**9)], "bad --batch"),
        (["--chunks", str(10**8)], "bad --chunks"),
        (["--seed", str(2**70)], "bad seed"),
        (["--out", "file/run"], "cannot be a folder"),
    ],
)
def test_bad_training_options(tmp_path: Path, refused: Callable[..., str], words: list[str], says: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert says in refused(2, "train", "--stage", "dit", "--device", "cpu", "--out", "t", *words)


# ---- a machine that lacks something --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["LONGTAKE_LOG", "LONGTAKE_THREADS", "LONGTAKE_FLAVOUR"])
def test_a_bad_setting(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(setting, "many")
    assert f"bad environment variable {setting}" in refused(2, "doctor")


@pytest.mark.parametrize("backend", ["fused", "segmented"])
def test_without_a_gpu(exported: Path, refused: Callable[..., str], backend: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    generate, _, profile = readers(exported)
    for words in (generate, profile):
        words[words.index("--backend") + 1] = backend
        assert f"backend {backend} cannot run recipe" in refused(3, *words)
    refused(3, "generate", "--prompt", "a seven", "--engines", exported, "--device", "cuda:0")
    refused(3, "train", "--stage", "vae", "--device", "cuda:0", "--out", "t", parts=("got:", "fix:"))


@pytest.mark.slow
def test_a_full_disk_is_noticed_before_the_work(
    exported: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    words = ["--engines", exported, "--backend", "torch", "--steps", "1", "--out", "v.mp4"]
    assert "not enough disk space" in refused(2, "generate", "--prompt", "a seven", *words)
    assert "not enough disk space" in refused(2, "export", "--recipe", RECIPE.name, "--out", "e")


@pytest.mark.slow
def test_a_disk_that_fills_up_later(refused: Callable[..., str]) -> None:
    """The kernel refuses to write on: the copy under the final name is not there, and neither is a partial one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        said = refused(2, "export", "--recipe", RECIPE.name, "--out", "e", "--no-parity")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no space left to write" in said


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "v.mp4"), "no space left to write v.mp4"),
        (PermissionError(errno.EACCES, "Permission denied", "v.mp4"), "no permission for v.mp4"),
        (OSError(errno.EIO, "Input/output error", "v.mp4"), "refused to read or write v.mp4"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError("I/O error: No space left on device (os error 28)"), "no space left to write a file"),
    ],
)
def test_what_the_system_refuses(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("longtake.commands.inspect.describe", fail)
    assert says in refused(2, "inspect", "v.mp4", parts=("got:", "fix:"))


@pytest.mark.parametrize(("place", "named"), [("home/models/x", True), ("elsewhere/x", False)])
def test_what_is_refused_within_longtake_home_names_it(
    place: str, named: bool, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    test_what_the_system_refuses(
        refused, monkeypatch, NotADirectoryError(errno.ENOTDIR, "x", str(tmp_path / place)), "be used"
    )
    said = refused(2, "inspect", "v.mp4", parts=("a folder must be a folder",))
    assert (f"or set LONGTAKE_HOME, which is {tmp_path / 'home'}, to another folder" in said) is named


def test_of_two_names_that_which_was_to_be_made_is_told(
    refused: Callable[..., str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    made = str(tmp_path / "home" / "made")
    error = PermissionError(errno.EACCES, "x", str(tmp_path / "temporary"), None, made)
    test_what_the_system_refuses(refused, monkeypatch, error, f"no permission for {made}\n")
    assert "or set LONGTAKE_HOME" in refused(2, "inspect", "v.mp4", parts=("no permission",))


def test_what_is_refused_without_a_name_is_explained_where_the_working_folder_is_gone(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    test_what_the_system_refuses(refused, monkeypatch, FileNotFoundError(errno.ENOENT, "x"), "be used")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.commands.inspect.describe", lambda path: [][0])
    with pytest.raises(IndexError):
        main(["inspect", "v.mp4"])


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------

START = [sys.executable, "-m", "longtake"]
TRAIN = ["--stage", "dit", "--stories", "2", "--batch", "1", "--chunks", "1", "--device", "cpu", "--out", "train/run"]
COMMANDS: dict[str, tuple[list[str], bytes]] = {  # words, and the output at which Ctrl-C comes
    "generate": (["generate", "--prompt", "a", "--chunks", "99", "--steps", "1", "--guidance", "1", "--out",
                  "generate/v.mp4", "--backend", "torch", "--engines", RECIPE.onnx_name], b"| 1/99"),
    "train": (["train", *TRAIN], b"loss="),
    "export": (["export", "--recipe", RECIPE.name, "--out", "export"], b"PyTorch to ONNX"),
    "engines": (["engines", "--recipe", "tiny_bf16_sm89", "--onnx", "engines/x", "--out", "engines/e"], b"PyTorch to ONNX"),
}  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, Path]]]:
    """{command: (exit code, what it said, its folder)} of all four, run side by side, each with a real SIGINT."""
    folder = tmp_path_factory.mktemp("interrupted")
    hand_made_export(folder / RECIPE.onnx_name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = {}
    for name, (words, _) in COMMANDS.items():
        with open(folder / f"{name}.txt", "wb") as said:
            running[name] = subprocess.Popen([*START, *words], cwd=folder, env=environment, stdout=said, stderr=said)
    try:
        with ThreadPoolExecutor(len(running)) as pool:  # none may end while another is waited for
            ends = pool.map(lambda name: _interrupt(running[name], folder, name), running)
            yield dict(zip(running, ends, strict=True))
    finally:
        for process in running.values():
            process.kill()


def _interrupt(process: subprocess.Popen[bytes], folder: Path, name: str) -> tuple[int, str, Path]:
    said, end = folder / f"{name}.txt", time.monotonic() + 400  # a busy machine
    while COMMANDS[name][1] not in said.read_bytes() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code = process.wait(120)
    return code, said.read_text(errors="replace"), folder / name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c(interrupted: dict[str, tuple[int, str, Path]], command: str) -> None:
    code, said, folder = interrupted[command]
    assert COMMANDS[command][1].decode() in said, f"it was not interrupted while it worked: {said}"
    assert code in (130, -signal.SIGINT), said  # a shell shows 130 for both
    assert "Traceback" not in said and "interrupted" in said, said
    left = names(folder) if folder.exists() else set()
    assert not [name for name in left if ".tmp" in name]
    if command == "generate":
        assert left == {"v.mp4", "v.png", "v.json"}
        assert json.loads((folder / "v.json").read_text())["complete"] is False
        with av.open(str(folder / "v.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) in range(29, 29 + 98 * 32, 32)  # whole chunks
    elif command == "train":
        assert any("resume-" in name and name.endswith(".safetensors") for name in left)
        assert "run/dit.safetensors" not in left
    else:
        assert not [name for name in left if name.endswith((".plan", "export.json", "bundle.json"))]
