"""What mkdocs needs beyond `docs/`: pages that stand elsewhere in the repository, and their links.

Links are written as the repository has them, so that they work where the files are read. Owns their
translation to the site: `README.md` is its first page, and `docs/` is its root.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs/"
HOME = "README.md"
ELSEWHERE = (
    HOME,
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "benchmarks/configs/*.yaml",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "cluster/configs/*.yaml",
    "cluster/dashboards/*",
)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_IS_ADDRESS = re.compile(r"^[a-z]+:")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what stands elsewhere."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            place = site_path(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translates a page's links."""
    place = page.file.src_uri
    is_elsewhere = page.file.generated_by is not None
    return translate_links(markdown, place, repository_path(place, is_elsewhere=is_elsewhere))


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    return "index.md" if path == HOME else path.removeprefix(DOCS)


def repository_path(place: str, *, is_elsewhere: bool) -> str:
    """Where the repository has a file of the site."""
    if not is_elsewhere:
        return DOCS + place
    return HOME if place == "index.md" else place


def translate_links(markdown: str, place: str, source: str) -> str:
    """The text of a page at `place` in the site and at `source` in the repository."""

    def translated(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        if _IS_ADDRESS.match(target):
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        relative = posixpath.relpath(site_path(there), posixpath.dirname(place) or ".")
        return f"{before}{relative}{after}"

    return _LINK.sub(translated, markdown)
