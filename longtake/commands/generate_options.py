"""The options of `longtake generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.options import option
from longtake.runtime.sources import BACKEND_NAMES, ORACLE
from longtake.runtime.view import View

EPILOG = """a story is a YAML file; a chunk is 8 latent frames (29 video frames for the first, 32 for each later one):

  seed: 7
  shots:
    - prompt: a green seven drifts left over a dark blue background, soft light
      chunks: 2
      then:                      # the prompt changes, the shot goes on
        - prompt: a green seven rises over a dark blue background, soft light
    - prompt: a red two circles over a forest background, light from above      # a new shot: a cut
      chunks: 2

  image: first.png               # the first frame (I2V); or --image
  continue_from: clip.mp4        # or: go on from a video, or a .safetensors file of latents; or --continue-from

what is seen in the clip may be told shot by shot; without that it is what the first shot's prompt says:

  continue_from:
    clip: clip.mp4               # paths are seen from where the story lies
    shots:
      - prompt: a red two circles over a forest background, light from above

examples:
  longtake generate demo.yaml --model tiny-4step --out demo.mp4
  longtake generate --prompt "a white nine grows over a black background, soft light" --chunks 3
  longtake generate demo.yaml --chunks 2 --save-session half.safetensors
  longtake generate --load-session half.safetensors --out rest.mp4
  longtake generate --prompt "a green seven drifts left" --image first.png --chunks 3
  longtake generate --prompt "a green seven rises" --continue-from demo.mp4 --clip-prompt "a green seven drifts left"
  longtake generate --prompt "a room" --engines world-tiny_bf16_sm90 --action "w-24, d-24" --chunks 2

