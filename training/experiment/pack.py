"""What goes on elsewhere: the report, and what `--resume` needs, in a few files of limited size.

Nothing is taken along that is quicker made again (encoded stories, resume points) or that nobody will read any more.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path, read_json
from longtake.record import record_from_json
from longtake.training.experiment.arms import shipped
from longtake.training.experiment.plots import PICTURES
from longtake.training.experiment.settings import Settings
from longtake.training.experiment.summary import best_seed
from longtake.training.experiment.units import Unit, wanted

REPORT = ("results.json", "report.md", *PICTURES, "sheet.png", "sheet.mp4")
FILES = 7  # at most, all together


def bring(
    out: Path, to: Path, every: Sequence[Unit], results: dict[str, Any], megabytes: float
) -> tuple[list[Path], list[str]]:
    """Write report.tar, state.tar (results, judge) and model-*.tar (models that somebody still needs, the best and the
    students) to `to`; models that don't fit are left out, which costs their training if they are needed.
    Returns the files, and the names of models left out."""
    to.mkdir(parents=True, exist_ok=True)
    made = [_tar(to / "report.tar", out, [out / name for name in REPORT])]
    logs = sorted((out / "logs").glob("*.log"))
    small = [out / name for name in ("settings.json", "seconds.json", "judge.safetensors", "sheet.png", "sheet.mp4", "progress.json")]  # fmt: skip
    made.append(_tar(to / "state.tar", out, [*small, *sorted((out / "units").glob("*.json")), *logs]))
    room = megabytes * 1e6 - sum(path.stat().st_size for path in made)
    left: list[str] = []
    for folder in models_in_order(out, every, results):
        files = [file for name in ("dit", "text_encoder") for file in sorted(folder.glob(f"{name}.*"))]
        size = sum(file.stat().st_size for file in files)
        if size > room or len(made) == FILES:
            left.append(folder.name)
            continue
        room -= size
        made.append(_tar(to / f"model-{folder.parent.name}-{folder.name}.tar", out, files))
    return made, left


def models_in_order(out: Path, every: Sequence[Unit], results: dict[str, Any]) -> list[Path]:
    """Folders of models, the most useful first: those that units still need, then the students, then the best arm."""
    open_ = {name for unit in wanted(every, results, out) for name in unit.needs}
    needed = [unit for unit in every if unit.name in open_ and unit.name in results]
    settings = record_from_json(Settings, read_json(out / "settings.json"))
    best = best_seed(results, settings)
    last = [f"distill-{steps}" for steps in settings.students] + ([] if best is None else [f"train-nvfp4-{best}"])
    order = [*needed, *(unit for name in last for unit in every if unit.name == name and name in results)]
    found = [(out / unit.product).parent for unit in order if unit.product and unit.product.endswith("dit.safetensors")]
    return list(dict.fromkeys(folder for folder in found if (folder / "dit.safetensors").is_file()))


def restore(folder: Path, out: Path) -> None:
    """Unpack what `bring` wrote. The VAE beside each model is the shipped one.

    Raises:
        LongtakeError: there is no state in `folder`, or `out` holds results already.
        IntegrityError: an archive is damaged, cut short or leads out of its folder; then nothing is left in `out`.
    """
    if not (folder / "state.tar").is_file():
        raise LongtakeError(f"{folder} holds no experiment", expected="state.tar", fix="the folder given to --bring")
    if (out / "settings.json").is_file():
        raise LongtakeError(f"{out} holds an experiment already", fix="--resume without --restore, or another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.restore-", dir=out.parent) as place:
        for path in [folder / "state.tar", *sorted(folder.glob("model-*.tar"))]:
            _unpack(path, Path(place))
        for dit in [*Path(place).glob("arms/*/dit.safetensors"), *Path(place).glob("students/*/dit.safetensors")]:
            for source in shipped().glob("vae.*"):
                shutil.copyfile(source, dit.with_name(source.name))
        _merge(Path(place), out)


def _unpack(path: Path, into: Path) -> None:
    """Unpack a whole archive. Raises IntegrityError for one that is cut short, damaged, or leads out of its folder."""
    try:
        with tarfile.open(path, "r:") as tar:
            tar.extractall(into, filter="data")
            end = tar.offset  # where the two empty blocks begin that end an archive: one that was cut short has none
        with open(path, "rb") as archive:
            archive.seek(end)
            if archive.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it was cut short: the end of the archive is missing")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise IntegrityError(
            f"{path} is not a whole archive of an experiment",
            got=str(error).splitlines()[0][:300],
            expected="what --bring wrote",
            fix="copy it again from where --bring wrote it",
        ) from None


def _merge(source: Path, target: Path) -> None:
    """Move what lies in `source` into `target`, what says that there is an experiment last."""
    files = sorted(
        (path for path in source.rglob("*") if not path.is_dir()), key=lambda path: path.name == "settings.json"
    )
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def _tar(path: Path, out: Path, files: Sequence[Path]) -> Path:
    with atomic_path(path) as partial, tarfile.open(partial, "w") as tar:
        for file in files:
            if file.is_file():
                tar.add(file, file.relative_to(out))
    return path
