"""What a stream on several ranks does beside the same stream on one: `python ranks_at_work.py RANKS FOLDER DEVICE [ENGINES]`.

Real processes, over gloo on the CPU or NCCL on GPUs, the shipped tiny model with its 4-bit cache. FOLDER/result.json is what was found;
the tests beside it start this once a number of ranks, and judge. Not a test itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.accuracy.ssim import ssim
from longtake.errors import LongtakeError
from longtake.formats.bundle import Bundle
from longtake.formats.recipe import recipe_named
from longtake.paths import REPOSITORY
from longtake.runtime.backends.torch_oracle import TorchBackend
from longtake.runtime.backends.trt.open import backend_from_engines
from longtake.runtime.generator import Generator
from longtake.runtime.parallel.backend import ShardedBackend
from longtake.runtime.parallel.open import sharded_backend
from longtake.runtime.session import Session
from longtake.runtime.story import Segment
from longtake.training.models.presets import TINY
from longtake.training.models.text.words import tokenizer_for

# Six latent rows: on four ranks two, two, one, one.
PRESET = replace(TINY, height=96, width=64)
RECIPE = replace(recipe_named("tiny_w4a16_sm90"), own_preset=PRESET)
SCRIPT = [Segment("a green seven drifts left", 2), Segment("a red two circles", 2, cut=True)]
HOW: dict[str, Any] = {"seed": 3, "steps": 2, "guidance": 3.0}
STUDENT = REPOSITORY / "training" / "checkpoints" / "tiny-4step"
LIMIT_S, PATIENCE_S, HANG_S = 500, 100.0, 1.0


def started(ranks: int, folder: Path, device: str, engines: Path | None = None) -> dict[str, Any]:
    """What a process of its own finds out."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "wb") as log:
        command = [sys.executable, __file__, str(ranks), str(folder), device, *([str(engines)] if engines else [])]
        done = subprocess.run(command, env=env, timeout=LIMIT_S, stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def apart(got: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> float:
    """Share of equal entries of the tensors with `what` in their names."""
    pairs = [(got[name], wanted[name]) for name in wanted if what in name]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)


class Compared:
    """One rank and several, each with a generator."""

    def __init__(self, ranks: int, folder: Path, device: str, engines: Path | None = None) -> None:
        self.folder, self.device = folder, torch.device(device)
        bundle = Bundle.read(engines) if engines else None
        self.recipe = bundle.recipe if bundle else RECIPE
        self.preset = self.recipe.model
        self.many: ShardedBackend = sharded_backend(
            self.recipe, None, ranks, None if device == "cuda" else device, PATIENCE_S, engines=engines
        )
        one: Any = backend_from_engines("segmented", engines) if engines else TorchBackend(RECIPE, device=self.device)
        tokenize = tokenizer_for(self.preset, bundle.vocabulary if bundle else one.vocabulary, folder)
        self.one_generator, self.many_generator = Generator(one, tokenize), Generator(self.many, tokenize)

    def passes(self, alone: Session) -> dict[str, Any]:
        """Single calls from the very same state: a pass, a clean pass, a latent to decode."""
        models, found = (self.one_generator.model, self.many_generator.model), {}
        states, decoders = [model.new_state() for model in models], [model.decoder() for model in models]
        whole = alone._state.positive.whole()
        for state in states:
            state.load(whole)
        found["loaded"] = equal(states[1].whole(), whole, "")
        plan, generator = alone._position.slots.plan(False), torch.Generator().manual_seed(5)
        embeddings = torch.randn(1, 32, 128, generator=generator).to(self.device)
        context = [model.context(embeddings) for model in models]
        latents = torch.randn(1, 16, self.preset.chunk_latents, *self.preset.latent_hw, generator=generator).to(
            self.device
        )
        family, frames = alone.model.family, self.preset.chunk_latents
        fixed = {**family.chunk_inputs(self.preset, 4, 1), **family.pass_inputs(self.preset, frames, 500.0, 1)}
        fixed = {name: tensor.to(self.device) for name, tensor in fixed.items()}
        for commit in (False, True):
            made = [
                model.velocity(latents, {**fixed, **model.slots(plan), **text}, state, commit).clone()
                for model, text, state in zip(models, context, states)
                for _ in range(2)  # an engine's second pass of a kind is a CUDA graph's
            ]
            found[f"again, commit {commit}"] = max(apart(made[1], made[0]), apart(made[3], made[2]))
            made = made[1::2]
            found[f"velocity, commit {commit}"] = apart(made[1], made[0])
            found[f"largest, commit {commit}"] = float((made[1] - made[0]).abs().max())
        one, many = states[0].whole(), states[1].whole()
        passes = getattr(self.many.own.inner, "passes", None)
        found["graphs"] = len(passes.graphs) if passes else 0
        found |= {f"codes {what}": equal(many, one, what) for what in ("values", "scales")}
        found["amax"] = max(apart(many[name], one[name]) for name in one if "amax" in name)
        found["written"] = 1 - equal(many, whole, "values_0")
        pictures_apart = [0.0]
        for latent in latents.unbind(2)[:3]:
            pictures = [decoder.decode(latent).clone() for decoder in decoders]
            pictures_apart.append(float((pictures[1] - pictures[0]).abs().max()))
        found["frames"] = max(pictures_apart) / 2 * 255  # of [-1, 1]
        found["decoder caches"] = max(apart(a, b) for a, b in zip(decoders[1].state(), decoders[0].state()))
        return found

    def moved(self) -> dict[str, Any]:
        """A video on one rank beside one on many; saved after two chunks it goes on on one and on many, and from there,
        saved again, once more on both."""
        found: dict[str, Any] = {"gate": vars(self.recipe.gate)}
        alone = self.one_generator.session(SCRIPT, **HOW)
        wanted = [next(alone) for _ in range(3)]
        found |= self.passes(alone)
        many = self.many_generator.session(SCRIPT, **HOW)
        got = [next(many), next(many)]
        many.save(self.folder / "two.safetensors")
        self.many_addresses(many, found)
        got.append(next(many))
        back = self.one_generator.load_session(self.folder / "two.safetensors")
        there = next(back)
        back.save(self.folder / "three.safetensors")
        again = self.many_generator.load_session(self.folder / "three.safetensors")
        hops = [(there, got[2]), (next(again), next(back))]
        pairs = {"chunks": list(zip(got, wanted, strict=True)), "hops": hops}
        for name, rows in pairs.items():
            found[name] = [apart(a.latents, b.latents) for a, b in rows]
            found[f"ssim of {name}"] = [float(ssim(a.frames, b.frames).min()) for a, b in rows]
        found["sent"] = len(self.many._sent._known)
        for each in (alone, many, back, again):
            each.close()
        return found

    def many_addresses(self, session: Session, found: dict[str, Any]) -> None:
        """What the first rank holds of a state is its heads."""
        own = session._state.positive.tensors["values_0"].shape
        found["by rows"] = self.many.own.by_rows
        found["own heads"], found["all heads"] = own[3], session._state.positive.shapes()["values_0"][3]

    def lost(self, sign: int) -> dict[str, Any]:
        """A rank ends, or stops, between two chunks of a session that was saved; the video goes on on one rank."""
        session = self.many_generator.session(SCRIPT, **HOW, decode=False)
        next(session)
        session.save(self.folder / "saved.safetensors")
        pipe = self.many.followers._processes[-1]
        self.many.own.comm.patience = HANG_S
        # NCCL's watchdog ends the whole process: ours must be the first to see it, as in Comm.join
        watched = HANG_S * (4 if self.device.type == "cuda" else 1)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=watched))
        os.kill(pipe.pid, sign)
        said, start = [], time.monotonic()
        for _ in range(2):
            try:
                next(session)
            except LongtakeError as error:
                said.append(str(error))
        took = time.monotonic() - start
        ended = [process.poll() is not None for process in self.many.followers._processes]
        alone = self.one_generator.session(SCRIPT, **HOW, decode=False)
        wanted = [next(alone), next(alone)][1]
        resumed = next(self.one_generator.load_session(self.folder / "saved.safetensors", decode=False))
        return {"said": said, "took": took, "ended": ended, "resumed": apart(resumed.latents, wanted.latents)}


def rounded(device: str) -> dict[str, Any]:
    """A checkpoint in bf16 through the Python door, on one rank and on two; in a process that has lost ranks before."""
    made = []
    for ranks in (1, 2):
        with Generator.from_checkpoint(STUDENT, dtype="bf16", gpus=ranks, device=device) as generator:
            session = generator.session("a green seven drifts left", chunks=1, seed=1, steps=1, guidance=1)
            made.append((next(session), session.snapshot().tensors["positive.cache_0"]))
            session.close()
    (one, one_cache), (two, two_cache) = made
    return {
        "latents": apart(two.latents, one.latents),
        "cache": apart(two_cache, one_cache),
        "dtype": str(two_cache.dtype),
        "ssim": float(ssim(two.frames, one.frames).min()),
    }


def main(ranks: int, folder: Path, device: str, engines: Path | None) -> None:
    compared = Compared(ranks, folder, device, engines)
    found = compared.moved()
    found["lost"] = compared.lost(signal.SIGKILL if ranks == 2 else signal.SIGSTOP)
    compared.many.close()
    if ranks == 4:
        found["rounded"] = rounded("cpu")
    (folder / "result.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]) if sys.argv[4:] else None)
