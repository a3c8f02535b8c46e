"""What Sphinx shows as Python must be what was run: compare the built pages with the programs."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import TYPE_CHECKING

from docutils import nodes

from programs import PYTHON_NAME, RAW_HTML, looks_like_python, read_page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def unproved(doctrees: Path, pages: Path) -> Iterator[str]:
    """Yield what is shown but not run, and what is run but not shown, in one language."""
    sources = {path.relative_to(pages).with_suffix(""): path for path in pages.rglob("*.md")}
    built = {path.relative_to(doctrees).with_suffix("") for path in doctrees.rglob("*.doctree")}
    for name in sorted(sources.keys() - built):
        yield f"{sources[name]}: was not built into {doctrees}"
    for name in sorted(built):
        yield from unproved_on_page(doctrees / f"{name}.doctree", sources.get(name))


def unproved_on_page(doctree: Path, source: Path | None) -> Iterator[str]:
    """Yield the differences of one page; a page that is not Markdown has no programs."""
    where = source or doctree
    if source and doctree.stat().st_mtime < source.stat().st_mtime:
        yield f"{where}: was changed after it was built: build again"
        return
    text = source.read_text(encoding="utf-8") if source else ""
    run = Counter(program.code.content.rstrip() for program in read_page(text, "").programs)
    with doctree.open("rb") as file:
        shown = Counter(shown_python(pickle.load(file)))  # noqa: S301 -- Sphinx wrote it just now
    for code in shown - run:
        yield f"{where}: this is shown, but no program that was run:\n{code}"
    for code in run - shown:
        yield f"{where}: this was run, but is not shown:\n{code}"


def shown_python(document: nodes.document) -> Iterator[str]:
    """Yield every block of a page that a reader would take for Python."""
    for node in document.findall(nodes.literal_block):
        words = [node.get("language", "default"), *node["classes"]]
        named = any(PYTHON_NAME.match(word) for word in words)
        if named or ("output" not in words and looks_like_python(node.astext())):
            yield node.astext().rstrip()
    for prompt in document.findall(nodes.doctest_block):
        yield prompt.astext()
    for raw in document.findall(nodes.raw):
        if RAW_HTML.search(raw.astext()):
            yield raw.astext()
