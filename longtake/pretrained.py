"""The short way from a model's name to a video: what is missing is exported and built once, and found again after that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from longtake.devices import device_named
from longtake.outputs import claim_outputs, require_mp4
from longtake.record import reject_unknown_keys
from longtake.runtime import generator as runtime
from longtake.runtime.meter import Meter
from longtake.runtime.session import Session
from longtake.runtime.sources import OpenOptions
from longtake.runtime.start import Request
from longtake.runtime.story import Script, story_from_script
from longtake.training.models.families import preset_named

READ = ("image", "continue_from")  # what `generate` may be given as files


class Generator(runtime.Generator):
    """One model on one device, ready to generate. Sessions made from it share its engines, not their state."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        recipe: str | None = None,
        device: torch.device | str | None = None,
        *,
        force: bool = False,
    ) -> Self:
        """Open a model; what is missing of its export and engines is made first, and kept in LONGTAKE_HOME.

        Args:
            name_or_folder: a model's name ("tiny-4step", "NAME@RECIPE"), a folder of checkpoints, a folder as diffusers'
                `save_pretrained` leaves it, or a Hugging Face id that is in the local cache.
            recipe: by name; by default the one that fits this machine and what the model is calibrated for.
            device: such as "cuda:0", or "cpu"; a GPU if there is one.
            force: take an export that failed its comparison with PyTorch.

        Raises:
            LongtakeError: there is no such model, or its checkpoint cannot be exported.
            GateError: the export does not compute what the checkpoint does.
        """
        from longtake.preparation import best_recipe, model_and_recipe, prepared  # the exporter: as late

        device = None if device is None else device_named(device)
        on_cpu = device is not None and device.type == "cpu"
        model, wanted = model_and_recipe(name_or_folder, recipe)
        chosen = wanted or best_recipe(model, on_cpu)
        folder = prepared(model, chosen, on_cpu, force)
        backend = "reference" if on_cpu else "auto"
        return cls.from_engines(folder, backend, device, opening=OpenOptions(force=force))


@dataclass
class Video:
    """Frames uint8 [T, H, W, 3] at `fps` a second, and what `longtake generate` writes to its report."""

    frames: np.ndarray[Any, Any] = field(repr=False)
    fps: int
    report: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"<Video: {count} frames {width}x{height}, {count / self.fps:.1f} s at {self.fps} a second>"

    def save(self, path: str | Path) -> Path:
        """Write it as an mp4; returns the path.

        Raises:
            LongtakeError: no .mp4, or a file there that longtake did not write.
        """
        from longtake.video import write_video  # PyAV: not before it is needed

        path = Path(path)
        claim_video(path, f"video.save({str(path.with_suffix('.mp4'))!r})")
        write_video(path, self.frames, self.fps)
        return path


def claim_video(path: Path, fix: str, inputs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse a path that is no mp4's, or a file that is among `inputs` or that longtake did not write."""
    require_mp4(path, fix)
    claim_outputs({"the video": path}, {name: Path(it) for name, it in inputs.items() if isinstance(it, str | Path)})


def generate(
    prompt: Script,
    model: str | Path = "tiny-4step",
    chunks: int | None = 4,
    seed: int = 0,
    out: str | Path | None = None,
    **more: Any,
) -> Video:
    """Make a video.

    Args:
        prompt: what is to be seen: a prompt, prompts or a story, as the script of `Generator.session`.
        model: a name or a folder, as of `Generator.from_pretrained`.
        chunks: its length; None for a story's, or a list's, own.
        seed: the same seed makes the same video.
        out: where it is saved, too.
        **more: what else `Generator.session` takes.

    Raises:
        LongtakeError: what was asked for cannot be made or is unknown, or `out` is no mp4, an input, or a file that longtake did not write.
    """
    if out is not None:  # before the work, not after it
        claim_video(Path(out), f"out={str(Path(out).with_suffix('.mp4'))!r}", {name: more.get(name) for name in READ})
    reject_unknown_keys(more, [*list(signature(Generator.session).parameters)[2:], "model", "out"], "generate(...)")
    request = Request(story_from_script(prompt), seed, chunks=chunks, **more).check()
    from longtake.preparation import model_and_recipe  # the exporter: as late

    request.check_for(preset_named(model_and_recipe(model)[0].preset))
    with Generator.from_pretrained(model) as generator:
        with generator.session(request.script, seed, chunks=chunks, **more) as session:
            video = video_of(generator, session)
    if out is not None:
        video.save(out)
    return video


def video_of(generator: runtime.Generator, session: Session) -> Video:
    """All chunks of a session."""
    meter = Meter()
    frames: list[np.ndarray[Any, Any]] = []
    with tqdm(total=session.remaining, unit="chunk", desc="generating", disable=None, leave=False) as bar:
        for chunk in session:
            frames.append(chunk.frames)
            meter.add(chunk)
            bar.update()
    report = meter.report(session, generator.budget)
    return Video(np.concatenate(frames), generator.fps, asdict(report))
