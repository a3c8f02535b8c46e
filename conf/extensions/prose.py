"""Chinese prose, one sentence a line, without the blanks that line breaks would leave.

Also tells of bold text that did not become bold: CommonMark leaves ``**`` as it stands where a
Chinese punctuation mark is its neighbour.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)

MARK = r"\u2018-\u201f\u2014\u2026\u3000-\u303f\uff00-\uffef"
WIDE = rf"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff{MARK}"
# A full-width mark brings its own room, so no blank goes beside it, whatever the neighbour.
BREAK = re.compile(rf"(?<=[{WIDE}])\n(?=[{WIDE}])|(?<=[{MARK}])\n|\n(?=[{MARK}])")
NOT_PROSE = (nodes.literal, nodes.literal_block, nodes.raw, nodes.math)


def joined(parts: list[str]) -> list[str]:
    """Drop the line breaks that would show as a stray blank; ``parts`` follow each other."""
    whole = "".join(parts)
    dropped = {match.start() for match in BREAK.finditer(whole)}
    result, at = [], 0
    for part in parts:
        kept = [c for i, c in enumerate(part, start=at) if i not in dropped]
        result.append("".join(kept))
        at += len(part)
    return result


class JoinLines(SphinxTransform):
    """Join the lines of every Chinese paragraph."""

    default_priority = 800

    def apply(self, **_: Any) -> None:
        """Join, if this is the Chinese site."""
        if not self.config.language.startswith("zh"):
            return
        for block in self.document.findall(nodes.TextElement):
            if isinstance(block.parent, nodes.TextElement) or isinstance(block, NOT_PROSE):
                continue
            texts = list(block.findall(nodes.Text))
            for text, new in zip(texts, joined([str(text) for text in texts]), strict=True):
                if new != text:
                    text.parent.replace(text, nodes.Text(new))


def stray_markup(document: nodes.document) -> Iterator[nodes.Text]:
    """Yield the texts in which Markdown's asterisks were not understood."""
    for text in document.findall(nodes.Text):
        if "**" in text and not inside(text, NOT_PROSE):
            yield text


def inside(node: nodes.Node | None, kinds: tuple[type[nodes.Node], ...]) -> bool:
    """Tell whether ``node`` stands in an element of one of ``kinds``."""
    while node is not None:
        if isinstance(node, kinds):
            return True
        node = node.parent
    return False


def check_markup(app: Sphinx, document: nodes.document) -> None:
    """Warn about asterisks that the reader would see."""
    if not str(document["source"]).endswith(".md"):
        return
    for text in stray_markup(document):
        logger.warning(
            "literal ** in %r: put a blank or a word beside the bold text",
            str(text)[:60],
            location=text.parent,
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts."""
    app.add_transform(JoinLines)
    app.connect("doctree-read", check_markup)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
