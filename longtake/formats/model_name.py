"""Models have names, and one rule says where what is made of them lies.

A model is a folder of checkpoints. Its name is the folder's, or what `--name` recorded in its dit.json; the shipped ones
(`tiny`, `tiny-4step`) are reserved. `NAME@RECIPE` picks a recipe. Below LONGTAKE_HOME lie
models/NAME/model.json (whose weights these are), and models/NAME/RECIPE/{onnx,engines}.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from longtake.errors import LongtakeError, nearest
from longtake.formats.exported import Export
from longtake.formats.recipe import Recipe, recipe_named, recipe_names
from longtake.leftovers import locked
from longtake.paths import REPOSITORY
from longtake.record import Kind
from longtake.settings import settings_from_environment
from longtake.training.models.checkpoint import require_targets, side_file, weights_digests
from longtake.training.models.side_file import SideFile

KIND = Kind("a model's card", "`longtake export`", "run `longtake export` again")
CARD = "model.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHIPPED = REPOSITORY / "training" / "checkpoints"
RULE = "letters, digits, '.', '-' and '_', a letter or digit first"


@dataclass(frozen=True)
class Model:
    """A folder of checkpoints under a name. preset: its name. weights: digests of its DiT and VAE."""

    name: str
    checkpoints: Path
    preset: str
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def shipped(self) -> bool:
        return self.checkpoints == shipped().get(self.name)

    def folder(self, recipe: Recipe | str) -> Path:
        """Where what is made of it by a recipe lies: `onnx` and `engines` in it."""
        return folder_of(self.name, recipe)


def home() -> Path:
    """Where models lie."""
    return settings_from_environment().home / "models"


def folder_of(name: str, recipe: Recipe | str) -> Path:
    """LONGTAKE_HOME/models/NAME/RECIPE."""
    return home() / name / (recipe if isinstance(recipe, str) else recipe.name)


def shipped() -> dict[str, Path]:
    """The shipped models' folders by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/dit.safetensors"))}


def checkpoints_named(text: str) -> Path:
    """A folder of checkpoints, or that of a shipped model by its name."""
    return Path(text) if Path(text).is_dir() else shipped().get(text, Path(text))


def checked_name(name: str) -> str:
    """`name`, if a model may be called so. Raises LongtakeError otherwise."""
    if not NAME.fullmatch(name):
        raise LongtakeError("bad model name", got=repr(name), expected=RULE, fix="pass --name my-model")
    if name in shipped():
        what, got = f"the name {name} is that of a shipped model", repr(name)
        expected, fix = "a name of your own", f"pass --name my-{name}"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return name


def write_name(folder: Path, name: str | None) -> None:
    """Record in the dit.json of a finished checkpoint what its model is called; None: nothing."""
    path = side_file(folder / "dit.safetensors")
    if name is not None and path.is_file():
        side = SideFile.read(path)
        replace(side, facts={**side.facts, "name": checked_name(name)}).write(path)


def model_in(folder: Path, name: str | None = None) -> Model:
    """The model in a folder of checkpoints. name: what it is called, if not as its dit.json or its folder is.

    Raises:
        LongtakeError: there is no DiT, a link is to nothing, or it cannot be called so.
    """
    require_targets(folder)
    path = side_file(folder / "dit.safetensors")
    if not path.is_file():
        what, got = f"{folder} holds no model", f"no {path.name}" if folder.is_dir() else "no such folder"
        expected = "dit.safetensors and dit.json, as training and `longtake convert` write them"
        raise LongtakeError(what, got=got, expected=expected, fix="pass the folder that has them")
    side, resolved = SideFile.read(path), folder.resolve()
    called = name or str(side.facts.get("name") or resolved.name)
    own = shipped().get(called)
    if own is None or own.resolve() != resolved:
        checked_name(called)
    return Model(called, own or resolved, side.preset, weights_digests(folder))


def card_of(name: str) -> Model | None:
    """What is recorded of an own model, or the shipped one of that name."""
    if name in shipped():
        return model_in(shipped()[name])
    return _recorded(name) if NAME.fullmatch(name) else None


@contextmanager
def claimed(model: Model, replaced: bool = False) -> Iterator[None]:
    """`claim` a model's name, and hold it while something is made of it: a claim of another model waits for that."""
    folder = home() / model.name
    while True:
        with locked(folder, reads=True):
            if _recorded(model.name) == model:
                yield
                return
        with locked(folder):
            claim(model, replaced)


def claim(model: Model, replaced: bool = False) -> None:
    """Record a model under its name. replaced: what was made of another one of that name is removed.

    Raises:
        LongtakeError: something was made of another checkpoint of that name.
    """
    known, made = _recorded(model.name), _made_of(model.name)
    if made and known is not None and known.weights != model.weights:
        if not replaced:
            got = f"{_digests(model.weights)} in {model.checkpoints}"
            expected = f"{_digests(known.weights)}, exported before from {known.checkpoints}"
            fix = "pass --name for another name, or --replace, which removes what was made of the other one"
            raise LongtakeError(
                f"two different checkpoints are called {model.name}", got=got, expected=expected, fix=fix
            )
        for folder in made:
            shutil.rmtree(folder)
    if known != model:
        KIND.write({**vars(model), "checkpoints": str(model.checkpoints)}, home() / model.name / CARD)


