"""`longtake serve`: a page and two interfaces over one model; what is not built yet is built first."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from longtake.commands.probes import serve_finding
from longtake.commands.run_files import RUNS
from longtake.errors import LongtakeError, UnavailableError
from longtake.options import Bounds, Command, OneOf, check, option
from longtake.runtime.serve.limits import Limits
from longtake.runtime.sources import BACKEND_NAMES
from longtake.settings import settings_from_environment

if TYPE_CHECKING:
    from longtake.runtime.generator import Generator
    from longtake.runtime.serve.server import Say

STUDENT = "tiny-4step"  # the model that is served where nothing else is named
EPILOG = """examples:
  longtake serve                                 the tiny model; what is not built is built first
  longtake serve --model tiny-4step@tiny_bf16_sm89
  longtake serve --engines wan2.2-ti2v-5b_fp8_sm90 --store /data/longtake
  longtake serve --host 0.0.0.0 --token-file tokens.txt --allow-origin https://video.example.org

The page is at /, jobs at /v1/videos (OpenAI's interface), live sessions at WS /v1/realtime/video; docs/serving.md tells
all of it. Ctrl-C or SIGTERM ends in order: sessions are parked, and go on with the next server on the same --store.
"""


@dataclass(frozen=True)
class ModelOptions:
    """What is served"""

    model: str | None = option(None, metavar="NAME[@RECIPE]")
    """a model by name; what is missing of it is exported and built first (default: tiny-4step, unless --engines)"""
    force: bool = option(False)
    """take an export that failed its comparison with PyTorch"""
    engines: str | None = option(None, metavar="FOLDER|RECIPE")
    """a folder of engines or of exported networks, or a recipe's name (default: those of --model)"""
    checkpoints: Path | None = option(None, metavar="FOLDER")
    """where a text or VAE encoder that was not exported lies (default: where the export was made from)"""
    backend: Annotated[str, OneOf(BACKEND_NAMES)] = option("auto")
    """taken or refused, never replaced; auto chooses and says why"""
    device: str | None = option(None, metavar="cuda:N")
    """where networks run (default: the backend's choice)"""
    decode_device: str | None = option(None, metavar="cuda:N")
    """another GPU for the VAE (default: the same)"""
    sessions_per_worker: Annotated[int, Bounds(1, 64)] = option(1, metavar="N")
    """sessions at a time on one device, in turn; on a GPU no more than fit"""
    kept_windows: Annotated[int, Bounds(0)] = option(0, metavar="LAYERS")
    """layers that keep their window laid out between the passes of a chunk (docs/kernels.md)"""
    codec: Annotated[str, OneOf(("h264", "vp9", "av1"))] = option("h264")
    """how video is encoded unless a client asks otherwise"""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what is out of bounds, and for two models."""
        check(self)
        if self.model is not None and self.engines is not None:
            what, got = "--model and --engines both name what is served", f"{self.model} and {self.engines}"
            expected, fix = "one of them", "leave one out"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)


@dataclass(frozen=True)
class DoorOptions:
    """Where and to whom"""

    host: str = option("127.0.0.1", metavar="ADDRESS")
    """address to listen on; any but loopback needs --token-file"""
    port: Annotated[int, Bounds(0, 65535)] = option(8000, metavar="N")
    """port to listen on; 0 picks a free one"""
    store: Path | None = option(None, metavar="FOLDER")
    """where sessions are kept (default: a temporary folder, whose sessions end with the process)"""
    token_file: Path | None = option(None, metavar="FILE")
    """tokens of users, a line user:token each (default: nobody is asked)"""
    allow_origin: tuple[str, ...] = option((), repeated=True, metavar="URL")
    """a page's origin that may use this server, such as https://video.example.org; may be repeated (default: its own)"""
    log_prompts: bool = option(False)
    """prompts in the log in full, instead of their length and a short hash"""
    traces: str | None = option(None, metavar="URL")
    """send traces by OTLP to this collector, such as http://127.0.0.1:4318/v1/traces; needs the extra otel (default: none)"""

    def __post_init__(self) -> None:
        """Raise LongtakeError for what is out of bounds."""
        check(self)


@dataclass(frozen=True)
class RayOptions:
    """Many machines"""

    ray: bool = option(False)
    """over Ray Serve: fronts and workers are processes of a cluster, --store is a folder that all of them see"""
    workers: str = option("1", metavar="N|MIN:MAX")
    """workers, or the bounds between which their number follows the load (with --ray)"""
    fronts: Annotated[int, Bounds(1, 64)] = option(1, metavar="N")
    """processes that hold sockets (with --ray)"""
    gpus: Annotated[int, Bounds(0, 8)] = option(0, metavar="N")
    """GPUs that share every video (docs/multi-gpu.md); with --ray, of each worker; 0 for a CPU"""

    @property
    def bounds(self) -> tuple[int, int]:
        """Workers at least and at most. Raises LongtakeError."""
        least, _, most = self.workers.partition(":")
        try:
            found = int(least), int(most or least)
        except ValueError:
            found = (0, 0)
        if not 1 <= found[0] <= found[1]:
            raise LongtakeError(
                "bad --workers", got=self.workers, expected="N or MIN:MAX, 1 or more", fix="--workers 1:4"
            )
        return found


def run(model: ModelOptions, door: DoorOptions, ray: RayOptions, limits: Limits) -> int:
    """Serve until a signal comes."""
    if not (found := serve_finding()).ok:
        raise UnavailableError("serving needs packages that are not installed", got=found.found, fix=found.fix)
    from longtake.runtime.serve import logs
    from longtake.runtime.serve.server import Settings, Size, serve

    level = settings_from_environment().log_level
    logs.configure(level, door.log_prompts)
    settings = Settings(
        host=door.host,
        port=door.port,
        store=door.store,
        token_file=door.token_file,
        origins=door.allow_origin,
        slots=model.sessions_per_worker,
        codec=model.codec,
        traces=door.traces,
        limits=limits,
    )
    require_places(model)
    opening, bounds = partial(opened, model, ray.gpus or 1), ray.bounds
    if not ray.ray:
        return serve(settings, opening, announced)
    if importlib.util.find_spec("ray") is None:
        raise UnavailableError("--ray needs Ray Serve", got="no ray", fix="pip install 'longtake[serve,scale]'")
    from longtake.runtime.serve.ray_app import serve_ray

    require_shared(model, ray.gpus)
    if (
        model.engines is None
    ):  # built once, here, before the workers look for it; on another machine they build their own
        ready(model, ray.gpus, lambda words: None)
    return serve_ray(settings, opening, announced, Size(*bounds, ray.fronts, 0 if model.device == "cpu" else ray.gpus))


def require_places(model: ModelOptions) -> None:
    """Raise LongtakeError for a device or a folder that is none: before the model is exported and built, not after it."""
    from longtake.devices import torch_device
    from longtake.runtime.sources import require_checkpoints

    for name, given in (("--device", model.device), ("--decode-device", model.decode_device)):
        if given is not None:
            torch_device(given, name)
    if model.checkpoints is not None:
        require_checkpoints(model.checkpoints)


def require_shared(model: ModelOptions, gpus: int) -> None:
    """Raise LongtakeError for what a worker with `gpus` GPUs would refuse: Ray would start it again and again."""
    if gpus < 2:
        return
    from longtake.preparation import model_and_recipe
    from longtake.runtime.parallel.choose import require_shareable
    from longtake.runtime.parallel.open import require_split
    from longtake.runtime.sources import source_from_name
    from longtake.training.models.families import preset_named

    require_shareable(model.backend, model.decode_device, gpus)
    if model.engines:
        preset = source_from_name(model.engines).recipe.model
    else:
        preset = preset_named(model_and_recipe(model.model or STUDENT)[0].preset)
    require_split(preset, gpus)


def announced(address: str) -> None:
    """Say where it is."""
    print(f"longtake: {address}", flush=True)


def opened(model: ModelOptions, gpus: int, say: Say) -> Generator:
    """The model, exported and built before if need be. The one place that knows where a model is found. gpus: that share
    every video."""
    from longtake.runtime.generator import Generator
    from longtake.runtime.sources import OpenOptions

    engines: Path | str = model.engines or ready(model, gpus, say)
    # Those that are there may have been built for as many ranks.
    if gpus > 1 and model.engines is None and (built := Path(engines).with_name("engines")).is_dir():
        engines = built if (built / "bundle.json").is_file() else engines
    say("the model is being opened")
    return Generator.from_engines(
        engines,
        model.backend,
        model.device,
        model.decode_device,
        OpenOptions(
            force=model.force, say=say, gpus=gpus, kept_windows=model.kept_windows, sessions=model.sessions_per_worker
        ),
        checkpoints=model.checkpoints,
    )


def ready(options: ModelOptions, gpus: int, say: Say) -> Path:
    """The folder of the model's engines where they run here, else of its export. Ranks need no engines of one GPU."""
    from longtake.preparation import best_recipe, model_and_recipe, prepared

    model, recipe = model_and_recipe(options.model or STUDENT)
    recipe = recipe or best_recipe(model)
    say(f"{model.name} is being made ready for {recipe.name}: once, in a minute or two")
    return prepared(model, recipe, on_cpu=gpus > 1 or options.backend == "reference")


COMMAND = Command(
    run,
    (ModelOptions, DoorOptions, RayOptions, Limits),
    "Serve one model: a page, jobs and live sessions.",
    EPILOG,
    RUNS / "serve",
)
