"""Captions as people have them: json and txt files, and tables of files and captions (csv, jsonl, json, parquet)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.files import json_value
from longtake.tar_files import opened_member

SUFFIXES = (".json", ".txt")  # of a caption's own file; the first counts where both are there
TABLES = (".csv", ".jsonl", ".parquet", ".json")  # a .json that holds a list
FILE_COLUMNS = ("file_name", "filename", "file", "path", "video", "video_path", "clip", "name")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")


def caption_from_file(path: Path) -> str:
    """The caption in a .txt, or in a .json under one of CAPTION_COLUMNS; on one line.

    Raises:
        LongtakeError: the file is missing, cannot be read, or holds none.
    """
    text = _text(path)
    if path.suffix.lower() == ".txt":
        return one_caption(text, str(path))
    try:
        content = json_value(text)
    except ValueError as error:
        raise LongtakeError(f"{path} is not valid JSON", got=str(error), expected='{"caption": "..."}') from None
    return caption_from_record(content if isinstance(content, Mapping) else {}, str(path))


def caption_from_record(record: Mapping[str, Any], where: str) -> str:
    """The caption of a table's row. Raises LongtakeError if there is none."""
    return one_caption(record.get(column_of(record, CAPTION_COLUMNS) or ""), where)


def one_caption(text: object, where: str) -> str:
    """A caption on one line. Raises LongtakeError for what is no text or empty."""
    if not isinstance(text, str) or not text.strip():
        raise LongtakeError(f"{where} has no caption")
    return " ".join(text.split())


def column_of(record: Iterable[str], names: Iterable[str]) -> str | None:
    """The column that has the first of some names, in any case."""
    known = {str(column).strip().lower(): column for column in record}
    return next((known[name] for name in names if name in known), None)


def rows_of_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, each with a file's and a caption's column.

    Raises:
        LongtakeError: it cannot be read, or lacks one of the columns; parquet without the package for it.
    """
    kind = path.suffix.lower()
    rows = _parquet(path) if kind == ".parquet" else _lines(path) if kind == ".jsonl" else _csv(path)
    columns = list(rows[0]) if rows else []
    for names in (FILE_COLUMNS, CAPTION_COLUMNS):
        if rows and column_of(columns, names) is None:
            what, got = f"{path} lacks a column", ", ".join(columns)
            expected, fix = f"one of {', '.join(names)}", "rename the column"
            raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return rows


def list_of_json(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a .json that is a table; None for any other."""
    try:
        content = json_value(_text(path))
    except (LongtakeError, ValueError):
        return None
    return content if isinstance(content, list) and all(isinstance(row, dict) for row in content) else None


def _csv(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".json":
        return list_of_json(path) or []
    text = _text(path)
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    try:
        head, *rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row
        ] or [[]]
    except csv.Error as error:
        raise LongtakeError(f"{path} is no table", got=str(error), expected="lines of a file and its caption") from None
    if twice := [name for place, name in enumerate(head) if name and name in head[:place]]:
        raise LongtakeError(
            f"{path} has a column twice", got=twice[0], expected="each name once", fix="rename one of them"
        )
    for number, row in enumerate(rows, 1):
        if any(row[len(head) :]):  # an unquoted comma in a caption: what stands behind it would be lost
            raise LongtakeError(
                f"row {number} of {path} has more fields than there are columns",
                got=f"{delimiter.join(row)[:80]}",
                expected=f"{len(head)} fields: {', '.join(head)}",
                fix=f'put captions that hold a {delimiter!r} in quotes: "..."',
            )
    return [dict(zip_longest(head, row[: len(head)])) for row in rows]


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json_value(line)
            except ValueError as error:
                raise LongtakeError(f"line {number} of {path} is not JSON", got=str(error)) from None
            if not isinstance(row, dict):
                raise LongtakeError(f"line {number} of {path} is no object", got=line[:60], expected='{"caption": ...}')
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        what, got = f"{path} needs a package that is not installed", "no pyarrow"
        expected, fix = "the extra `data`", "pip install 'longtake[data]', or write the table as csv"
        raise LongtakeError(what, got=got, expected=expected, fix=fix) from None
    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise LongtakeError(f"{path} cannot be read", got=str(error)[:120], expected="a parquet table") from None
    return rows


def _text(path: Path) -> str:
    try:
        member = opened_member(path)
        with member or open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise LongtakeError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise LongtakeError(f"{path} is not UTF-8 text", got=str(error)) from None
    except OSError as error:
        raise LongtakeError(f"{path} cannot be read", got=str(error)) from None
