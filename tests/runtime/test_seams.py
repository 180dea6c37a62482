"""What a caller may bring: noise, embeddings, timesteps and solver, weights; and that fp32 means fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longtake import Generator, Sampling
from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.formats.exported import Checked, Export, ExportedFile, ExportedNetwork
from longtake.paths import REPOSITORY
from longtake.plugins.cross_attention.reference import dense_cross_attention
from longtake.runtime import checkpoints
from longtake.runtime.story import Segment
from longtake.training.models.checkpoint import save_checkpoint, weights_digests
from longtake.training.models.load import load_models
from longtake.training.models.presets import TINY
from longtake.training.models.sampler import UniPC, noise_for_chunk, schedule_of
from longtake.training.models.side_file import SideFile
from longtake.training.models.wan.rope import rope_angles

Make = Callable[[Any], Any]
STUDENT = REPOSITORY / "training/checkpoints/tiny-4step"
PLAIN = {"steps": 2, "guidance": 1.0}


def latents(session: Any) -> Tensor:
    with session:
        return torch.cat([chunk.latents for chunk in session], 1)


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_chunk_or_the_whole_video_s(make_toy: Any, make_generator: Make) -> None:
    drawn = [noise_for_chunk(TINY, 3, chunk) for chunk in range(3)]
    wanted = latents(make_generator(make_toy()).session(["x"] * 3, seed=3, **PLAIN))
    for noise in (drawn.__getitem__, torch.cat(drawn, 1)):
        given = make_generator(make_toy()).session(["x"] * 3, seed=4, noise=noise, decode=False, **PLAIN)
        assert torch.equal(latents(given), wanted)
    assert all(torch.equal(noise_for_chunk(TINY, 3, chunk), noise) for chunk, noise in enumerate(drawn))


@pytest.mark.parametrize(
    ("noise", "got"),
    [
        (torch.zeros(1, 23, 16, 8, 8), r"\(1, 7, 16, 8, 8\); of the video \(1, 23, 16, 8, 8\)"),
        (torch.zeros(1, 24, 16, 4, 8), r"\(1, 8, 16, 4, 8\); of the video"),
        (torch.zeros(3, 2), r"\(3, 0\)"),
    ],
)
def test_noise_that_does_not_fit_is_refused_before_the_first_chunk(
    toy: Any, make_generator: Make, noise: Tensor, got: str
) -> None:
    with pytest.raises(
        LongtakeError, match=rf"the noise of chunk 2 does not fit\n  got: {got}(.|\n)*\[1, F, C, H, W\]"
    ):
        make_generator(toy).session(["x"] * 3, noise=noise)
    assert not toy.count


def test_noise_that_cannot_last_is_refused_where_more_is_asked_for(
    make_toy: Any, make_generator: Make, tmp_path: Path
) -> None:
    generator, noise = make_generator(make_toy()), torch.randn(1, 16, 16, 8, 8)
    clip = torch.zeros(1, 8, 16, 8, 8)
    with pytest.raises(LongtakeError, match="the noise of chunk 2 does not fit"):  # the clip's chunk counts
        generator.session(["x"] * 2, noise=noise, continue_from=clip, **PLAIN)
    with pytest.raises(LongtakeError, match="(?s)an endless session does not.*fix: pass noise as a function"):
        generator.session(["x"], noise=noise, endless=True, **PLAIN)
    with generator.session(["x"] * 2, noise=noise, decode=False, **PLAIN) as session:
        with pytest.raises(LongtakeError, match="the noise of chunk 2 does not fit"):
            session.feed(clip, "y")  # which moves the script's last chunk to where there is no noise
        next(session)
        session.save(tmp_path / "half.safetensors")
    with pytest.raises(LongtakeError, match="the noise of chunk 1 does not fit"):
        generator.load_session(tmp_path / "half.safetensors", noise=noise[:, :8], decode=False)
    with generator.load_session(tmp_path / "half.safetensors", noise=noise, decode=False) as session:
        assert len(list(session)) == 1
    with generator.session(["x"], noise=noise, **PLAIN) as session:
        session.extend(1)
        assert len(list(session)) == 2


def test_noise_that_ends_or_is_none_leaves_the_session_as_it_was(toy: Any, make_generator: Make) -> None:
    session = make_generator(toy).session(["x"], noise=torch.randn(1, 8, 16, 8, 8), **PLAIN)
    next(session)
    with pytest.raises(LongtakeError, match=r"the noise of chunk 1 does not fit\n  got: \(1, 0(.|\n)*expected: \(1, 8"):
        session.extend(1)
    assert (session.next_index, session.remaining) == (1, 0)
    session = make_generator(toy).session(["x"], noise=lambda chunk: [1.0], **PLAIN)
    with pytest.raises(LongtakeError, match="the noise of chunk 0 does not fit\n  got: list"):
        next(session)


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_take_the_text_encoder_s_place(make_toy: Any, make_generator: Make) -> None:
    rows = {prompt: torch.full((1, 32, 128), value) for prompt, value in {"x": 0.1, "y": 0.2, "": 0.3}.items()}
    script = [Segment("x", 2), Segment("y", 1, cut=True)]
    two = make_generator(make_toy()).session(script, embeddings=rows, steps=1, guidance=2.0)
    with_prefix = {**rows, "The scene transitions. y": torch.full((32, 128), 0.2), "y": torch.zeros(1, 32, 128)}
    same = make_generator(make_toy()).session(script, embeddings=with_prefix, steps=1, guidance=2.0)
    other = make_generator(make_toy()).session(script, embeddings={**rows, "y": rows["x"]}, steps=1, guidance=2.0)
    wanted = latents(two)
    assert torch.equal(latents(same), wanted) and not torch.equal(latents(other), wanted)
    one = make_generator(make_toy()).session(["x"], embeddings=rows["x"][:, :5], **PLAIN)
    padded = torch.cat([rows["x"][:, :5], torch.zeros(1, 27, 128)], 1)
    assert torch.equal(
        latents(one), latents(make_generator(make_toy()).session(["x"], embeddings={"x": padded}, **PLAIN))
    )


BAD_EMBEDDINGS: list[tuple[Any, str]] = [
    ({"y": torch.zeros(1, 32, 128)}, "no embeddings of this prompt were given\n  got: 'x'\n  expected: one of 'y'"),
    ({"x": torch.zeros(1, 33, 128)}, r"these embeddings do not fit\n  got: \(1, 33, 128\)\n  expected: \(1, 32, 128\)"),
    ({"x": torch.zeros(2, 32, 128)}, "these embeddings do not fit"),
    (torch.zeros(32, 64), "these embeddings do not fit"),
    ({"x": "y"}, "these embeddings do not fit\n  got: str"),
]


@pytest.mark.parametrize(("embeddings", "message"), BAD_EMBEDDINGS)
def test_embeddings_that_do_not_fit_are_refused_at_once(
    toy: Any, make_generator: Make, embeddings: Any, message: str
) -> None:
    with pytest.raises(LongtakeError, match=message):
        make_generator(toy).session(["x"], embeddings=embeddings, **PLAIN)
    assert not toy.count


def test_guidance_needs_embeddings_of_the_negative_prompt(toy: Any, make_generator: Make) -> None:
    with pytest.raises(LongtakeError, match="(?s)embeddings of the negative prompt, too.*fix: pass embeddings={prompt"):
        make_generator(toy).session(["x"], embeddings=torch.zeros(32, 128), guidance=2.0)
    with pytest.raises(LongtakeError, match="no embeddings of this prompt were given\n  got: 'ugly'"):
        make_generator(toy).session(["x"], embeddings={"x": torch.zeros(32, 128)}, guidance=2.0, negative_prompt="ugly")


def test_a_saved_session_wants_what_it_was_given(make_toy: Any, make_generator: Make, tmp_path: Path) -> None:
    noise, embeddings = torch.randn(1, 24, 16, 8, 8), torch.randn(32, 128)
    given = {"noise": noise, "embeddings": embeddings}
    sampling = Sampling(timesteps=(1000, 600), guidance=1, solver="euler")
    session = make_generator(make_toy()).session(["x"] * 3, **given, sampling=sampling)
    next(session)
    session.save(tmp_path / "s.safetensors")
    wanted = latents(session)
    generator = make_generator(make_toy())
    assert torch.equal(latents(generator.load_session(tmp_path / "s.safetensors", **given)), wanted)
    for missing, message in (("noise", "another noise"), ("embeddings", "another embeddings")):
        with pytest.raises(LongtakeError, match=f"the saved session has {message}\n  got: 'given'"):
            generator.load_session(tmp_path / "s.safetensors", **{k: v for k, v in given.items() if k != missing})


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_says_what_steps_and_guidance_say(make_toy: Any, make_generator: Make) -> None:
    wanted = latents(make_generator(make_toy()).session(["x"] * 2, steps=3, guidance=2.0))
    given = make_generator(make_toy()).session(["x"] * 2, sampling=Sampling(steps=3.0, guidance=2, shift=5))  # type: ignore[arg-type]
    assert torch.equal(latents(given), wanted)


def test_given_timesteps_reach_the_model(toy: Any, make_generator: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    family = type(make_generator(toy).model.family)
    original = family.pass_inputs
    monkeypatch.setattr(family, "pass_inputs", lambda s, p, f, t, c: (told.append(t), original(s, p, f, t, c))[1])
    make_generator(toy).session(["x"], sampling=Sampling(timesteps=(1000, 750), solver="euler"))
    assert set(told) == {1000, 750, 0}
    told.clear()
    make_generator(toy).session(["x"], sampling=Sampling(timesteps=(1000, 750), shift=5, solver="euler"))
    assert set(told) == {1000, 937.5, 0}


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"steps": 4, "timesteps": (999,)}, "(?s)steps and timesteps say the same in two ways.*fix: leave steps out"),
    ({"timesteps": (500, 600)}, "bad timesteps"),
    ({"timesteps": ("999",)}, "bad timestep\n  got: '999'"),
    ({"timesteps": ()}, "bad timesteps"),
    ({"timesteps": (1000, 500)}, "UniPC cannot start at pure noise"),
    ({"solver": "ddim"}, "unknown solver"),
    ({"steps": 7.5}, "bad number of denoise steps\n  got: 7.5\n  expected: a whole number"),
    ({"steps": 0}, "bad number of denoise steps"),
    ({"shift": 0}, "bad shift"),
    ({"shift": float("nan")}, "bad shift"),
    ({"guidance": float("inf")}, "bad guidance scale"),
]


@pytest.mark.parametrize(("given", "message"), BAD_SAMPLING)
def test_bad_sampling_is_refused_before_the_first_chunk(
    toy: Any, make_generator: Make, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(LongtakeError, match=message):
        make_generator(toy).session(["x"], sampling=Sampling(**given))
    assert not toy.count


def test_sampling_and_its_shorthands_are_not_mixed(toy: Any, make_generator: Make) -> None:
    with pytest.raises(LongtakeError, match="steps and guidance are part of sampling"):
        make_generator(toy).session(["x"], steps=4, sampling=Sampling(solver="euler"))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> Generator:
    return Generator.from_checkpoint(STUDENT)


def test_a_checkpoint_is_sampled_as_it_says_and_knows_its_weights(student: Generator) -> None:
    assert (student.sampling.steps, student.sampling.guidance) == (4, 1.0)
    assert student.backend.weights == weights_digests(STUDENT) and student.backend.reason == "PyTorch in fp32"
    state = student.backend.new_state("dit").tensors.values()
    assert {tensor.dtype for tensor in state} == {torch.float32}
    with student.session(["a green seven drifts left"], steps=1) as session:
        assert next(session).frames.shape == (29, 128, 128, 3)


def test_a_dit_alone_takes_latents_and_embeddings(student: Generator, tmp_path: Path) -> None:
    for name in ("dit.safetensors", "dit.json"):
        shutil.copy(STUDENT / name, tmp_path)
    alone, prompt = Generator.from_checkpoint(tmp_path), "a green seven drifts left"
    tokens = student.tokenize([prompt], TINY.text.length)
    embeddings = student.model.text(tokens)
    wanted = latents(student.session([prompt], seed=1, steps=1, decode=False))
    given = alone.session([prompt], seed=1, steps=1, decode=False, embeddings={prompt: embeddings})
    assert torch.equal(latents(given), wanted)
    with pytest.raises(
        LongtakeError, match="(?s)no VAE to decode with.*no vae.safetensors in .*fix: pass decode=False"
    ):
        alone.session([prompt], embeddings=embeddings)
    with pytest.raises(
        LongtakeError, match="(?s)no text encoder for this prompt.*fix: pass embeddings={'a green seven"
    ):
        next(alone.session([prompt], decode=False))
    given = alone.session(["x"], decode=False, embeddings=embeddings)
    assert given.feed(wanted, "x").index == 0  # latents in


def test_bf16_is_what_a_gpu_has(student: Generator) -> None:
    rounded = Generator.from_checkpoint(STUDENT, dtype="bf16").backend
    state = rounded.new_state("dit")
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.bfloat16}
    embeddings = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0))
    pairs = zip(*(b.run("context", {"embeddings": embeddings}).values() for b in (rounded, student.backend)))
    for got, wanted in pairs:
        assert got.dtype == torch.bfloat16 and 1e-4 < (got - wanted).norm() / wanted.norm() < 0.03


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="(?s)holds no checkpoint.*got: no dit.safetensors.*fix: pass the folder"):
        Generator.from_checkpoint(tmp_path)
    for name in ("dit.safetensors", "dit.json"):
        shutil.copy(STUDENT / name, tmp_path)
    with pytest.raises(LongtakeError, match="(?s)does not run in this dtype.*got: 'fp8'.*expected: 'fp32' or 'bf16'"):
        Generator.from_checkpoint(tmp_path, dtype="fp8")
    with pytest.raises(LongtakeError, match="(?s)no such backend.*got: 'fused'.*'torch' or 'reference'"):
        Generator.from_checkpoint(tmp_path, backend="fused")
    with pytest.raises(LongtakeError, match="(?s)stores its weights in bf16.*fix: pass backend='torch' for fp32"):
        Generator.from_checkpoint(tmp_path, backend="reference", dtype="fp32")
    with open(tmp_path / "dit.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    with pytest.raises(IntegrityError, match="is not the file its side file describes"):
        Generator.from_checkpoint(tmp_path)


def test_reference_finds_the_export_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path))
    folder = tmp_path / "models" / "mine" / "tiny_bf16_sm90" / "onnx"
    with pytest.raises(
        UnavailableError, match="(?s)nothing was exported.*fix: longtake export --recipe tiny_bf16_sm90 --ch"
    ):
        Generator.from_checkpoint(STUDENT, backend="reference")
    folder.mkdir(parents=True)
    networks = {"dit": ExportedNetwork({"dit.onnx": ExportedFile("0")})}
    told = {"weights": weights_digests(STUDENT), "vocabulary": ()}
    Export("tiny_bf16", "tiny", "bf16", "bf16", networks, checked=Checked("passed", ""), **told).write(folder)
    assert checkpoints.export_of(TINY, STUDENT) == folder
    with pytest.raises(IntegrityError, match="dit.onnx is not what was exported"):
        Generator.from_checkpoint(STUDENT, backend="reference")


# ---- fp32 means fp32 -------------------------------------------------------------------------------------------------


class Wide(TorchFunctionMode):
    """float64 where the models say fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights need all bits of fp32: the shipped ones would survive bf16."""
    folder, models = tmp_path_factory.mktemp("fine"), load_models(TINY, STUDENT)
    generator = torch.Generator().manual_seed(0)
    for kind, module in {"dit": models.dit, "vae": models.vae, "text_encoder": models.text}.items():
        state = {
            name: tensor * (1 + 1e-3 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in module.state_dict().items()
        }
        assert not torch.equal(state[min(state)], state[min(state)].bfloat16().float())
        save_checkpoint(folder / f"{kind}.safetensors", state, SideFile.read(STUDENT / f"{kind}.json"))
    return folder


@torch.no_grad()
def test_fp32_agrees_with_float64(fine: Path) -> None:
    """Two chunks of two steps: text, context, all passes, the cache between them, the solver and the decoder."""
    student = Generator.from_checkpoint(fine)
    prompt, seed, schedule = "a green seven drifts left", 5, schedule_of(2)
    with student.session([prompt] * 2, seed=seed, steps=2, decode=False) as session:
        chunks = [chunk.latents for chunk in session]
    decoder = student.model.decoder()
    frames = [decoder.decode(chunks[0][:, i]).clone() for i in range(2)]
    models = load_models(TINY, fine, torch.float64)
    tokens = models.text.tokenize([prompt])
    with Wide():
        context = models.dit.context(models.text(tokens)[0])
        layers = range(len(models.dit.blocks))
        past: list[list[Tensor]] = [[] for _ in layers]
        for chunk in range(2):
            positions = torch.arange(8, dtype=torch.float64) + 8 * chunk
            angles = rope_angles(TINY.dit, positions, TINY.grid_hw)
            sample, solver = noise_for_chunk(TINY, seed, chunk).double().transpose(1, 2), UniPC(schedule)
            for timestep in schedule.timesteps:
                sample = solver.step(velocity(models.dit, sample, timestep, angles, context, past)[0], sample)
            for layer, fresh in enumerate(velocity(models.dit, sample, 0, angles, context, past)[1]):
                past[layer].append(fresh)
            assert relative(chunks[chunk], sample.transpose(1, 2)) < 1e-5
            sample = sample.contiguous()
            if chunk == 0:
                first, caches = models.vae.decode_chunk(sample.transpose(1, 2)[:, :1])
                second, _ = models.vae.decode_chunk(sample.transpose(1, 2)[:, 1:2], caches)
                assert first.dtype == torch.float64
                assert relative(frames[0], first[0]) < 1e-5 and relative(frames[1], second[0]) < 1e-5


def velocity(
    dit: Any, sample: Tensor, timestep: float, angles: Tensor, context: list[Tensor], past: list[list[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """A pass in float64, attention over what is past written down plainly: velocity, and each layer's fresh K and V."""
    fresh: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fresh.append(torch.stack((k, v)))
        keys, values = torch.cat([*past[layer], fresh[-1]], 1).transpose(1, 2)
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1) @ values).transpose(0, 1)

    half = TINY.dit.freq_dim // 2
    turns = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    sinusoid = torch.cat((turns.cos(), turns.sin())).expand(8, -1)
    made = dit(sample[0], sinusoid, (angles.cos(), angles.sin()), context, attend, cross=dense_cross_attention)
    assert made.dtype == torch.float64
    return made[None], fresh


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())