def _recorded(name: str) -> Model | None:
    path = home() / name / CARD
    return KIND.read(Model, path) if path.is_file() else None


def _made_of(name: str) -> list[Path]:
    return [folder for folder in (home() / name).glob("*") if made_by(folder)]


def _digests(weights: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} {digest[:12]}" for kind, digest in weights.items())


def models_with(recipe: str) -> list[str]:
    """The models of which something was made by `recipe`, skeletons aside."""
    names = [path.parent.name for path in sorted(home().glob(f"*/{recipe}")) if made_by(path)]
    return [name for name in names if name != "skeleton"]


def only_name_with(recipe: str, fix: str) -> str | None:
    """The only one of `models_with(recipe)`; None if there is none.

    Raises:
        LongtakeError: there are several; `fix` comes before the name of one.
    """
    names = models_with(recipe)
    if len(names) > 1:
        what, fix = f"several models are there for recipe {recipe}", f"{fix} {names[0]}@{recipe}"
        raise LongtakeError(what, got=", ".join(names), expected="one of them", fix=fix)
    return names[0] if names else None


def made_by(folder: Path) -> bool:
    """Whether a folder of a model and recipe holds an export or engines."""
    return Export.is_in(folder / "onnx") or (folder / "engines" / "bundle.json").is_file()


@dataclass(frozen=True)
class Asked:
    """What a name says. model: None where a recipe alone was named. recipe: None where the best is wanted."""

    model: Model | None
    recipe: Recipe | None


def parts_of(text: str) -> tuple[str, str | None]:
    """The model and the recipe in "MODEL@RECIPE". An @ in a folder's own path parts nothing."""
    if "@" not in text or Path(text).is_dir():
        return text, None
    before, _, after = text.rpartition("@")
    if not Path(before).is_dir():
        before, _, after = text.partition("@")
    return before, after


def full_name(model: str, recipe: str) -> str:
    """NAME@RECIPE, as what is made of a model is told; the recipe alone where the model has no name."""
    return f"{model}@{recipe}" if model else recipe


def parts_of_full(name: str) -> tuple[str, str]:
    """The model, "" if it has no name, and the recipe of what `full_name` made."""
    model, _, recipe = name.rpartition("@")
    return model, recipe


def asked_for(text: str) -> Asked:
    """What "MODEL", "MODEL@RECIPE", a recipe, or a folder of checkpoints (with or without @RECIPE) names.

    Raises:
        LongtakeError: it names nothing; says what is near, or how to download what has a hub's name.
    """
    name, wanted = parts_of(text)
    recipe = None if wanted is None else recipe_named(wanted)
    model = model_in(Path(name)) if (Path(name) / "dit.safetensors").is_file() else card_of(name)
    if model is not None:
        return Asked(model, _fitting(recipe, model))
    if recipe is None and (name in recipe_names() or name.endswith((".yaml", ".yml"))):
        return Asked(None, recipe_named(name))
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        raise hub_error(name)
    raise _unknown(name)


def _fitting(recipe: Recipe | None, model: Model) -> Recipe | None:
    if recipe is not None and recipe.preset != model.preset:
        what, expected = f"recipe {recipe.name} is not for model {model.name}", f"a recipe of preset {model.preset}"
        fix = ", ".join(recipe_names(model.preset)) or "write one: docs/add-a-recipe.md"
        raise LongtakeError(what, got=f"preset {recipe.preset}", expected=expected, fix=fix)
    return recipe


def known_names() -> list[str]:
    """All models there are: shipped, and those of which something was made."""
    own: list[str] = []
    with suppress(OSError):
        own = [path.parent.name for path in sorted(home().glob(f"*/{CARD}")) if _made_of(path.parent.name)]
    return list(dict.fromkeys([*shipped(), *own]))


def hub_error(name: str) -> LongtakeError:
    """What is said of a Hugging Face id."""
    short = name.split("/")[1]
    return LongtakeError(
        f"{name} is a Hugging Face id, and longtake downloads nothing by itself",
        got=f"no folder {name}, and no copy of it in the local Hugging Face cache",
        expected="a folder of checkpoints, or a model's name: " + ", ".join(known_names()),
        fix=f"hf download {name} --local-dir {short}, then longtake convert --dit {short} --vae {short} --text {short} "
        f"--out checkpoints/{short.lower()}",
    )


def _unknown(name: str) -> LongtakeError:
    models, recipes = known_names(), recipe_names()
    expected = f"a model ({', '.join(models)}), MODEL@RECIPE, a recipe ({', '.join(recipes)}) or a folder"
    other = "longtake doctor lists the recipes; a model of your own: longtake export --checkpoints FOLDER"
    fix = nearest(name, [*models, *recipes], other)
    return LongtakeError("there is no such model or recipe", got=repr(name), expected=expected, fix=fix)
