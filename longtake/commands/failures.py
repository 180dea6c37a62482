"""What the system refuses (disk, memory, permissions, paths), as errors that a user can act on."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from longtake.errors import LongtakeError
from longtake.out_of_memory import is_out_of_memory, out_of_memory
from longtake.settings import settings_from_environment

WHOLE = "what was being written is not there under its final name; whatever was there before still is"
CHOOSE = "or choose another place"
# What the system's codes mean: what is said of a name, what was needed, what helps.
MEANINGS = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, f"no space left to write {{}}; {WHOLE}", "free disk space",
     "free some space, or choose a folder on another disk"),
    ({errno.EACCES, errno.EPERM, errno.EROFS}, "no permission for {}", "a place you may read and write",
     f"change its permissions, {CHOOSE}"),
    ({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP},
     "{} cannot be used as a path", "a path that fits its purpose",
     "check each part of the path: a folder must be a folder, a file a file"),
)  # fmt: skip
OTHER = "the system refused to read or write {}", "a working file system", f"check the disk, {CHOOSE}"
RUST_CODE = re.compile(r"\(os error (\d+)\)")  # safetensors passes the system's errors on as text


def explained(error: Exception) -> LongtakeError | None:
    """`error` in a user's terms, if it is one that files, memory or a terminal cause; None if it is a defect."""
    if is_out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, OSError):
        return _of_code(error.errno, _named(error), error, _of_home(error))
    code = RUST_CODE.search(str(error))
    return _of_code(int(code[1]), "a file", error) if code else None


def _of_home(error: OSError) -> str:
    """What more helps if the system refused something in LONGTAKE_HOME."""
    name = _file_of(error)
    try:
        home = settings_from_environment().home
        inside = name is not None and Path(os.path.realpath(str(name))).is_relative_to(os.path.realpath(home))
    except (OSError, ValueError, LongtakeError):  # a working folder that is gone, no place for a home
        return ""
    return f"; or set LONGTAKE_HOME, which is {home}, to another folder" if inside else ""


def _of_code(code: int | None, name: str, error: Exception, more: str = "") -> LongtakeError:
    what, expected, fix = next((rest for codes, *rest in MEANINGS if code in codes), OTHER)
    return LongtakeError(what.replace("{}", name), got=_first_line(error), expected=expected, fix=fix + more)


def _file_of(error: OSError) -> Any:
    """What the system refused, as it was named there; of two names the second, which was to be made. None if it says none."""
    return error.filename2 or error.filename


def _named(error: OSError) -> str:
    name = _file_of(error)
    shown = str(name) if name is not None else "a file"
    return shown if len(shown) <= 120 else shown[:117] + "..."


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 300 else line[:297] + "..."
