"""What needs several stages at once: a checkpoint's export with its check, and the engines of an export.

`say` takes lines for people; commands print them, Python logs them.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import LAYERS_FIX, require_gate, table, worst_of_kinds
from longtake.engines.build import PlanResult, build_recipe
from longtake.errors import GateError, LongtakeError
from longtake.export.package import PlainGraphs, export_package, inputs_digest, steps_of
from longtake.export.ranks import add_rank_graphs, rank_graphs
from longtake.export.weights import weights_from_folder
from longtake.formats.bundle import Bundle
from longtake.formats.exported import FAILED, PASSED, UNCHECKED, UNFINISHED, Checked, Export
from longtake.formats.recipe import Recipe
from longtake.leftovers import locked
from longtake.machine.flavour import Flavour
from longtake.paths import REPOSITORY
from longtake.runtime.budget.terms import terms_of
from longtake.runtime.parallel.open import require_cut, require_split
from longtake.training.models.checkpoint import weights_digests
from longtake.training.models.load import load_models, read_side
from longtake.training.models.network_spec import rank_network, ranks_of
from longtake.training.models.presets import Preset
from longtake.training.models.quantize import modelopt
from longtake.training.models.text.sentencepiece import carry_tokenizer

log = logging.getLogger(__name__)

Graphs = dict[tuple[Preset, tuple[str, ...]], PlainGraphs]
Say = Callable[[str], None]


@dataclass(frozen=True)
class HowToExport:
    """force: even if nothing has changed. parity: compare with PyTorch. skeleton: graphs only; checkpoints are not read.

    graphs: by preset and vocabulary, lets several exports share what is the same for all recipes. model: its name.
    """

    force: bool = False
    parity: bool = True
    skeleton: bool = False
    model: str = ""
    say: Say = log.info
    graphs: Graphs = field(default_factory=dict)

    @property
    def unchecked(self) -> Checked:
        """What is recorded before, or without, a comparison."""
        if self.skeleton:
            return Checked(UNCHECKED, "--skeleton: it has no weights to compare")
        return UNFINISHED if self.parity else Checked(UNCHECKED, "--no-parity")


def export(recipe: Recipe, checkpoints: Path | None, folder: Path, how: HowToExport) -> Export:
    """Export one recipe unless `folder` is up to date; returns what lies there.

    Raises:
        GateError: it was compared with PyTorch and differs; the files stay, marked as failed.
    """
    kept = folder.is_dir() and not os.access(folder, os.W_OK)  # another user's: what is whole there is found
    with locked(folder, reads=kept):
        return _export(recipe, checkpoints, folder, how, kept)


def _export(recipe: Recipe, checkpoints: Path | None, folder: Path, how: HowToExport, kept: bool = False) -> Export:
    source = checkpoints if checkpoints is not None else REPOSITORY / recipe.model.checkpoints
    if recipe.model.text.kind != "words" and not how.skeleton:
        carry_tokenizer(source, folder)
    if how.parity and not how.skeleton and recipe.precision in ("nvfp4", "fp8"):
        modelopt()  # the comparison needs it: what is missing is said before the work
    inputs = inputs_digest(recipe, None if how.skeleton else source)
    package = None if how.force else up_to_date(folder, inputs)
    if package is not None and (package.recipe != recipe.whole or package.model != how.model):
        package = replace(package, recipe=recipe.whole, model=how.model)
        package.write(folder)
    if package is not None and (package.checked.state == PASSED or not how.parity or _too_large(package)):
        how.say(
            f"{folder.name}: up to date, {_told(package.checked)} (checkpoints and code unchanged; --force exports again)"
        )
        return package
    if package is None and kept:  # before the work, not after it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if package is None:
        package = _exported(recipe, source, folder, inputs, how)
    return check_parity(recipe, source, folder, package, how.say) if how.parity and not how.skeleton else package


def _told(checked: Checked) -> str:
    return checked.state + (f": {checked.why}" if checked.why else "")


def _too_large(export: Export) -> bool:
    return export.checked.state == UNCHECKED and bool(export.parity)


def _exported(recipe: Recipe, source: Path, folder: Path, inputs: str, how: HowToExport) -> Export:
    weights = None if how.skeleton else weights_from_folder(recipe.model, source)
    key = recipe.model, weights.vocabulary if weights else ()
    if key not in how.graphs:
        how.graphs[key] = PlainGraphs(recipe.model, key[1] or None)
    how.say(f"{folder.name}: exporting the networks, PyTorch to ONNX")
    with tqdm(total=steps_of(recipe.model), desc=recipe.onnx_name, unit="step", leave=False, disable=None) as bar:

        def advance(words: str) -> None:
            bar.set_postfix_str(words)
            bar.update()

        package = export_package(how.graphs[key], recipe, folder, inputs, advance, weights, how.unchecked)
    package = replace(package, model=how.model)
    if not how.skeleton:  # where what is not exported is found at run time
        sampling = read_side(source / "dit.safetensors", "dit", recipe.model).sampling
        held = weights_digests(source)
        package = replace(package, checkpoints=str(source.resolve()), sampling=sampling, weights=held)
    package.write(folder)
    return package


def check_parity(recipe: Recipe, checkpoints: Path, folder: Path, export: Export, say: Say = log.info) -> Export:
    """The export with its parity table and state, written; the table is said.

    Networks too large for ONNX Runtime's one message have no view and are left out: then it stays unchecked, and says so.

    Raises:
        GateError: a row fails. Whatever ends the comparison early leaves the export marked as failed.
    """
    whole = [name for name, network in export.networks.items() if f"{name}.ort.onnx" in network.files]
    left = [name for name in export.networks if name not in whole and ranks_of(name) == 1]  # a rank alone runs nowhere
    replace(export, checked=UNFINISHED).write(folder)
    rows = []
    if whole:
        models = load_models(recipe.model, checkpoints)
        pairs = compare_networks(models, recipe, folder, networks=whole)
        rows = list(tqdm(pairs, desc=f"{folder.name}: parity", unit="row", leave=False, disable=None))
        say("\n".join(["parity, PyTorch <-> ONNX Runtime:", *table(rows)]))
    export = replace(export, parity=tuple(row.as_json() for row in worst_of_kinds(rows)))
    try:
        require_gate(rows, recipe.onnx_name, f"{LAYERS_FIX} --engines {folder}")
    except GateError as error:
        replace(export, checked=Checked(FAILED, f"{error.got}, {error.expected}")).write(folder)
        raise
    checked = Checked(PASSED, "")
    if left:
        checked = Checked(UNCHECKED, f"too large for ONNX Runtime on a CPU: {', '.join(left)}")
        say(f"{folder.name}: {checked.why}; a preset of the same widths and fewer layers can be compared")
    export = replace(export, checked=checked)
    export.write(folder)
    return export


def up_to_date(folder: Path, inputs: str) -> Export | None:
    """A whole package made from the same inputs, else None."""
    try:
        export = Export.read(folder)
    except LongtakeError:
        return None
    return export if export.inputs == inputs else None


def add_ranks(recipe: Recipe, onnx: Path, gpus: int, say: Say = log.info) -> None:
    """Add to an export the graphs of one of `gpus` ranks, unless it has them; the next `build` makes its plans.

    Raises:
        UnavailableError: the recipe's engines cannot be ranks.
        LongtakeError: as many cannot share the model.
    """
    require_split(recipe.model, gpus)
    require_cut(recipe, gpus)
    with locked(onnx):
        export = Export.read(onnx)
        export.require_recipe(recipe, onnx, weights=False)
        if not {rank_network(gpus, name) for name in rank_graphs(recipe, gpus)} <= export.networks.keys():
            say(f"  {onnx.parent.name}: the graphs of one of {gpus} ranks, PyTorch to ONNX")
            add_rank_graphs(PlainGraphs(recipe.model, export.vocabulary or None), recipe, onnx, export, gpus)


def build(
    recipe: Recipe,
    onnx: Path,
    out: Path,
    flavour: Flavour,
    machine: str | None,
    force: bool = False,
    say: Say = log.info,
) -> list[PlanResult]:
    """Build an export's plans, those of ranks that it has the graphs of among them, and describe the folder in bundle.json.

    Raises:
        IntegrityError: an exported file is not what was exported; no plan is built from it.
        GateError: the export failed its comparison with PyTorch, and `force` isn't given.
    """
    with locked(out), nullcontext() if out.resolve() == onnx.resolve() else locked(onnx, reads=True):
        export = Export.read(onnx)
        if line := export.checked.require(onnx, force):
            say(f"  {line}")
        export.require_recipe(recipe, onnx, weights=recipe.mode == "fused")
        ranks = [name for name in export.networks if ranks_of(name) > 1]
        results = build_recipe(recipe, onnx, out, flavour, machine, sys.stderr.isatty(), ranks)
        bundle = Bundle.of(out, recipe, flavour, onnx, [result.path for result in results])
        replace(bundle, memory=terms_of(recipe, out)).write()
        return results
