"""What mkdocs is told beyond mkdocs.yml: the root's pages are part of the site, and links that lead out of docs/ say where.

On the repository's pages a link may name any file of it. The site holds docs/ and the pages in ROOT_PAGES; a link to another
file, or to a folder, becomes its path in words. What does not exist is left as it is, so that mkdocs refuses it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FENCED = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
SOURCES = {page: name for name, page in ROOT_PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links as the site has them."""
    own = page.file.src_uri
    pieces = FENCED.split(markdown)
    return "".join(piece if n % 2 else LINK.sub(lambda m: _link(m, own), piece) for n, piece in enumerate(pieces))


def _link(match: re.Match[str], own: str) -> str:
    image, text, target = match.groups()
    path, hash_, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return match[0]
    source = SOURCES.get(own, f"docs/{own}")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / place).exists():
        return match[0]
    if place not in ROOT_PAGES and (not place.startswith("docs/") or (ROOT / place).is_dir()):
        return text if place in text else f"{text} (`{place}`)"
    inside = ROOT_PAGES.get(place) or posixpath.relpath(place, "docs")
    return f"{image}[{text}]({os.path.relpath(inside, posixpath.dirname(own) or '.')}{hash_}{anchor})"
