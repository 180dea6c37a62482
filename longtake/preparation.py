"""What a model's name stands for, and making what is missing of it: its checkpoint in our form, its export, its engines."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longtake.engines.build import require_buildable
from longtake.errors import GateError, LongtakeError, UnavailableError
from longtake.export.lower import CALIBRATED
from longtake.files import read_json, sha256, write_json
from longtake.formats.exported import FAILED, Export
from longtake.formats.model_name import HUB_ID, Model, asked_for, claimed, home, hub_error, model_in, parts_of
from longtake.formats.recipe import Recipe, recipe_for, recipe_named, recipe_names
from longtake.leftovers import locked
from longtake.machine.flavour import flavour_for
from longtake.machine.machine import machine_here
from longtake.settings import hub_cache
from longtake.training.convert.files import read_container
from longtake.training.convert.models import convert_dit, convert_text, convert_vae
from longtake.training.models.families import preset_named
from longtake.training.models.presets import PRESETS, Preset
from longtake.training.models.side_file import SideFile
from longtake.training.models.text.sentencepiece import carry_tokenizer

log = logging.getLogger(__name__)

DIFFUSERS = "model_index.json"
SOURCE = "source.json"  # beside a converted checkpoint: what it was made of
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def model_and_recipe(name_or_folder: str | Path, recipe: str | None = None) -> tuple[Model, Recipe | None]:
    """The model, its checkpoints in our form, and the recipe if one was named."""
    text = str(name_or_folder)
    name, of_name = parts_of(text)
    if of_name is not None and recipe is not None and recipe != of_name:
        raise LongtakeError("two recipes are named", got=f"{of_name} and {recipe}", expected="one", fix="leave one out")
    chosen = recipe or of_name or None
    folder = Path(name)
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        folder = _in_hub_cache(name)
    if (folder / DIFFUSERS).is_file() or (folder / "transformer").is_dir():
        short = name.split("/")[-1] if HUB_ID.fullmatch(name) else folder.resolve().name
        return _converted(folder, short), recipe_named(chosen) if chosen else None
    if folder.is_dir() and not (folder / "dit.safetensors").is_file() and name not in ("tiny", "tiny-4step"):
        what, got = f"{folder} holds no model", "neither dit.safetensors nor model_index.json"
        expected = "a checkpoint folder of longtake's, or of diffusers' save_pretrained"
        raise LongtakeError(what, got=got, expected=expected, fix="pass the folder that has one of them")
    asked = asked_for(f"{name}@{chosen}" if chosen else name)
    if asked.model is None:
        what, got = "this names a recipe, not a model", repr(text)
        expected, fix = "a model's name or folder", f"pass 'tiny-4step@{text}'"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return asked.model, asked.recipe


def best_recipe(model: Model, on_cpu: bool = False) -> Recipe:
    """The recipe for this machine, of those that the model is calibrated for; says it where that isn't the first choice."""
    machine = None if on_cpu else machine_here().compute_capability
    first = recipe_named(recipe_for(machine, model.preset))
    side = SideFile.read(model.checkpoints / "dit.json")
    if not CALIBRATED.get(first.precision) or side.amax:
        return first
    others = [r for r in map(recipe_named, recipe_names(model.preset)) if not CALIBRATED.get(r.precision)]
    fitting = [r for r in others if r.compute_capability == machine] or others
    if not fitting:
        return first
    said = "%s is not calibrated for %s; taking %s (longtake convert --calibrate measures what is missing)"
    log.warning(said, model.name, first.name, fitting[0].name)
    return fitting[0]


def prepared(model: Model, recipe: Recipe, on_cpu: bool = False, force: bool = False) -> Path:
    """The folder to open: engines where this machine runs them, else the export. Made under a lock if missing.

    Raises:
        LongtakeError: it is missing and cannot be made, for one because the place is not ours to write to.
    """
    folder = model.folder(recipe)
    flavour = None if on_cpu else _native(recipe)
    target = folder / ("onnx" if flavour is None else "engines")
    if _is_current(target, model):
        return target
    try:
        _make(model, recipe, folder, flavour, force)
    except OSError as error:
        place = Path(error.filename or folder)
        ours = home() in (place, *place.parents) or place in home().parents
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not ours:
            raise
        what, expected = f"{model.name} is not prepared, and cannot be", "a folder that can be written to"
        fix = "set LONGTAKE_HOME to a folder of yours"
        raise LongtakeError(what, got=place, expected=expected, fix=fix) from None
    return target


