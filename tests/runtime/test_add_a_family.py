"""docs/add-a-family.md, executed: a recurrent family through registry, backend and session."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.errors import LongtakeError
from longtake.formats.recipe import Gate, Recipe
from longtake.paths import REPOSITORY
from longtake.runtime.backends.base import State
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session
from longtake.runtime.video_model import Tensors
from longtake.training.models.families import FAMILIES, family_named, preset_named
from longtake.training.models.load import Models
from longtake.training.models.text.words import text_encoder_for, tokenize

PAGE = REPOSITORY / "docs" / "add-a-family.md"
SCRIPT = ["a green seven", "a red two"]


class Watched(TorchBackend):
    """Calls `before` in front of every pass of the transformer."""

    passes = 0

    def before(self) -> None: ...

    def run(self, network: str, inputs: Tensors, state: State | None = None, commit: bool = True) -> Tensors:
        if network == "dit":
            self.passes += 1
            self.before()
        return super().run(network, inputs, state, commit)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Watched]:
    """The page's family with random weights."""
    code: dict[str, Any] = {"__name__": "toy"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), code)  # noqa: S102
    monkeypatch.setitem(FAMILIES, "toy", code["Toy"]())
    file = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert file
    (tmp_path / "toy.yaml").write_text(file.group(1))
    preset = preset_named("toy.yaml", tmp_path)
    torch.manual_seed(1)
    family = family_named("toy")
    models = Models(preset, family.dit(preset).eval(), family.vae(preset).eval(), text_encoder_for(preset).eval())
    recipe = Recipe(
        "toy_bf16", "toy", "bf16", "bf16", "9.0", "segmented", Gate(0.03, 0.03, 0.03, 0.03, 0.98), own_preset=preset
    )
    backend = Watched(recipe, models)
    yield backend
    backend.close()


def start(backend: Watched) -> Session:
    return Generator(backend, tokenize).session(SCRIPT, seed=3, steps=3, guidance=2.0)


def same(one: list[Chunk], other: list[Chunk]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames) for a, b in zip(one, other)
    )


def test_it_generates(backend: Watched) -> None:
    with start(backend) as session:
        first, second = list(session)
        memory = session._state.positive.tensors["memory"]
    assert first.latents.shape == (1, 2, 4, 2, 2) and second.latents.shape == (1, 1, 4, 2, 2)
    assert len(first.frames) == 1 + 4 and len(second.frames) == 4  # the video's first latent is one frame
    assert (first.visible, second.visible) == ((0,), (0, 1))
    assert memory[0].any() and memory[1].any() and not torch.equal(memory[0], memory[1])
    assert backend.passes == 2 * 2 * (3 + 1)  # chunks, guidance, steps and the clean pass


def test_what_a_chunk_remembers_shows_in_the_next(backend: Watched) -> None:
    with start(backend) as session:
        expected = list(session)
    with start(backend) as session:
        next(session)
        session._state.positive.tensors["memory"].zero_()
        assert not torch.equal(next(session).latents, expected[1].latents)


@pytest.mark.parametrize("number", [1, 4, 7, 8])
def test_a_cancelled_chunk_leaves_everything_as_it_was(backend: Watched, number: int) -> None:
    """Before any of its passes: the first, a denoise pass, the clean one, and its guided half, after a slot was written."""
    with start(backend) as session:
        expected = list(session)
    with start(backend) as session:
        chunks, stop = [next(session)], backend.passes + number - 1

        def before() -> None:
            if backend.passes == stop:
                session.cancel()

        backend.before = before  # type: ignore[method-assign]
        if number == 1:
            session.cancel()
        with pytest.raises(CancelledError, match="cancelled before chunk 1 was whole"):
            next(session)
        assert session.next_index == 1
        backend.before = lambda: None  # type: ignore[method-assign]
        assert same([*chunks, next(session)], expected)


def test_a_saved_session_goes_on(backend: Watched, tmp_path: Path) -> None:
    with start(backend) as session:
        next(session)
        session.save(tmp_path / "s.safetensors")
        snapshot, expected = session.snapshot(), [next(session)]
        session.restore(snapshot)
        assert same([next(session)], expected)
    assert {"positive.memory", "negative.memory"} < set(snapshot.tensors) and snapshot.identity.family == "toy"
    with Generator(backend, tokenize).load_session(tmp_path / "s.safetensors") as loaded:
        assert same(list(loaded), expected)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"sinusoids": torch.zeros(1, 256)}, "(?s)network dit has no input sinusoids.*expected: latents, sinusoid, "),
        (
            {"sinusoid": torch.zeros(2, 255)},
            r"(?s)condition sinusoid does not fit network dit.*got: torch.float32 \(2, 255\)",
        ),
        ({"sinusoid": torch.zeros(2, 256, 1)}, r"(?s)does not fit network dit.*expected: fp32 \('F', 256\)"),
        ({"sinusoid": torch.zeros(2, 256).double()}, "(?s)does not fit network dit.*got: torch.float64"),
    ],
)
def test_conditions_that_are_not_the_spec_s(
    backend: Watched, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, torch.Tensor], says: str
) -> None:
    monkeypatch.setattr(FAMILIES["toy"], "pass_inputs", lambda *words: inputs)
    with pytest.raises(LongtakeError, match=says):
        start(backend)


def test_an_unknown_family() -> None:
    with pytest.raises(LongtakeError, match=r"(?s)unknown family.*got: gan.*expected: sana_wm, wan"):
        family_named("gan")
