"""`longtake check`: is what was exported and built as accurate as the recipe's gate demands?"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longtake.errors import LongtakeError
from longtake.formats.exported import Export
from longtake.formats.recipe import Recipe, recipe_named
from longtake.outputs import claim_outputs
from longtake.paths import REPOSITORY
from longtake.runtime.backends.base import Backend
from longtake.runtime.check.networks import ChunkRow, Row, check_chunks, check_networks, require_gates
from longtake.runtime.check.report import chunk_table, table, write_report
from longtake.runtime.generator import Generator
from longtake.runtime.sources import BACKEND_NAMES, OpenOptions, Source, backend_from_source, source_from_name
from longtake.runtime.story import story_from_script
from longtake.settings import settings_from_environment
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import SamplingConfig

OUT = Path("runs") / "check"
STORY = REPOSITORY / "docs" / "stories" / "demo.yaml"


def register(subparsers: Any) -> None:
    """Add the `check` command."""
    parser = subparsers.add_parser(
        "check",
        help="accuracy: PyTorch fake-quant <-> ONNX Runtime <-> TensorRT, against the recipe's gate",
        description="Compare every network of a recipe with the PyTorch model of the same recipe; on a GPU also with "
        "TensorRT, and each chunk of a story with the reference backend. Exits with 5 if a gate fails.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="a shipped recipe or a .yaml file")
    parser.add_argument("--engines", metavar="FOLDER", help="engines or exported networks (default: the recipe's)")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: those that were exported")
    parser.add_argument("--backend", default="auto", choices=BACKEND_NAMES, help="default: the one that fits")
    parser.add_argument("--layers", action="store_true", help="also compare every Linear, convolution and block")
    parser.add_argument("--story", type=Path, metavar="FILE",
                        help="compare chunks of this story, too (default: on a GPU the demo's, if prompts can be read; none on a CPU)")  # fmt: skip
    parser.add_argument("--chunks", type=int, metavar="N", help="how many of them (default: the whole story)")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="sampling steps of the story (default: those of the exported checkpoint, else the preset's)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="default: runs/check/RECIPE.json; the plot is beside"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print, write the report; a failed gate is raised last, as GateError."""
    recipe = recipe_named(args.recipe)
    source = source_from_name(args.engines or args.recipe)
    models = models_of_export(recipe, Export.read(source.onnx), args.checkpoints or source.checkpoints)
    path = args.report or OUT / f"{recipe.name}.json"
    claim_outputs({"--report": path, "the plot beside --report": path.with_suffix(".png")}, {"--story": args.story})
    # asked of the reference backend only: networks have runners here
    opening = OpenOptions(runs=args.story is not None)
    with closing(backend_from_source(source, args.backend, None, opening=opening)) as backend:
        print(f"backend {backend.name}: {backend.reason}")
        rows = _network_rows(args, recipe, source, models, backend)
        print("\n".join(table(rows)))
        story = args.story or usual_story(models, backend)
        sampling = sampling_of(source, story, args.steps)
        chunks, against = _chunk_rows(args, source, models, backend, story, sampling)
        if chunks:
            print(f"sampled with {sampling.steps} steps, guidance {sampling.guidance:g}, shift {sampling.shift:g}")
            print("\n".join(chunk_table(chunks, (backend.name, against))))
        write_report(path, recipe, backend, rows, chunks, against, sampling)
    print(f"report {path}\nplot   {path.with_suffix('.png')}")
    require_gates(rows, chunks, recipe)
    return 0


def models_of_export(recipe: Recipe, export: Export, checkpoints: Path | None) -> Models:
    """The torch models that were exported.

    Raises:
        LongtakeError: it is of another recipe, or was exported from other checkpoints.
    """
    if export.onnx_name != recipe.onnx_name:
        raise LongtakeError(f"the export is not of recipe {recipe.name}", got=export.onnx_name,
                            expected=recipe.onnx_name, fix=f"longtake export --recipe {recipe.name}")  # fmt: skip
    models = load_models(recipe.model, checkpoints)
    if export.amax != models.amax:
        raise LongtakeError(
            "the networks were exported from other checkpoints", got=f"amax of {checkpoints or 'the shipped ones'}",
            expected="the amax in export.json", fix="name the checkpoints that were exported with --checkpoints FOLDER",
        )  # fmt: skip
    return models


def _network_rows(
    args: argparse.Namespace, recipe: Recipe, source: Source, models: Models, backend: Backend
) -> list[Row]:
    native = None if backend.name == "reference" else backend
    threads = settings_from_environment().threads
    rows = check_networks(
        models, recipe, source.onnx, threads=threads, layers=args.layers, backend=native, seed=args.seed
    )
    return list(tqdm(rows, desc=f"{recipe.name}: networks", unit="tensor", leave=False, disable=None))


def sampling_of(source: Source, story: Path | None, steps: int | None) -> SamplingConfig:
    """How chunks are sampled: as asked, else as the story says, else the exported checkpoint (a student in few steps,
    without guidance), else the preset."""
    sampling = source.sampling or source.recipe.model.sampling
    if story is not None:
        told = story_from_script(story)
        given = {name: value for name in ("steps", "guidance") if (value := getattr(told, name)) is not None}
        sampling = replace(sampling, **given)
    return sampling if steps is None else replace(sampling, steps=steps)


def _chunk_rows(
    args: argparse.Namespace, source: Source, models: Models, backend: Backend, story: Path | None, how: SamplingConfig
) -> tuple[list[ChunkRow], str]:
    """Chunks of a story, and what they were compared with: the reference, or PyTorch if `backend` is the reference."""
    if story is None:
        return [], ""
    recipe = source.recipe
    with closing(_other_backend(source, models, backend)) as other:
        ours, theirs = (Generator(b, models_tokenizer(models), sampling=how) for b in (backend, other))
        rows = check_chunks(
            ours, theirs, story, recipe.gate, args.chunks, args.seed, steps=how.steps, guidance=how.guidance
        )
        return list(tqdm(rows, desc=f"{recipe.name}: chunks", unit="chunk", leave=False, disable=None)), other.name


def _other_backend(source: Source, models: Models, backend: Backend) -> Backend:
    if backend.name != "reference":
        return backend_from_source(source, "reference", None)
    from longtake.runtime.backends.torch_oracle import TorchBackend

    return TorchBackend(source.recipe, models)


def usual_story(models: Models, backend: Backend) -> Path | None:
    """The story whose chunks are compared where none is named: on a GPU, if prompts can be read."""
    if backend.device.type != "cuda":
        return None
    try:
        models_tokenizer(models)
    except LongtakeError as error:
        print(f"networks only, no chunks of a story: {error.what}")
        return None
    return STORY


def models_tokenizer(models: Models) -> Any:
    """The tokenizer of `models`' text encoder."""
    return models.text.tokenizer
