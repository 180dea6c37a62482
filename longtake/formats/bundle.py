"""`bundle.json`: what a folder of plans belongs to, so that a generator can be opened from the folder alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, sha256, write_json
from longtake.formats.exported import Export
from longtake.formats.recipe import Gate, Recipe
from longtake.machine.flavour import Flavour

FORMAT = 1
NAME = "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """A folder of plans, opened.

    folder: where the plans are. onnx: the folder they were built from. files: digests of the plans and segment
    descriptions. onnx_files: digests of the exported files. vocabulary: the text encoder's words, in token order
    (none where the folder of exported files carries a tokenizer).
    export_inputs: digest of the checkpoints and the code that the export was made from.
    """

    folder: Path
    recipe: Recipe
    flavour: str
    version: str
    onnx: Path
    files: dict[str, str]
    onnx_files: dict[str, str]
    vocabulary: tuple[str, ...]
    export_inputs: str = ""

    @property
    def fix(self) -> str:
        return f"build it again: longtake engines --recipe {self.recipe.name}"

    def check_file(self, path: Path) -> Path:
        """`path`, once its digest is the recorded one.

        Raises:
            IntegrityError: it is missing, altered, or not part of the bundle.
        """
        recorded = self.files if path.parent == self.folder else self.onnx_files
        return _checked(path, recorded.get(path.name), self.fix)

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
        raise IntegrityError(
            f"{path} is not the file that the engines were built with",
            got=got,
            expected=f"sha256 {expected}" if expected else "a file listed in bundle.json",
            fix=fix,
        )
    return path


def write_bundle(folder: Path, recipe: Recipe, flavour: Flavour, onnx: Path, plans: Sequence[Path]) -> Path:
    """Describe the plans in `folder`, built from the export in `onnx`."""
    export = Export.find(onnx)
    own = [*plans, *folder.glob("*.segments.json")]
    sources = sorted(path for pattern in ("*.onnx", "*.onnx.data") for path in onnx.glob(pattern))
    write_json(
        folder / NAME,
        {
            "format": FORMAT,
            "recipe": recipe.name,
            "recipe_fields": asdict(recipe),
            "flavour": flavour.name,
            "version": flavour.version,
            "onnx": os.path.relpath(onnx.resolve(), folder.resolve()),
            "files": {path.name: sha256(path) for path in sorted(own)},
            "onnx_files": {path.name: sha256(path) for path in sources},
            "vocabulary": list(export.vocabulary if export else _shipped_vocabulary()),
            "export_inputs": export.inputs if export else "",
        },
    )
    return folder / NAME


def _shipped_vocabulary() -> tuple[str, ...]:
    from longtake.training.models.text.words import default_vocabulary

    return default_vocabulary()


def load_bundle(folder: Path | str) -> Bundle:
    """Read `bundle.json`. Files are checked when they are opened (`check_file`, `onnx_file`, manifests of plans).

    Raises:
        LongtakeError: the folder holds no bundle.
        IntegrityError: the file is not one.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise LongtakeError(
            f"{folder} holds no engines", got=f"no {NAME}", expected="a folder written by `longtake engines`",
            fix="longtake engines --recipe NAME",
        )  # fmt: skip
    given = read_json(path)
    try:
        if given["format"] != FORMAT:
            raise IntegrityError(f"{path} has another format", got=given["format"], expected=FORMAT,
                                 fix="build the engines again")  # fmt: skip
        fields = given["recipe_fields"]
        recipe = Recipe(**{**fields, "gate": Gate(**fields["gate"])})
        return Bundle(
            folder, recipe, given["flavour"], given["version"], (folder / given["onnx"]).resolve(),
            dict(given["files"]), dict(given["onnx_files"]), tuple(given["vocabulary"]), given["export_inputs"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path} is not an engine bundle", got=f"{type(error).__name__}: {error}",
            expected="what `longtake engines` writes", fix="build the engines again",
        ) from None  # fmt: skip
