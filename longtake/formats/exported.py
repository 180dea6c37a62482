"""What `longtake export` leaves in a folder, as the stages after it read it: export.json and the digests in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import read_json, sha256
from longtake.formats.recipe import LINEARS, Recipe
from longtake.training.models.families import family_of

FORMAT = 1
INDEX = "export.json"


def load_index(folder: Path) -> dict[str, Any]:
    """Read and check a package: export.json and the digest of every file it names.

    Raises:
        LongtakeError: there is no package.
        IntegrityError: a file is missing or differs from what was exported.
    """
    if not (folder / INDEX).is_file():
        raise LongtakeError(f"{folder} holds no exported model", expected=f"{INDEX} in it", fix="run `longtake export`")
    index = read_json(folder / INDEX)
    for name, expected in _digests(index, folder / INDEX).items():
        path = folder / name
        got = sha256(path) if path.is_file() else "no file"
        if got != expected:
            raise IntegrityError(
                f"{path} is not what was exported", got=got, expected=expected, fix="run `longtake export --force`"
            )
    return index


def _digests(index: Any, path: Path) -> dict[str, str]:
    """{file name: sha256} of export.json's content `index`, which is checked for what its readers rely on."""
    try:
        if index["format"] != FORMAT:
            raise IntegrityError(f"{path} has another format", got=index["format"], expected=FORMAT,
                                 fix="run `longtake export --force`")  # fmt: skip
        if not all(isinstance(word, str) for word in index["vocabulary"]):
            raise TypeError("the vocabulary is no list of words")
        files = [network["files"] for network in index["networks"].values()]
        return {Path(name).name: entry["sha256"] for group in files for name, entry in group.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is no export description", got=f"{type(error).__name__}: {error}",
            expected="what `longtake export` writes", fix="run `longtake export --force`",
        ) from None  # fmt: skip


def require_recipe(index: dict[str, Any], folder: Path, recipe: Recipe, content: bool = True) -> None:
    """Raise LongtakeError if the package in `folder`, described by `index`, is of another recipe or not complete.

    `content`: whether the weights must be there; a skeleton has none.
    """
    given = {key: index.get(key) for key in ("preset", "precision", "cache")} | {
        "linears": index.get("linears", LINEARS[0])
    }
    wanted = {
        "preset": recipe.preset, "precision": recipe.precision, "cache": recipe.cache, "linears": recipe.linears,
    }  # fmt: skip
    fix = f"longtake export --recipe {recipe.name}"
    if given != wanted:
        raise LongtakeError(f"the networks in {folder} are of another recipe", got=given, expected=wanted, fix=fix)
    names = family_of(recipe.model).networks(recipe.model)
    missing = [name for name in names if name not in index["networks"]]
    if missing:
        raise IntegrityError(f"{folder} lacks networks", got=f"no {', '.join(missing)}", expected=", ".join(names),
                             fix=f"{fix} --force")  # fmt: skip
    if content and index.get("skeleton"):
        raise LongtakeError(f"the networks in {folder} have no weights", got="a skeleton",
                            expected="networks exported from checkpoints", fix=f"{fix} --checkpoints FOLDER")  # fmt: skip
