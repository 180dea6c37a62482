"""Films and their captions in what people have: a folder, a table, or tars. What is no clip is named with its reason.

- `video/<sample>/<n>.mp4` with `caption/<sample>/<n>.json`: consecutive shots of one film each (LongLive's layout)
- films anywhere in a folder, each with a caption beside it: `clip.mp4` and `clip.txt` or `clip.json`
- a table of files and captions in the folder: csv, jsonl, json or parquet
- webdataset: tars whose files belong together by their names, `000.mp4` and `000.txt` or `000.json`

mp4 stands for any of `video.SUFFIXES`, txt and json for each other, and suffixes may be in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from longtake.errors import LongtakeError
from longtake.tar_files import SUFFIX as TAR
from longtake.tar_files import members
from longtake.training.data.captions import (
    FILE_COLUMNS,
    TABLES,
    caption_from_file,
    caption_from_record,
    column_of,
    list_of_json,
    rows_of_table,
)
from longtake.training.data.captions import SUFFIXES as CAPTIONS
from longtake.video import SUFFIXES

FILMS = "not " + ", ".join(suffix[1:] for suffix in SUFFIXES)
NO_FILE = "no file: a broken link, or a pipe"
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Found:
    """A film: what it is a shot of, and what reads its caption (and raises LongtakeError if there is none)."""

    path: Path
    sample: str
    caption: Callable[[], str]


@dataclass
class Finds:
    """Films in the order of their samples and shots, and why everything else is ignored."""

    films: list[Found] = field(default_factory=list)
    ignored: dict[Path, str] = field(default_factory=dict)


def found_in(root: Path) -> Finds:
    """Look through a folder, a table or a tar.

    Raises:
        LongtakeError: a table or tar cannot be read.
    """
    finds = Finds()
    if root.is_file():
        tables, tars = ([], [root]) if root.suffix.lower() == TAR else ([root], [])
    else:
        tables = [path for path in sorted(root.glob("*")) if _is_table(path)]
        tars = [path for path in sorted(root.rglob("*")) if path.suffix.lower() == TAR and path.is_file()]
    for table in tables:
        _of_table(table, finds)
    for tar in tars:
        _of_tar(tar, finds)
    if (root / "video").is_dir() and (root / "caption").is_dir():
        _of_shots(root, finds, {*tables, *tars})
    elif root.is_dir():
        _of_folder(root, finds, {*tables, *tars})
    return finds


def _is_table(path: Path) -> bool:
    if path.suffix.lower() not in TABLES or not path.is_file() or path.name.startswith("."):
        return False
    return path.suffix.lower() != ".json" or list_of_json(path) is not None


def _of_table(table: Path, finds: Finds) -> None:
    taken = {found.path for found in finds.films}
    for number, row in enumerate(rows_of_table(table), 1):
        name = row.get(column_of(row, FILE_COLUMNS) or "")
        path = _resolved(table.parent, str(name or "").strip())
        if path in taken or not name:
            finds.ignored[table.parent / f"{table.name} row {number}"] = "named twice" if name else "no file"
            continue
        taken.add(path)

        def caption(row: dict[str, object] = row, where: str = f"row {number} of {table}") -> str:
            return caption_from_record(row, where)

        finds.films.append(Found(path, str(row.get("sample") or path), caption))


def _resolved(folder: Path, name: str) -> Path:
    """The film that a table names, with its suffix or without."""
    path = folder / name
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return path
    beside = sorted(path.parent.glob(f"{path.name}.*")) if name and path.parent.is_dir() else []
    return next((each for each in beside if each.suffix.lower() in SUFFIXES), path)


def _of_tar(tar: Path, finds: Finds) -> None:
    parts: dict[str, dict[str, Path]] = {}
    for name in sorted(members(tar)):
        path = tar / name
        key, _, kind = path.name.partition(".")
        parts.setdefault((Path(name).parent / key).as_posix(), {})[f".{kind.lower()}"] = path
    for key, kinds in parts.items():
        film = next((kinds[kind] for kind in SUFFIXES if kind in kinds), None)
        if film is None:
            finds.ignored[tar / key] = "no film"
            continue
        finds.films.append(_beside(film, f"{tar.name}/{key}", kinds, tar / f"{key}.txt"))


def _beside(film: Path, sample: str, kinds: dict[str, Path], nowhere: Path) -> Found:
    """A film and the caption among the files of its name."""
    source = next((kinds[kind] for kind in CAPTIONS if kind in kinds), nowhere)
    return Found(film, sample, lambda: caption_from_file(source))


def _of_folder(root: Path, finds: Finds, known: set[Path]) -> None:
    """Films anywhere below `root`, each with its caption beside it; a film of its own each."""
    named, other = {found.path for found in finds.films}, bool(finds.films)
    parts: dict[Path, dict[str, Path]] = {}
    for path in sorted(path for path in root.rglob("*") if not path.is_dir() and path not in known):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            finds.ignored[path] = "hidden"
        elif not path.is_file():
            finds.ignored[path] = NO_FILE
        elif path.suffix.lower() in COMPRESSED:
            finds.ignored[path] = "compressed: unpack it"
        elif path.suffix.lower() not in (*SUFFIXES, *CAPTIONS):
            finds.ignored[path] = FILMS
        elif path not in named:
            kinds = parts.setdefault(path.with_suffix(""), {})
            if path.suffix.lower() in kinds:
                finds.ignored[path] = f"beside {kinds[path.suffix.lower()].name}"
            kinds.setdefault(path.suffix.lower(), path)
    for stem, kinds in parts.items():
        films = [kinds[kind] for kind in SUFFIXES if kind in kinds]
        captions = [kinds[kind] for kind in CAPTIONS if kind in kinds]
        finds.ignored |= {path: f"beside {films[0].name}" for path in films[1:]}
        if films and (captions or not other):
            sample = stem.relative_to(root).as_posix()
            finds.films.append(_beside(films[0], sample, kinds, stem.with_suffix(".txt")))
        else:
            finds.ignored |= {path: "in no table" if films else "no clip of this name" for path in films or captions}


Shot = tuple[str, str]  # sample, name without suffix


def _shot(path: Path) -> Shot:
    return path.parent.name, path.stem


def _of_shots(root: Path, finds: Finds, known: set[Path]) -> None:
    """Films in the order of their shots, each one's caption, and why everything else is ignored."""
    films: dict[Shot, Path] = {}
    captions: dict[Shot, Path] = {}
    ignored, named = finds.ignored, {found.path for found in finds.films}
    for kind, suffixes, taken in (("video", SUFFIXES, films), ("caption", CAPTIONS, captions)):
        inside = [path for path in root.glob(f"{kind}/*") if not path.is_dir()]
        for path in sorted(
            [*inside, *root.glob(f"{kind}/*/*")], key=lambda path: (path.suffix.lower() != suffixes[0], path)
        ):
            shot = _shot(path)
            if path in named or path in known:
                continue
            if path.name.startswith(".") or not path.is_file():
                ignored[path] = "a folder" if path.is_dir() else NO_FILE if not path.is_file() else "hidden"
            elif path.suffix.lower() not in suffixes:
                ignored[path] = f"not {', '.join(suffix[1:] for suffix in suffixes)}"
            elif path.parent.parent != root / kind:
                ignored[path] = f"not in {kind}/<sample>/"
            elif shot in taken:
                ignored[path] = f"beside {taken[shot].name}"
            else:
                taken[shot] = path
    ignored |= {path: "no clip of this name" for shot, path in captions.items() if shot not in films}
    for path in sorted(films.values(), key=lambda path: (path.parent.name, *_shot_number(path))):
        source = captions.get(_shot(path), root / "caption" / path.parent.name / f"{path.stem}.json")
        finds.films.append(Found(path, path.parent.name, _reader(source)))


def _reader(source: Path) -> Callable[[], str]:
    return lambda: caption_from_file(source)


def _shot_number(path: Path) -> tuple[float, str]:
    """Numbers in numeric order, then other names."""
    return (int(path.stem), "") if path.stem.isdecimal() else (float("inf"), path.stem)


def require_data(name: str) -> Path:
    """A folder, table or tar of clips by its path. Raises LongtakeError if there is none."""
    root = Path(name)
    if root.is_dir() or (root.is_file() and root.suffix.lower() in (TAR, *TABLES)):
        return root
    raise LongtakeError(
        "no such data set",
        got=name,
        expected='"digits", "returning-digits", a folder of clips with captions, a table of them (csv, jsonl, parquet) or '
        "a tar",
        fix="check --data (docs/training.md shows the layouts)",
    )
