"""`bundle.json`: what a folder of plans belongs to, so that a generator can be opened from the folder alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from longtake.errors import IntegrityError, LongtakeError, UnavailableError
from longtake.files import sha256
from longtake.formats.exported import UNRECORDED, Checked, Export
from longtake.formats.memory import RecordedTerm
from longtake.formats.plan import manifest_path
from longtake.formats.recipe import Recipe
from longtake.machine.flavour import Flavour
from longtake.provenance import versions
from longtake.record import Kind
from longtake.version import __version__

PACKAGES = ("tensorrt", "tensorrt-rtx-cu13", "cuda-core", "onnx")
NAME = "bundle.json"
KIND = Kind(
    "an engine bundle",
    "`longtake engines`",
    "build it again: longtake engines --recipe NAME",
    format=2,
    oldest=2,
    sealed=True,
)


@dataclass(frozen=True)
class Bundle:
    """A folder of plans, opened.

    onnx: the folder that the plans were built from. files: digests of the plans, their manifests and segment
    descriptions. onnx_files: digests of the exported files. vocabulary: the text encoder's words, in token order
    (none where the folder of exported files carries a tokenizer).
    export_inputs: digest of the checkpoints and the code that the export was made from. weights: see
    `Export.weights_known`. folder: where the plans are.
    checked, model: of that export. memory: what they take on a GPU, in any use; () where it is to be computed.
    versions: of longtake and of the packages that the plans depend on.
    """

    recipe: Recipe
    flavour: str
    version: str
    onnx: Path
    files: dict[str, str]
    onnx_files: dict[str, str]
    vocabulary: tuple[str, ...]
    export_inputs: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    memory: tuple[RecordedTerm, ...] = ()
    checked: Checked = UNRECORDED
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, recipe: Recipe, flavour: Flavour, onnx: Path, plans: Sequence[Path]) -> Bundle:
        """Of the plans in `folder`, built from the export in `onnx`."""
        export = Export.find(onnx)
        described = [manifest for plan in plans if (manifest := manifest_path(plan)).is_file()]
        sources = sorted(path for pattern in ("*.onnx", "*.onnx.data") for path in onnx.glob(pattern))
        return cls(
            recipe,
            flavour.name,
            flavour.version,
            onnx.resolve(),
            {path.name: sha256(path) for path in sorted([*plans, *described, *folder.glob("*.segments.json")])},
            {path.name: sha256(path) for path in sources},
            export.vocabulary if export else _shipped_vocabulary(),
            export.inputs if export else "",
            export.weights_known if export else {},
            folder,
            checked=export.checked if export else UNRECORDED,
            model=export.model if export else "",
            versions=versions(PACKAGES),
        )

    def write(self) -> Path:
        """Write it into its folder, atomically."""
        told = {key: value for key, value in vars(self).items() if key != "folder"}
        onnx = os.path.relpath(self.onnx, self.folder.resolve())
        told |= {"recipe": self.recipe.name, "recipe_fields": asdict(self.recipe.whole), "onnx": onnx}
        told |= {"memory": [asdict(term) for term in self.memory], "checked": asdict(self.checked)}
        KIND.write(told, self.folder / NAME)
        return self.folder / NAME

    @classmethod
    def read(cls, folder: Path | str) -> Bundle:
        """The bundle in `folder`. Files are checked when they are opened (`check_file`, `onnx_file`, manifests of plans).

        Raises:
            LongtakeError: the folder holds no bundle.
            IntegrityError: the file is not one, or of another format.
        """
        folder = Path(folder)
        path = folder / NAME
        if not path.is_file():
            what, expected = f"{folder} holds no engines", "a folder written by `longtake engines`"
            raise LongtakeError(what, got=f"no {NAME}", expected=expected, fix="longtake engines --recipe NAME")
        told = KIND.content(path)
        told = {**told, "recipe": told.get("recipe_fields"), "folder": str(folder)}  # "recipe" is its name, for people
        bundle = KIND.record(cls, told, path)
        try:
            onnx = (folder / bundle.onnx).resolve()
        except (RuntimeError, ValueError, OSError) as error:  # a link to itself, a name that can be none
            raise KIND.broken(path, f"onnx: {error!s:.200}") from None
        return replace(bundle, recipe=bundle.recipe.read, onnx=onnx)

    @property
    def fix(self) -> str:
        return f"build it again: longtake engines --recipe {self.recipe.name}"

    def require_flavour(self, flavour: Flavour, folder: Path) -> None:
        """Raise UnavailableError, with the command that builds them anew, for plans that this flavour or this version
        of longtake does not run."""
        for what, built, here in (
            ("by another TensorRT", f"{self.flavour} {self.version}", flavour.label),
            ("by another version of longtake", self.versions.get("longtake", "none recorded"), __version__),
        ):
            if built != here:
                raise UnavailableError(
                    f"the engines in {folder} were built {what}", got=built, expected=here, fix=self.fix
                )

    def check_plan(self, plan: Path, sha256_of_plan: str) -> None:
        """Raise IntegrityError unless a plan that fits its manifest, and this manifest, are those of this build.

        sha256_of_plan: as the manifest tells it.
        """
        if self.files.get(plan.name) != sha256_of_plan:
            raise IntegrityError(
                f"{plan} is of another build than the rest of its folder",
                got=f"sha256 {sha256_of_plan}",
                expected=f"sha256 {self.files.get(plan.name, 'none')}, as {NAME} says",
                fix=self.fix,
            )
        self.check_file(manifest_path(plan))

    def check_file(self, path: Path) -> Path:
        """`path`, once its digest is the recorded one.

        Raises:
            IntegrityError: it is missing, altered, or not part of the bundle.
        """
        recorded = self.files if path.parent == self.folder else self.onnx_files
        return _checked(path, recorded.get(path.name), self.fix)

    def require_export(self, export: Export | None) -> None:
        """Raise IntegrityError if `export`, which lies where that of the plans lay, is another one; None is none."""
        if export is None:
            return
        now, own = export.digests, self.onnx_files
        changed = sorted(name for name in now.keys() & own.keys() if now[name] != own[name])
        if changed or (not own and self.export_inputs and self.export_inputs != export.inputs):
            raise IntegrityError(
                f"the engines in {self.folder} were built from another export than the one in {self.onnx}",
                got=", ".join(changed) + " changed since" if changed else f"inputs {export.inputs[:12]}…",
                expected="the exported files that the engines were built from",
                fix=f"longtake engines --recipe {self.recipe.name} --onnx {self.onnx.parent} --out {self.folder.parent}",
            )

    def onnx_file(self, name: str) -> Path:
        """An exported file, once its digest and that of its external data are the recorded ones."""
        path = self.onnx / name
        data = f"{name}.data"
        if data in self.onnx_files:
            self.check_file(self.onnx / data)
        return self.check_file(path)


def _checked(path: Path, expected: str | None, fix: str) -> Path:
    got = sha256(path) if path.is_file() else "no such file"
    if got != expected:
        what, wanted = f"{path} is not the file that the engines were built with", f"sha256 {expected}"
        raise IntegrityError(what, got=got, expected=wanted if expected else "a file listed in bundle.json", fix=fix)
    return path


def _shipped_vocabulary() -> tuple[str, ...]:
    from longtake.training.models.text.words import default_vocabulary

    return default_vocabulary()
