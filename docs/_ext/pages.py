"""The pages as the site shows them; their sources are written for GitHub, which knows only the repository's files.

A page that only includes a file of the repository takes its place: links to that file lead to the page. Quotes that
begin with "On GitHub" are left out.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
INCLUDED = {
    os.path.normpath(page.parent / found[1]): page
    for page in sorted(DOCS.glob("*/*.md"))
    if (found := re.search(r"^```\{include\} (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE))
}
"""A file of the repository -> the page that includes it."""


def for_site(file: Path, text: str) -> str:
    """The Markdown of a page, or of a file that a page includes, as the site needs it."""
    page = INCLUDED.get(os.path.normpath(file), file)

    def link(found: re.Match[str]) -> str:
        shown = INCLUDED.get(os.path.normpath(file.parent / found[1]))
        return f"]({os.path.relpath(shown, page.parent)}" if shown else found[0]

    text = re.sub(r"^> On GitHub.*\n(?:>.*\n)*\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\(([^)#:\s]+\.md)", link, text)


def _read(app: "Sphinx", docname: str, source: list[str]) -> None:
    source[0] = for_site(DOCS / f"{docname}.md", source[0])


def _include(app: "Sphinx", path: Path, docname: str, source: list[str]) -> None:
    source[0] = for_site(DOCS / path, source[0])


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("source-read", _read)
    app.connect("include-read", _include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
