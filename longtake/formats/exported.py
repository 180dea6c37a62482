"""`export.json`: what `longtake export` leaves in a folder, with the digest of every file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from longtake.errors import GateError, IntegrityError, LongtakeError
from longtake.files import sha256
from longtake.formats.recipe import LINEARS, Recipe
from longtake.plugins.spec import PLUGIN_VERSION
from longtake.record import Kind
from longtake.training.models.families import family_of
from longtake.training.models.presets import SamplingConfig
from longtake.version import __version__

NAME = "export.json"
KIND = Kind(
    "an export description", "`longtake export`", "run `longtake export --force`", format=2, oldest=2, sealed=True
)


@dataclass(frozen=True)
class ExportedFile:
    """Digest and size in bytes of a file."""

    sha256: str
    bytes: int = 0


@dataclass(frozen=True)
class ExportedNetwork:
    """One network. files: by name, graph, weights and view. spec: its bindings, as NetworkSpec.as_json. linears: those
    that were quantized."""

    files: dict[str, ExportedFile]
    spec: dict[str, Any] = field(default_factory=dict)
    linears: tuple[str, ...] = ()


State = Literal["passed", "unchecked", "failed"]
PASSED: Final = "passed"
UNCHECKED: Final = "unchecked"
FAILED: Final = "failed"


@dataclass(frozen=True)
class Checked:
    """Whether exported networks were compared with PyTorch. why: in words, what is missing or wrong; "" if passed."""

    state: State = FAILED
    why: str = "no comparison with PyTorch is recorded"

    def require(self, folder: Path, force: bool) -> str | None:
        """A line to say where the export in `folder` is taken without having passed; None where it has.

        Raises:
            GateError: it failed, and `force` isn't given.
        """
        if self.state == PASSED:
            return None
        if self.state == FAILED and not force:
            raise GateError(
                f"the export in {folder} is not known to compute what its checkpoint does",
                got=f"failed: {self.why}",
                expected="an export that passed its comparison with PyTorch",
                fix="export it again: longtake export --force; --force (in Python force=True) takes it all the same",
            )
        return f"export {folder}: {self.state} ({self.why})" + (", taken by --force" if self.state == FAILED else "")


UNRECORDED = Checked()
UNFINISHED = Checked(FAILED, "the comparison with PyTorch did not end")


@dataclass(frozen=True)
class Export:
    """A folder of exported networks.

    inputs: digest of the checkpoints and the code it was made from. skeleton: graphs without weights.
    amax, vocabulary, sampling: of the checkpoints; sampling is how a DiT is sampled, if that is recorded.
    checkpoints: the folder they were in. weights: digests of its DiT and VAE; earlier versions told none. parity: rows of
    the comparison with PyTorch; empty where none was made. checked: how that ended. model: its name. recipe: that it was
    exported for last, with its preset; others share its files; earlier versions told none. vae_conv: the codes of the VAE
    decoder's convolutions that run in 8 bits.
    """

    onnx_name: str
    preset: str
    precision: str
    cache: str
    networks: dict[str, ExportedNetwork]
    vocabulary: tuple[str, ...]
    linears: str = LINEARS[0]
    opset: int = 0
    plugin_version: str = ""
    inputs: str = ""
    skeleton: bool = False
    amax: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    parity: tuple[dict[str, Any], ...] = ()
    checkpoints: str | None = None
    sampling: dict[str, Any] | None = None
    recipe: Recipe | None = None
    weights: dict[str, str] = field(default_factory=dict)
    checked: Checked = UNRECORDED
    model: str = ""
    vae_conv: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SamplingConfig.told(self.sampling)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether `folder` holds an export."""
        return (folder / NAME).is_file()

    @classmethod
    def find(cls, folder: Path) -> Export | None:
        """The export in `folder`, whose files are not looked at; None if there is none."""
        return cls.read(folder, digests=False) if cls.is_in(folder) else None

    @classmethod
    def read(cls, folder: Path, digests: bool = True) -> Export:
        """The export in `folder`, and unless `digests` is False every file of it, checked.

        Raises:
            LongtakeError: there is none.
            IntegrityError: it is damaged, or a file is missing or differs from what was exported.
        """
        path = folder / NAME
        if not cls.is_in(folder):
            raise LongtakeError(
                f"{folder} holds no exported model", expected=f"{NAME} in it", fix="run `longtake export`"
            )
        export = KIND.read(cls, path)
        if digests:
            export.verify(folder)
        return export

    def verify(self, folder: Path) -> None:
        """Raise IntegrityError if a file of it, in `folder`, is missing or differs from what was exported."""
        for name, expected in self.digests.items():
            file = folder / name
            got = sha256(file) if file.is_file() else "no file"
            if got != expected:
                raise IntegrityError(f"{file} is not what was exported", got=got, expected=expected, fix=KIND.remake)

    def write(self, folder: Path) -> None:
        """Write it into `folder`, atomically."""
        KIND.write(self, folder / NAME)

    @property
    def digests(self) -> dict[str, str]:
        """{file name: sha256} of all files."""
        files = [network.files.items() for network in self.networks.values()]
        return {Path(name).name: file.sha256 for group in files for name, file in group}

    @property
    def sampled(self) -> SamplingConfig | None:
        """How the checkpoints are sampled, if that is recorded."""
        return SamplingConfig.told(self.sampling)

    @property
    def weights_known(self) -> dict[str, str]:
        """Digests that tell its weights from others'; that of the export as a whole where the checkpoints' are not told."""
        return self.weights or ({"export": self.inputs} if self.inputs else {})

    @property
    def checkpoint_folder(self) -> Path | None:
        """The folder that was exported from, if it is recorded and still there."""
        return Path(self.checkpoints) if self.checkpoints and Path(self.checkpoints).is_dir() else None

    def require_recipe(self, recipe: Recipe, folder: Path, weights: bool = True) -> None:
        """Raise LongtakeError if this export, in `folder`, is of another recipe or not complete.

        `weights`: whether they must be there; a skeleton has none.
        """
        keys = ("preset", "precision", "cache", "linears")
        given, wanted = ({key: getattr(of, key) for key in keys} for of in (self, recipe))
        fix = f"longtake export --recipe {recipe.name}"
        if self.recipe is not None:
            self.recipe.read.require_same(recipe, folder)
        if given != wanted:
            raise LongtakeError(f"the networks in {folder} are of another recipe", got=given, expected=wanted, fix=fix)
        names = family_of(recipe.model).networks(recipe.model)
        missing = [name for name in names if name not in self.networks]
        if missing:
            what, lacks = f"{folder} lacks networks", f"no {', '.join(missing)}"
            raise IntegrityError(what, got=lacks, expected=", ".join(names), fix=f"{fix} --force")
        for what, got, here in (
            ("another version of our ops", self.plugin_version, PLUGIN_VERSION),
            ("another version of longtake", self.versions.get("longtake", ""), __version__),
        ):
            if got and got != here:
                raise IntegrityError(
                    f"the networks in {folder} were exported with {what}", got=got, expected=here, fix=f"{fix} --force"
                )
        if weights and self.skeleton:
            what, expected = f"the networks in {folder} have no weights", "networks exported from checkpoints"
            raise LongtakeError(what, got="a skeleton", expected=expected, fix=f"{fix} --checkpoints FOLDER")
