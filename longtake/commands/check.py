"""`longtake check`: is what was exported and built as accurate as the recipe's gate demands?"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import LAYERS_FIX, Row, require_gate, table
from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.formats.model_name import full_name, parts_of
from longtake.formats.recipe import Recipe, recipe_named
from longtake.options import Command, OneOf, option
from longtake.outputs import claim_outputs
from longtake.runtime.backends.base import Backend
from longtake.runtime.check.chunks import ChunkRow, check_chunks, chunk_table, require_chunks
from longtake.runtime.check.report import write_report
from longtake.runtime.check.runners import BackendRunner
from longtake.runtime.generator import Generator
from longtake.runtime.sources import BACKEND_NAMES, OpenOptions, Source, backend_from_source, source_from_name
from longtake.runtime.story import STORIES, story_file, story_from_script
from longtake.runtime.view import own_picture
from longtake.training.models.families import family_of
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import SamplingConfig

OUT = Path("runs") / "check"
STORY, WALK = STORIES / "demo.yaml", STORIES / "walk.yaml"  # WALK: of models with cameras, which have no cuts


@dataclass(frozen=True)
class CheckOptions:
    """What"""

    model: str | None = option(None, metavar="NAME[@RECIPE]")
    """a model by name (default: --engines)"""
    recipe: str | None = option(None, metavar="NAME")
    """a shipped recipe or a .yaml file (default: that of --model or --engines)"""
    engines: str | None = option(None, metavar="FOLDER")
    """engines or exported networks (default: the recipe's)"""
    checkpoints: Path | None = option(None, metavar="FOLDER")
    """what they were exported from (default: as the export says)"""
    backend: Annotated[str, OneOf(BACKEND_NAMES)] = option("auto")
    """auto: the one that fits"""
    layers: bool = option(False)
    """also compare every Linear, convolution and block"""
    story: Path | None = option(None, metavar="FILE")
    """compare chunks of this story, too (default: on a GPU the demo's, if prompts can be read; none on a CPU)"""
    chunks: int | None = option(None, metavar="N")
    """how many of them (default: the whole story)"""
    steps: int | None = option(None, metavar="N")
    """sampling steps of the story (default: those of the exported checkpoint, else the preset's)"""
    seed: int = option(0)
    """of the sample inputs and of the story's noise"""
    report: Path | None = option(None, metavar="FILE")
    """the report; its plot is beside (default: runs/check/RECIPE.json)"""


def run(options: CheckOptions) -> int:
    """Compare, print, write the report; a failed gate is raised last, as GateError."""
    recipe, source = recipe_and_source(options)
    models = models_of_export(recipe, Export.read(source.onnx), options.checkpoints or source.checkpoints)
    path = options.report or OUT / f"{recipe.name}.json"
    claim_outputs({"--report": path, "the plot beside --report": path.with_suffix(".png")}, {"--story": options.story})
    # asked of the reference backend only: networks have runners here
    opening = OpenOptions(runs=options.story is not None)
    with closing(backend_from_source(source, options.backend, None, opening=opening)) as backend:
        print(f"backend {backend.name}: {backend.reason}")
        rows = _network_rows(options, recipe, source, models, backend)
        print("\n".join(table(rows)))
        named = options.story and (story_file(str(options.story)) or options.story)
        story = named or usual_story(models, backend)
        sampling = sampling_of(source, story, options.steps)
        chunks, against = _chunk_rows(options, source, models, backend, story, sampling)
        if chunks:
            print(f"sampled with {sampling.steps} steps, guidance {sampling.guidance:g}, shift {sampling.shift:g}")
            print("\n".join(chunk_table(chunks, (backend.name, against))))
        backend.made_of = {"model": source.model, "export": vars(source.checked)}
        write_report(path, recipe, backend, rows, chunks, against, sampling)
    print(f"report {path}\nplot   {path.with_suffix('.png')}")
    fix = (
        "the first FAIL in the table above is where it begins; export again: longtake export --force"
        if options.layers
        else LAYERS_FIX
    )
    require_gate(rows, f"recipe {recipe.name}", fix)
    require_chunks(chunks, recipe)
    return 0


def recipe_and_source(options: CheckOptions) -> tuple[Recipe, Source]:
    """The recipe that was named, or else that of the folder; and its files. Raises LongtakeError if neither was given."""
    named = options.model or options.engines or options.recipe
    if named is None:
        raise LongtakeError(
            "longtake check lacks --model",
            expected="--model NAME[@RECIPE], --recipe NAME or --engines FOLDER",
            fix="pass --model tiny-4step",
        )
    recipe = None if options.recipe is None else recipe_named(options.recipe)
    if options.model and recipe is not None and parts_of(options.model)[1] is None:
        named = full_name(options.model, str(options.recipe))
    source = source_from_name(named)
    if recipe is not None:
        source.recipe.require_same(recipe, options.engines or source.onnx)
    return recipe or source.recipe, source


def models_of_export(recipe: Recipe, export: Export, checkpoints: Path | None) -> Models:
    """The torch models that were exported.

    Raises:
        LongtakeError: it is of another recipe, or was exported from other checkpoints.
    """
    if export.onnx_name != recipe.onnx_name:
        what, got = f"the export is not of recipe {recipe.name}", export.onnx_name
        expected, fix = recipe.onnx_name, f"longtake export --recipe {recipe.name}"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    models = load_models(recipe.model, checkpoints)
    if export.amax != models.amax:
        what, got = "the networks were exported from other checkpoints", f"amax of {checkpoints or 'the shipped ones'}"
        expected, fix = "the amax in export.json", "name the checkpoints that were exported with --checkpoints FOLDER"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return models


def _network_rows(options: CheckOptions, recipe: Recipe, source: Source, models: Models, backend: Backend) -> list[Row]:
    native = None if backend.name == "reference" else partial(BackendRunner, backend)
    rows = compare_networks(models, recipe, source.onnx, layers=options.layers, backend=native, seed=options.seed)
    return list(tqdm(rows, desc=f"{recipe.name}: networks", unit="tensor", leave=False, disable=None))


def sampling_of(source: Source, story: Path | None, steps: int | None) -> SamplingConfig:
    """How chunks are sampled: as asked, else as the story says, else the exported checkpoint (a student in few steps,
    without guidance), else the preset."""
    sampling = source.sampling or source.recipe.model.sampling
    if story is not None:
        told = story_from_script(story)
        sampling = sampling if told.steps is None else sampling.in_steps(told.steps)
        sampling = sampling if told.guidance is None else replace(sampling, guidance=told.guidance)
    return sampling if steps is None else sampling.in_steps(steps)


def _chunk_rows(
    options: CheckOptions, source: Source, models: Models, backend: Backend, story: Path | None, how: SamplingConfig
) -> tuple[list[ChunkRow], str]:
    """Chunks of a story, and what they were compared with: the reference, or PyTorch if `backend` is the reference."""
    if story is None:
        return [], ""
    recipe = source.recipe
    with closing(_other_backend(source, models, backend)) as other:
        ours, theirs = (Generator(b, models_tokenizer(models), sampling=how) for b in (backend, other))
        rows = check_chunks(
            ours, theirs, story, recipe.gate, options.chunks, options.seed, steps=how.steps, guidance=how.guidance
        )
        return list(tqdm(rows, desc=f"{recipe.name}: chunks", unit="chunk", leave=False, disable=None)), other.name


def _other_backend(source: Source, models: Models, backend: Backend) -> Backend:
    if backend.name != "reference":
        return backend_from_source(source, "reference", None)
    from longtake.runtime.backends.torch_oracle import TorchBackend

    return TorchBackend(source.recipe, models)


def usual_story(models: Models, backend: Backend) -> Path | None:
    """The story whose chunks are compared where none is named: on a GPU, if prompts can be read and a picture is there that
    a world starts from."""
    if backend.device.type != "cuda":
        return None
    world = "camera" in family_of(models.preset).can
    try:
        models_tokenizer(models)
        if world:
            own_picture(models.preset)
    except LongtakeError as error:
        print(f"networks only, no chunks of a story: {error.what}")
        return None
    return WALK if world else STORY


def models_tokenizer(models: Models) -> Any:
    """The tokenizer of `models`' text encoder."""
    return models.text.tokenizer


COMMAND = Command(
    run,
    (CheckOptions,),
    "Compare every network of a recipe with the PyTorch model of the same recipe; on a GPU also with "
    "TensorRT, and each chunk of a story with the reference backend. Exits with 5 if a gate fails.",
)
