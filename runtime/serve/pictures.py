"""Pictures of a video that is in a journal: its first frame, and a sheet of frames from its whole length."""

from __future__ import annotations

import io

import av

from longtake.runtime.serve.fragments import film
from longtake.runtime.serve.journal import Journal

SHEET_COLUMNS, SHEET_ROWS, SHEET_WIDTH = 4, 4, 320


def shown_chunks(journal: Journal) -> list[int]:
    """Indices of the chunks that are shown."""
    first = int(journal.meta.about.get("first_media", 0))
    return list(range(first, journal.count()))


def film_of(journal: Journal) -> str:
    """The path of the whole film so far; written once for each number of chunks."""
    chunks = shown_chunks(journal)
    path = journal.folder / f"film-{len(chunks):06}.mp4"
    if not path.exists():
        film(journal.init(), (journal.media(index) for index in chunks), path)
        for old in journal.folder.glob("film-*.mp4"):
            if old != path:
                old.unlink(missing_ok=True)
    return str(path)


def thumbnail(journal: Journal) -> bytes:
    """The first frame as PNG."""
    first = shown_chunks(journal)[0]
    with av.open(io.BytesIO(journal.init() + journal.media(first)), "r") as source:
        picture = next(source.decode(video=0)).to_image()
    return _png(picture)


def spritesheet(journal: Journal) -> bytes:
    """Frames from the whole length, row by row, as one PNG."""
    from PIL import Image

    count = sum(journal.chunk(index)["frames"] for index in shown_chunks(journal))
    cells = SHEET_COLUMNS * SHEET_ROWS
    wanted = {round(cell * (count - 1) / (cells - 1)) for cell in range(cells)}
    meta = journal.meta
    width = min(SHEET_WIDTH, meta.width)
    size = (width, max(1, round(meta.height * width / meta.width)))
    sheet = Image.new("RGB", (size[0] * SHEET_COLUMNS, size[1] * SHEET_ROWS))
    with av.open(film_of(journal), "r") as source:
        frames = (frame for index, frame in enumerate(source.decode(video=0)) if index in wanted)
        for cell, frame in enumerate(frames):
            row, column = divmod(cell, SHEET_COLUMNS)
            sheet.paste(frame.to_image().resize(size), (column * size[0], row * size[1]))
    return _png(sheet)


def _png(picture: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")  # type: ignore[attr-defined]
    return out.getvalue()
