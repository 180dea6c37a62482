"""Where engines and exported networks lie, and which backend opens them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longtake.devices import device_named, torch_device
from longtake.errors import LongtakeError, UnavailableError
from longtake.formats.bundle import Bundle
from longtake.formats.exported import UNRECORDED, Checked, Export
from longtake.formats.memory import Budget, RecordedTerm, Use
from longtake.formats.model_name import asked_for, folder_of, home, known_names, made_by, only_name_with
from longtake.formats.recipe import Recipe, recipe_for, recipe_named, recipe_names
from longtake.machine.capability import Choice, Machine, backend_for, has_module
from longtake.machine.machine import machine_here
from longtake.runtime.backends.base import Backend
from longtake.runtime.budget.check import check_memory, check_ranks, kept_windows, require_no_windows
from longtake.runtime.budget.measured import record_arenas
from longtake.runtime.budget.use import budget_of
from longtake.training.models.presets import Preset, SamplingConfig

log = logging.getLogger(__name__)

BUILD_FIX = "longtake export --model tiny-4step, then longtake engines --model tiny-4step; or pass a folder of engines"
ORACLE = "torch"  # PyTorch itself, for checks and tests; not among the backends a user is offered
BACKEND_NAMES = ("auto", "fused", "segmented", "reference")


@dataclass(frozen=True)
class Source:
    """Files of one recipe. engines: folder with bundle.json, or None if only exported. vocabulary: text encoder words.

    checkpoints: where a text or VAE encoder that was not exported is loaded from; None for the preset's own folder.
    sampling: how this checkpoint is sampled (a student in few steps, without guidance); None: as the preset says.
    weights: see `Backend.weights`. memory: what the engines take on a GPU, where their bundle records it.
    checked: whether the export was compared with PyTorch. model: its name. export: what was read of it, not verified.
    """

    recipe: Recipe
    onnx: Path
    engines: Path | None
    vocabulary: tuple[str, ...] | None
    checkpoints: Path | None = None
    sampling: SamplingConfig | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    memory: tuple[RecordedTerm, ...] = ()
    checked: Checked = UNRECORDED
    model: str = ""
    export: Export | None = None


def source_from_name(name: Path | str | None) -> Source:
    """Find the files of `name`: a folder of engines or of exported networks, a model, MODEL@RECIPE, or a recipe.

    Raises:
        LongtakeError: there is no such thing, or several; says what would make it.
    """
    if name is None:
        return _best_source()
    folder = Path(name)
    if (folder / "bundle.json").is_file():
        return source_from_bundle(folder)
    if Export.is_in(folder):
        return _source_from_export(folder)
    if folder.is_dir() and not (folder / "dit.safetensors").is_file():
        what, expected = f"folder {folder} holds no engines", "a folder made by `longtake engines` or `longtake export`"
        raise LongtakeError(what, got="neither bundle.json nor export.json", expected=expected, fix=BUILD_FIX)
    asked = asked_for(str(name))
    if asked.model is None and asked.recipe is not None:
        found = source_of_recipe(asked.recipe)
        if found is None:
            raise _nothing(asked.recipe.name, asked.recipe, _default_name(asked.recipe))
        return found
    assert asked.model is not None
    recipe = asked.recipe or recipe_named(recipe_for(machine_here().compute_capability, asked.model.preset))
    found = _source_in(folder_of(asked.model.name, recipe), recipe)
    if found is None:
        told = "" if asked.model.shipped else shlex.quote(str(asked.model.checkpoints))  # nobody knows the name yet
        raise _nothing(f"model {asked.model.name} and recipe {recipe.name}", recipe, asked.model.name, told)
    return found


def _default_name(recipe: Recipe) -> str:
    return Path(recipe.model.checkpoints).name


def _nothing(what: str, recipe: Recipe, model: str, told: str = "") -> LongtakeError:
    each = f"--model {told or model} --recipe {recipe.name}"
    then = f", then longtake engines {each}" if machine_here().compute_capability else ""  # a CPU runs the export
    return LongtakeError(
        f"nothing is built for {what}",
        got=f"no export and no engines in {folder_of(model, recipe)}",
        expected="networks that were exported, or engines built from them",
        fix=f"longtake export {each}{then}",
    )


def source_of_recipe(recipe: Recipe) -> Source | None:
    """What is built or exported for a recipe, of the only model that has it; None if none has.

    Raises:
        LongtakeError: several models have it.
    """
    name = only_name_with(recipe.name, "name it:")
    return _source_in(folder_of(name, recipe), recipe) if name else None


def _source_in(folder: Path, recipe: Recipe) -> Source | None:
    """Engines, else the export, in the folder of a model and recipe."""
    if (folder / "engines" / "bundle.json").is_file():
        source = source_from_bundle(folder / "engines")
        source.recipe.require_same(recipe, source.engines)
        return source
    return _source_from_export(folder / "onnx", recipe) if Export.is_in(folder / "onnx") else None


def _best_source() -> Source:
    """The first recipe that is built and runs natively here; failing that, the first whose export is there."""
    machine, fallback = machine_here(), None
    for name in recipe_names():
        recipe = recipe_named(name)
        models = [model for model in known_names() if made_by(folder_of(model, recipe))]
        # of several models that of few steps: the quickest to a video
        for model in sorted(models, key=lambda model: (model != "tiny-4step", model)):
            source = _source_in(folder_of(model, recipe), recipe)
            if source and source.engines and backend_for(machine, recipe).backend == recipe.mode:
                return source
            # nvfp4 is what the models are trained with
            if source and (fallback is None or (recipe.precision == "nvfp4" != fallback.recipe.precision)):
                fallback = source
    if fallback is None:
        what, got = "no engines and no exported networks are there", f"nothing in {home()}"
        expected, fix = "a model that was exported", BUILD_FIX
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return fallback


def source_from_bundle(folder: Path) -> Source:
    """Engines, and what the export that they were built from records, where it still lies there.

    Raises:
        LongtakeError: the folder holds no engines.
        IntegrityError: its bundle.json is damaged, or the export that lies there is another one by now.
    """
    bundle = Bundle.read(folder)
    export = Export.find(bundle.onnx)
    bundle.require_export(export)
    return Source(
        bundle.recipe,
        bundle.onnx,
        folder,
        bundle.vocabulary,
        export.checkpoint_folder if export else None,
        export.sampled if export else None,
        bundle.weights or (export.weights_known if export else {}),
        bundle.memory,
        export.checked if export else bundle.checked,
        export.model if export else bundle.model,
    )


def _source_from_export(folder: Path, recipe: Recipe | None = None) -> Source:
    export = Export.read(folder, digests=False)
    if export.recipe is not None:
        own = export.recipe.read
        if recipe is not None:
            own.require_same(recipe, folder)
        recipe = recipe or own
    if recipe is None:  # an export of an earlier version
        matching = [r for r in map(recipe_named, recipe_names()) if r.onnx_name == export.onnx_name]
        if not matching:
            raise LongtakeError(
                f"no recipe fits the export in {folder}", got=export.onnx_name, expected=", ".join(recipe_names())
            )
        recipe = matching[0]
    return Source(
        recipe,
        folder,
        None,
        export.vocabulary,
        export.checkpoint_folder,
        export.sampled,
        export.weights_known,
        checked=export.checked,
        model=export.model,
        export=export,
    )


def require_checkpoints(folder: Path) -> Path:
    """`folder`, if it is one."""
    if not folder.is_dir():
        fix = "pass the folder with text_encoder.safetensors"
        raise LongtakeError(f"{folder} is no folder of checkpoints", expected="what `longtake convert` wrote", fix=fix)
    return folder


@dataclass(frozen=True)
class OpenOptions:
    """What a backend is opened for, so that its memory is known first. announce: is told the budget, before it is used.

    guided: with classifier-free guidance (a second cache); None stands for the preset's own. encode: from a picture or
    clip. check: refuse what does not fit the memory that is free. runs: whether it will compute anything.
    force: take an export that failed its comparison with PyTorch. say: is told what is taken unchecked.
    gpus: how many of this machine share a stream of video (runtime/parallel). kept_windows: layers that keep their attention's
    window between passes; None: as many as the memory that is free allows. sessions: that will be open at a time.
    known: is told the preset before anything is opened, and may refuse.
    """

    guided: bool | None = None
    encode: bool = False
    check: bool = True
    runs: bool = True
    announce: Callable[[Budget], None] = lambda budget: None
    force: bool = False
    say: Callable[[str], None] = log.warning
    gpus: int = 1
    kept_windows: int | None = 0
    sessions: int = 1
    known: Callable[[Preset], None] = lambda preset: None


NOTHING_SPECIAL = OpenOptions()


def backend_from_source(
    source: Source,
    asked: str,
    device: torch.device | str | None,
    decode_device: torch.device | str | None = None,
    opening: OpenOptions = NOTHING_SPECIAL,
) -> Backend:
    """Open the backend asked for, or with "auto" the one that fits, and log which and why.

    Raises:
        UnavailableError: it cannot be had here.
        LongtakeError: there is no such backend, or it does not fit the memory that is free.
    """
    if opening.gpus != 1:
        require_no_windows(opening.kept_windows, f"{opening.gpus} GPUs share the video")
        from longtake.runtime.parallel.choose import shared_backend

        held = source.recipe, source.engines, source.checkpoints, source.weights
        before = partial(_announce_ranks, source, opening)
        return shared_backend(*held, asked, device, decode_device, opening.gpus, before)
    if asked == ORACLE:
        from longtake.runtime.backends.torch_oracle import TorchBackend

        return TorchBackend(source.recipe, device=device_named(device or "cpu"), checkpoints=source.checkpoints)
    choice = choose_backend(source, asked)
    _require_device(choice.backend, device, "device (--device)")
    _require_device(choice.backend, decode_device, "decode_device (--decode-device)")
    log.info("backend: %s (%s)", choice.backend, choice.reason)
    if choice.backend == "reference" or source.engines is None:
        from longtake.runtime.backends.reference import ReferenceBackend

        if opening.kept_windows:
            require_no_windows(opening.kept_windows, f"backend {choice.backend}")
        reference = ReferenceBackend(
            source.onnx, source.recipe, choice.reason, None, source.checkpoints, opening.runs, source.export
        )
        reference.weights = source.weights
        return reference
    generate = torch.device(device or "cuda:0")
    decode = None if decode_device is None else torch.device(decode_device)
    kept, chosen = _announce_memory(source, opening, generate, decode)
    from longtake.runtime.backends.trt.open import backend_from_engines

    places: dict[str, Any] = {"device": generate, "decode_device": decode, "checkpoints": source.checkpoints}
    places |= {"kept_windows": kept} if kept else {}
    opened = backend_from_engines(choice.backend, source.engines, reason=choice.reason, **places)
    opened.weights = source.weights
    if chosen:
        opened.windows = {"layers": 0, "of": source.recipe.model.dit.layers, **opened.windows, "chosen": chosen}
        log.info("%(layers)s of %(of)s layers keep their window between passes, %(chosen)s", opened.windows)
    record_arenas(source.engines, opened)
    return opened


def _announce_memory(
    source: Source, opening: OpenOptions, device: torch.device, decode_device: torch.device | None
) -> tuple[int, str]:
    """Announce the memory budget, and raise LongtakeError if it is not free. How many layers keep their windows, and why."""
    recipe = source.recipe
    apart = decode_device is not None and (decode_device.index or 0) != (device.index or 0)
    use = replace(_use_of(source, opening), decode_apart=apart)
    kept, chosen = kept_windows(recipe, use, device, opening.kept_windows, opening.sessions)
    use = replace(use, kept_windows=kept)
    opening.announce(budget_of(recipe, use))
    if opening.check:
        check_memory(recipe, use, device, decode_device)
    return kept, chosen


def _announce_ranks(source: Source, opening: OpenOptions, devices: Sequence[str]) -> None:
    """The same of engines on several GPUs that share a video: what each of them must have free."""
    use = replace(_use_of(source, opening), ranks=len(devices))
    opening.announce(budget_of(source.recipe, use))
    if opening.check:
        check_ranks(source.recipe, use, devices)


def _use_of(source: Source, opening: OpenOptions) -> Use:
    sampling = source.sampling or source.recipe.model.sampling
    guided = sampling.guidance != 1.0 if opening.guided is None else opening.guided
    return Use(guided=guided, encode=opening.encode, engines=source.engines, recorded=source.memory)


def _require_device(backend: str, device: torch.device | str | None, option: str) -> None:
    """Raise LongtakeError for a device that is none, UnavailableError for one that `backend` cannot use here."""
    wanted = "cpu" if backend == "reference" else "cuda"
    asked = torch.device(wanted) if device is None else torch_device(device, option)
    if asked.type != wanted or (wanted == "cuda" and (asked.index or 0) >= torch.cuda.device_count()):
        what = f"backend {backend} cannot use device {device}"
        got, expected = f"{torch.cuda.device_count()} GPUs here", f"{wanted} for this backend"
        raise UnavailableError(what, got=got, expected=expected, fix=f"leave out {option}, or choose another --backend")


def choose_backend(source: Source, asked: str) -> Choice:
    """The backend for `source` on this machine: the capability table's answer, and whether plans are there."""
    machine = Machine(onnxruntime=has_module("onnxruntime")) if asked == "reference" else machine_here()
    choice = backend_for(machine, source.recipe, None if asked == "auto" else asked)
    if choice.backend == "reference" or source.engines is not None:
        return choice
    if asked != "auto":
        raise UnavailableError(
            f"backend {asked} has no plans for recipe {source.recipe.name}",
            got=f"only exported networks in {source.onnx}",
            fix=f"longtake engines --model {source.model or _default_name(source.recipe)} --recipe {source.recipe.name}",
        )
    return Choice("reference", f"ONNX Runtime on the CPU, because no plans are built for {source.recipe.name}")
