"""How many layers keep their attention's window: what the memory that is free allows, or what is asked for; told, and budgeted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.commands.main import main
from longtake.errors import LongtakeError
from longtake.formats.memory import KEPT_WINDOWS, Budget, Use
from longtake.formats.recipe import recipe_named
from longtake.runtime import sources
from longtake.runtime.backends.trt import open as trt_open
from longtake.runtime.bench import engine_side
from longtake.runtime.bench.options import BenchOptions
from longtake.runtime.bench.result import report_of, table
from longtake.runtime.budget import check
from longtake.runtime.budget.check import SPARE_BYTES, windows_that_fit
from longtake.runtime.budget.use import budget_of
from longtake.runtime.budget.windows import window_bytes
from longtake.runtime.sources import OpenOptions, Source, backend_from_source

LARGE = recipe_named("wan2.2-ti2v-5b_fp8_sm90")
GPU = torch.device("cuda:0")
LAYERS = 30


@pytest.fixture(scope="module")
def peak() -> int:
    """What the recipe takes without any."""
    return budget_of(LARGE).peak["generate"]


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(check, "free_memory", lambda device: ("cuda:0 (one of a test)", size))


def test_a_window_is_the_tiles_of_all_keys_and_values() -> None:
    keys, dim = 4 * 7040, 3072
    assert window_bytes(LARGE) == pytest.approx(
        2 * keys * dim + 7040 * dim, rel=0.06
    )  # and rows of ones among the values
    others = ("wan2.2-ti2v-5b_bf16_sm90", "wan2.2-ti2v-5b_fp8_sm89", "sana-wm_bf16_sm90", "tiny_nvfp4_sm120")
    assert [window_bytes(recipe_named(name)) for name in others] == [0] * 4
    assert window_bytes(replace(LARGE, attention="bf16")) == 0


@pytest.mark.parametrize("left, expected", [(-1, 0), (0, 0), (0.99, 0), (1, 1), (7.5, 7), (29.99, 29), (400, LAYERS)])
def test_as_many_are_kept_as_fit(peak: int, left: float, expected: int) -> None:
    """Never so many that the budget with them is more than what is free."""
    available = peak + SPARE_BYTES + int(left * window_bytes(LARGE))
    kept = windows_that_fit(LARGE, Use(), available)
    assert kept == expected
    with_them = budget_of(LARGE, Use(kept_windows=kept)).peak["generate"]
    assert with_them == peak + kept * window_bytes(LARGE) and (not kept or with_them + SPARE_BYTES <= available)


def test_other_sessions_and_guidance_come_first(peak: int) -> None:
    available = peak + SPARE_BYTES + 20 * window_bytes(LARGE)
    cache = next(term.bytes for term in budget_of(LARGE).terms if term.name == "K/V cache")
    assert windows_that_fit(LARGE, Use(), available) == 20
    assert windows_that_fit(LARGE, Use(), available, sessions=2) <= 20 - cache // window_bytes(LARGE)
    assert windows_that_fit(LARGE, Use(guided=True), 10 * available) == 0  # each pass finds the other cache's window
    assert windows_that_fit(LARGE, Use(decode_apart=True), available) > 20  # the VAE is elsewhere


class Opened:
    """A backend that keeps what it is told to."""

    networks: dict[str, Any] = {}

    def __init__(self, kept: int) -> None:
        self.windows = {"layers": kept, "of": LAYERS} if kept else {}


@pytest.mark.parametrize(
    "asked, room, kept, why",
    [
        (None, 3, 3, "as the memory that is free allows"),
        (5, 8, 5, "as asked"),
        (0, 8, 0, "as asked"),
        (None, 0, 0, "as the memory that is free allows"),
        (99, 99, LAYERS, "as asked"),
    ],
)
def test_opening_chooses_and_announces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: int | None, room: int, kept: int, why: str
) -> None:
    given: dict[str, Any] = {}
    said: list[Budget] = []
    peak = budget_of(LARGE, Use(engines=tmp_path)).peak["generate"]
    free(monkeypatch, peak + SPARE_BYTES + room * window_bytes(LARGE))
    monkeypatch.setattr(sources, "choose_backend", lambda source, asked: sources.Choice("segmented", "a test"))
    monkeypatch.setattr(sources, "_require_device", lambda *words: None)

    def opened(name: str, folder: Path, **options: Any) -> Opened:
        given.update(options)
        return Opened(options.get("kept_windows", 0))

    monkeypatch.setattr(trt_open, "backend_from_engines", opened)
    opening = OpenOptions(announce=said.append, guided=False, kept_windows=asked)
    backend = backend_from_source(Source(LARGE, tmp_path, tmp_path, None), "auto", None, opening=opening)
    assert given.get("kept_windows", 0) == kept
    assert backend.windows.get("chosen", "") == why and backend.windows["layers"] == kept
    terms = {term.name: term.bytes for term in said[0].terms}
    assert terms.get(KEPT_WINDOWS, 0) == kept * window_bytes(LARGE)


def test_more_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peak: int) -> None:
    """An explicit number is taken or refused, never replaced."""
    free(monkeypatch, peak + 2 * window_bytes(LARGE))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LongtakeError, match="does not fit the memory of cuda:0"):
        check.check_memory(LARGE, Use(kept_windows=3), GPU)
    check.check_memory(LARGE, Use(kept_windows=2), GPU)


def test_the_benchmark_chooses_likewise_and_its_report_says_so(monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
    free(monkeypatch, peak + SPARE_BYTES + 4 * window_bytes(LARGE))
    options = BenchOptions(recipe=LARGE.name, device="cuda:0")
    assert engine_side.windows(options) == (4, "as the memory that is free allows")
    assert engine_side.windows(replace(options, kept_windows=9)) == (9, "as asked")
    assert engine_side.windows(replace(options, networks=("vae",))) == (0, "")
    assert engine_side.windows(replace(options, device="cpu")) == (0, "")
    assert KEPT_WINDOWS in {term["name"] for term in engine_side.budget(options, 4)["terms"]}
    kept = {"layers": 4, "of": LAYERS, "chosen": "as the memory that is free allows"}
    report = report_of(options, {"engine": {"fps": {}, "backend": "segmented", "kept_windows": kept}})
    assert report["kept_windows"] == kept
    assert "windows kept between passes: 4 of 30 layers, as the memory that is free allows" in table(report)


def test_a_number_below_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--kept-windows", "-1"]) == 2
    assert "bad --kept-windows" in capsys.readouterr().err


def test_windows_are_refused_where_none_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)
    for opening, why in (
        (OpenOptions(kept_windows=3, gpus=2), "2 GPUs share the video"),
        (OpenOptions(kept_windows=3), "backend reference"),
    ):
        with pytest.raises(LongtakeError, match=f"no window can be kept\n.*{why}"):
            backend_from_source(Source(LARGE, Path("nowhere"), None, None), "reference", None, opening=opening)
    with pytest.raises(LongtakeError, match="tiny_nvfp4_sm120 lays none out"):
        check.kept_windows(recipe_named("tiny_nvfp4_sm120"), Use(), GPU, 3)
    assert check.fixes_for(LARGE, Use(kept_windows=3), 10**9, 1)[0].startswith("keep fewer windows")
