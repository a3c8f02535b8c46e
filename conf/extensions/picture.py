"""``{picture} name``: an SVG from conf/pictures/name.py, inside the page.

Inside, so that the colours of the theme and of dark mode reach it. The picture is drawn from a
run of the package; it is kept in build/pictures until the package or its own module changes.
"""

from __future__ import annotations

import hashlib
import html
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CONF = Path(__file__).parent.parent
ROOT = CONF.parent
KEPT = ROOT / "build" / "pictures"


def sources(name: str) -> list[Path]:
    """Return the files on which a picture depends."""
    package = sorted((ROOT / "src").rglob("*.py"))
    return [CONF / "pictures" / f"{name}.py", CONF / "pictures" / "__init__.py", *package]


def svg(name: str, language: str) -> str:
    """Return the picture in this language, drawn anew only if something changed."""
    digest = hashlib.sha256()
    for path in sources(name):
        digest.update(path.read_bytes())
    kept = KEPT / f"{name}.{language}.{digest.hexdigest()[:16]}.svg"
    if not kept.exists():
        drawn = draw(name, language)
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(".new")
        new.write_text(drawn, encoding="utf-8")
        new.replace(kept)
    return kept.read_text(encoding="utf-8")


def draw(name: str, language: str) -> str:
    """Draw the picture in this language."""
    module = importlib.import_module(f"pictures.{name}")
    chinese = language.startswith("zh")
    return str(module.draw(lambda zh, en: zh if chinese else en))


class Picture(SphinxDirective):
    """The content is the caption, and what a screen reader says if the picture has no label."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return a figure with its caption."""
        name = self.arguments[0]
        if not self.content:
            raise self.error(f"the picture {name} needs a caption")
        if not (CONF / "pictures" / f"{name}.py").exists():
            raise self.error(f"there is no conf/pictures/{name}.py")
        for path in sources(name):
            self.env.note_dependency(str(path))
        text, messages = self.parse_inline(" ".join(self.content))
        caption = nodes.caption("", "", *text)
        picture = svg(name, self.config.language)
        if "aria-label" not in picture:
            label = html.escape(caption.astext(), quote=True)
            picture = picture.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        figure = nodes.figure("", nodes.raw("", picture, format="html"), caption)
        figure["classes"].append("picture")
        return [figure, *messages]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