def _make(model: Model, recipe: Recipe, folder: Path, flavour: Any, force: bool) -> None:
    target = folder / ("onnx" if flavour is None else "engines")
    with claimed(model), locked(folder):  # in the order of `longtake export`
        if _is_current(target, model):  # another process made it meanwhile
            return
        from longtake.chain import HowToExport, build, export  # it loads for a second: not for what is there already

        say = _say if sys.stderr.isatty() else log.warning  # which scripts show, too: what follows takes minutes
        say(f"preparing {model.name} for {recipe.name} in {folder}: minutes, once; then it is found there")
        if not _is_current(folder / "onnx", model):
            try:
                export(recipe, model.checkpoints, folder / "onnx", HowToExport(model=model.name, say=log.info))
            except GateError as error:
                if not force:
                    raise
                log.warning("%s", error)
        if flavour is not None:
            build(recipe, folder / "onnx", folder / "engines", flavour, machine_here().compute_capability, force)


def _native(recipe: Recipe) -> Any:
    """The TensorRT flavour that builds and runs `recipe` here, or None."""
    machine = machine_here()
    if machine.compute_capability != recipe.compute_capability:
        return None
    flavour = flavour_for(machine.compute_capability)
    try:
        require_buildable(recipe, flavour, machine.compute_capability)
    except UnavailableError as error:
        log.warning("no engines for %s here: %s", recipe.name, error.what)
        return None
    return flavour


def _is_current(folder: Path, model: Model) -> bool:
    """Whether a folder holds an export, or engines, of these weights."""
    if folder.name == "engines":
        return (folder / "bundle.json").is_file() and _is_current(folder.parent / "onnx", model)
    try:
        export = Export.find(folder)
    except LongtakeError:  # damaged, or of a version before: made anew
        return False
    return export is not None and export.weights == model.weights and export.checked.state != FAILED


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _in_hub_cache(name: str) -> Path:
    """The newest snapshot of a hub's model in the local cache. Raises LongtakeError, with how to download, if there is none."""
    root = hub_cache() / f"models--{name.replace('/', '--')}"
    snapshots = sorted((root / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    if not snapshots:
        raise hub_error(name)
    return snapshots[-1]


def _converted(folder: Path, name: str) -> Model:
    """A folder of diffusers' as a checkpoint folder of ours, made once below LONGTAKE_HOME."""
    out = home() / name / "checkpoints"
    if not _converted_from(folder, out):
        with locked(out):
            if not _converted_from(folder, out):  # nor did another process meanwhile
                log.warning("converting %s into %s", folder, out)
                _convert(folder, out)
    return model_in(out, name)


def _convert(folder: Path, out: Path) -> None:
    preset, dtype = _preset_of(folder), torch.bfloat16
    for kind, make in (("vae", convert_vae), ("text_encoder", convert_text)):
        if (folder / kind).is_dir():
            made = make(read_container(folder, kind), preset, dtype=dtype)
            made.write(out / f"{kind}.safetensors", lambda done: None)
    if preset.text.kind == "umt5":
        carry_tokenizer(folder, out)
    convert_dit(read_container(folder, "dit"), preset, dtype=dtype).write(out / "dit.safetensors", lambda done: None)
    stamps = _stamps(folder)
    digests = {name: sha256(folder / name) for name in stamps}
    write_json(out / SOURCE, {"folder": str(folder.resolve()), "stamps": stamps, "digests": digests})


def _converted_from(folder: Path, out: Path) -> bool:
    """Whether `out` was made of these files. Files that look untouched are not read again.

    Raises:
        LongtakeError: it was made of other ones.
    """
    if not (out / SOURCE).is_file():
        return False
    kept, stamps = read_json(out / SOURCE), _stamps(folder)
    if kept["stamps"] == stamps:
        return True
    if kept["digests"] != {name: sha256(folder / name) for name in stamps}:
        what, got = f"two different models are called {out.parent.name}", f"{folder}, whose files differ"
        expected = f"what {out} was converted from, {kept['folder']}"
        fix = f"rename one of the folders, or delete {out.parent}"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    write_json(out / SOURCE, {**kept, "stamps": stamps})  # the same files, copied or moved
    return True


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each weights file below a folder of diffusers'."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in WEIGHTS and path.is_file()]
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _preset_of(folder: Path) -> Preset:
    """The preset whose sizes a diffusers transformer has."""
    told = read_json(folder / "transformer" / "config.json")
    keys = {"layers": "num_layers", "heads": "num_attention_heads", "ffn_dim": "ffn_dim", "channels": "in_channels"}
    sizes = {ours: told.get(theirs) for ours, theirs in keys.items()}
    for name in PRESETS:
        dit = preset_named(name).dit
        if all(getattr(dit, key) == value for key, value in sizes.items()):
            return preset_named(name)
    what, expected = f"no preset fits the transformer in {folder}", " | ".join(PRESETS)
    fix = "write a preset (docs/add-a-recipe.md) and convert it: longtake convert --preset FILE"
    raise LongtakeError(what, got=str(sizes), expected=expected, fix=fix)