Ctrl-C stops at the next pass and keeps the frames finished so far as a playable file (exit code 130); SIGTERM and
SIGHUP do the same (143, 129).
"""


@dataclass(frozen=True)
class WhatOptions:
    """What to generate"""

    story: str | None = option(None, positional=True, metavar="STORY.yaml")
    """such as demo.yaml (default: --prompt, or what a loaded session has left to do)"""
    prompt: tuple[str, ...] = option((), repeated=True, metavar="TEXT")
    """a prompt instead of a story; given several times, one chunk each, in their order (default: none)"""
    chunks: int | None = option(None, metavar="N")
    """stop after N chunks; beyond the story, its last prompt goes on (default: the whole story; 1 of a prompt)"""
    seed: int | None = option(None, metavar="N")
    """noise seed (default: the story's, else 0)"""
    steps: int | None = option(None, metavar="N")
    """denoise steps a chunk (default: the story's, else the preset's)"""
    guidance: float | None = option(None, metavar="S")
    """guidance scale; 1 turns it off and halves the work (default: the story's, else the checkpoint's)"""
    negative_prompt: str | None = option(None, metavar="TEXT")
    """prompt of the unguided pass (default: the story's, else the preset's)"""
    image: Path | None = option(None, metavar="FILE")
    """picture that is the first frame, I2V (default: the story's, if any)"""
    continue_from: Path | None = option(None, metavar="FILE")
    """go on from a video, or a .safetensors file of latents (default: the story's, if any)"""
    clip_prompt: str | None = option(None, metavar="TEXT")
    """what is seen in that clip (default: the first prompt)"""


@dataclass(frozen=True)
class ViewOptions:
    """Where the camera goes, of a model with cameras"""

    action: str | None = option(None, metavar="KEYS-FRAMES,...")
    """keys held: w s forward and back, j l left and right, a d turn, i k up and down (default: the story's, else at rest)"""
    camera: Path | None = option(None, metavar="FILE.npy")
    """camera-to-world poses in place of an action, (frames, 4, 4), OpenCV axes (default: the story's, if any)"""
    intrinsics: Path | None = option(None, metavar="FILE.npy")
    """fx, fy, cx, cy in pixels of the picture (default: the story's, else 60 degrees across)"""
    speed: float | None = option(None, metavar="METRES")
    """that a key moves the camera in a frame (default: the story's, else 0.025)"""
    turn: float | None = option(None, metavar="DEGREES")
    """that a key turns the camera in a frame (default: the story's, else 0.6)"""

    @property
    def view(self) -> View:
        """The same as a session takes it."""
        return View(self.action, self.camera, self.intrinsics, self.speed, self.turn)


@dataclass(frozen=True)
class HowOptions:
    """How to run it"""

    model: str | None = option(None, metavar="NAME[@RECIPE]")
    """a model by name, such as tiny-4step (default: --engines)"""
    engines: str | None = option(None, metavar="FOLDER|RECIPE")
    """engines, exported networks, or a recipe's name (default: the best there is)"""
    force: bool = option(False)
    """take an export that failed its comparison with PyTorch"""
    checkpoints: Path | None = option(None, metavar="FOLDER")
    """where a text or VAE encoder that was not exported lies (default: where the export was made from)"""
    backend: str = option("auto", metavar="|".join(BACKEND_NAMES))
    """taken or refused, never replaced; auto chooses and says why"""
    device: str | None = option(None, metavar="cuda:N")
    """where networks run (default: the backend's choice)"""
    decode_device: str | None = option(None, metavar="cuda:N")
    """another GPU for the VAE (default: the same)"""
    gpus: int = option(1, metavar="P")
    """GPUs of this machine that share the video (docs/multi-gpu.md); with --device cpu, processes on the CPU, in PyTorch"""
    kept_windows: int = option(0, metavar="LAYERS")
    """layers that keep their window laid out between the passes of a chunk (docs/kernels.md)"""


@dataclass(frozen=True)
class OutOptions:
    """What to write"""

    out: Path | None = option(None, metavar="FILE.mp4")
    """the video; a contact sheet lies beside it (default: runs/NAME.mp4)"""
    report: Path | None = option(None, metavar="FILE.json")
    """the run report (default: beside the video)"""
    save_session: Path | None = option(None, metavar="FILE.safetensors")
    """save the session at the end, to go on later (default: not saved)"""
    load_session: Path | None = option(None, metavar="FILE.safetensors")
    """go on with a saved session (default: a new one)"""


@dataclass(frozen=True)
class GenerateOptions(OutOptions, HowOptions, ViewOptions, WhatOptions):
    """All that `longtake generate` is told."""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what nothing can be generated with."""
        if self.gpus < 1:
            raise LongtakeError("bad --gpus", got=self.gpus, expected="1 or more", fix="--gpus 2")
        if self.kept_windows < 0:
            raise LongtakeError("bad --kept-windows", got=self.kept_windows, expected="0 or more", fix="leave it out")
        if self.model is not None and self.engines is not None:
            raise LongtakeError(
                "--model and --engines both name what generates",
                got=f"{self.model} and {self.engines}",
                fix="leave one out",
            )
        if self.story and self.prompt:
            got = f"{self.story} and --prompt"
            raise LongtakeError("both a story and --prompt were given", got=got, fix="leave one out")
        if self.chunks is not None and self.chunks < 1:
            raise LongtakeError("bad number of chunks", got=self.chunks, expected="1 or more", fix="pass --chunks 2")
        if self.load_session:
            self._check_loading()
        elif not self.prompt and not self.story:
            raise LongtakeError(
                "nothing to generate", expected="a story, --prompt or --load-session", fix="longtake generate demo.yaml"
            )
        if self.backend not in (*BACKEND_NAMES, ORACLE):
            raise LongtakeError(
                "unknown backend",
                got=self.backend,
                expected=" | ".join(BACKEND_NAMES),
                fix="pass one of these with --backend",
            )

    def _check_loading(self) -> None:
        named = ("seed", "steps", "guidance", "negative_prompt")
        fixed = [f"--{key.replace('_', '-')}" for key in named if getattr(self, key) is not None]
        if fixed:
            got = ", ".join(fixed) + " with --load-session"
            raise LongtakeError("a saved session fixes how it is sampled", got=got, fix=f"leave out {fixed[0]}")
        if self.view.given:
            got = ", ".join(f"--{name}" for name in self.view.given)
            raise LongtakeError("a saved session has a camera already", got=got, fix="leave it out")
        if self.image or self.continue_from or self.clip_prompt:
            raise LongtakeError(
                "a saved session has begun already",
                got="--image, --continue-from or --clip-prompt",
                expected="a new video",
                fix="leave out --load-session",
            )
