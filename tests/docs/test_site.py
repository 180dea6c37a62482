"""The site: it builds without a warning, no link in it leads nowhere, and the API reference has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import longtake
from longtake.paths import REPOSITORY

needs_mkdocs = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs longtake[docs], which `make docs` installs",
)


def build(folder: Path, out: Path, config: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, out, REPOSITORY / "mkdocs.yml")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


class Page(HTMLParser):
    """Where a page's links lead, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.anchors.add(value)


@needs_mkdocs
def test_no_link_leads_nowhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    checked, broken = 0, []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            checked += 1
            if not there:
                broken.append((path.relative_to(site).as_posix(), link))
    assert not broken and checked > 1000


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img)[^>]* src="https?:|<link[^>]*stylesheet[^>]*https?:', text), path


@needs_mkdocs
def test_the_reference_tells_of_the_door(site: Path) -> None:
    page = (site / "reference" / "generator" / "index.html").read_text(encoding="utf-8")
    anchors = Page(page).anchors
    for name in ("from_pretrained", "from_checkpoint", "session", "encode", "close"):  # inherited ones, too
        assert f"longtake.pretrained.Generator.{name}" in anchors
    assert "there is no such model" in page  # of what is raised


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs" / "reference").glob("*.md"))
    named = {line.split(".")[-1] for line in re.findall(r"^::: (\S+)$", text, re.M)}
    errors = {name for name in longtake.__all__ if getattr(longtake, name).__class__ is type and name.endswith("Error")}
    assert "longtake.errors" in text  # the module whole
    of_errors = {name for name in errors if getattr(longtake, name).__module__ == "longtake.errors"}
    assert set(longtake.__all__) - {"__version__"} - of_errors <= named


@pytest.fixture(scope="module")
def pages() -> Any:
    pytest.importorskip("mkdocs", reason="needs longtake[docs], which `make docs` installs")
    spec = spec_from_file_location("pages", REPOSITORY / "docs" / "site" / "pages.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("own", "given", "shown"),
    [
        ("python.md", "see [serving.md](serving.md#the-page)", "see [serving.md](serving.md#the-page)"),
        ("index.md", "[the demo](docs/demo.mp4), ![it](docs/demo.png)", "[the demo](demo.mp4), ![it](demo.png)"),
        ("index.md", "[security](SECURITY.md)", "[security](security.md)"),
        ("reference/index.md", "[CHANGELOG](../../CHANGELOG.md)", "[CHANGELOG](../changes.md)"),
        ("index.md", "[its schema](runtime/schema/story.json)", "its schema (`runtime/schema/story.json`)"),
        ("how-it-works.md", "[`runtime/session.py`](../runtime/session.py)", "`runtime/session.py`"),
        ("index.md", "[reports](docs/measurements)", "reports (`docs/measurements`)"),
        ("python.md", "[gone](nowhere.md) [out](https://x.org/y)", "[gone](nowhere.md) [out](https://x.org/y)"),
        ("python.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_are_as_the_site_has_them(pages: Any, own: str, given: str, shown: str) -> None:
    file = type("File", (), {"src_uri": own})()
    page = type("Page", (), {"file": file})()
    assert pages.on_page_markdown(given, page) == shown


@needs_mkdocs
def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("# One\n\n[gone](nowhere.md)\n")
    settings = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("nav:")]
    hook = f"hooks: [{REPOSITORY / 'docs' / 'site' / 'pages.py'}]\n"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nplugins: []\n{hook}{validation}")
    done = build(tmp_path, tmp_path / "out", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and "nowhere.md" in done.stderr
