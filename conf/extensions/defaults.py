"""``{defaults} package.module.Class``: the arguments of a constructor, from its signature."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polib
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LOCALES = Path(__file__).parent.parent / "locales"
HEADINGS = {"zh": ("参数", "默认值", "含义"), "en": ("Argument", "Default", "Meaning")}
REQUIRED = {"zh": "必填", "en": "required"}
ARGUMENT = re.compile(
    r"^    \*{0,2}(\w+)(?: \([^)]*\))?: (.*(?:\n(?:     +\S.*|(?=\n)))*)", re.MULTILINE
)
ROLE = re.compile(r":(?:py:)?(\w+):`([^`]+)`")


def described(docstring: str) -> dict[str, str]:
    """Return the text of each argument in the ``Args:`` section of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return {}
    return {name: " ".join(text.split()) for name, text in ARGUMENT.findall(section[1])}


def first_sentence(text: str) -> str:
    """Return the first sentence, without its full stop."""
    return re.split(r"(?<=。)|\.(?:\s|$)", text, maxsplit=1)[0].rstrip("。")


def translated(text: str, module: str, language: str) -> str:
    """Return the translation in the catalog of the reference page, or the text itself."""
    file = LOCALES / language / "LC_MESSAGES" / "reference" / f"{module}.po"
    if not file.exists():
        return text
    entry = polib.pofile(str(file)).find(text)
    return str(entry.msgstr) if entry and entry.msgstr and not entry.fuzzy else text


class Defaults(SphinxDirective):
    """A table of arguments, defaults and meanings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        path, _, name = self.arguments[0].rpartition(".")
        target = getattr(importlib.import_module(path), name)
        module = target.__module__.rpartition(".")[2]
        language = self.config.language
        short = language[:2]
        texts = described(inspect.getdoc(target) or "")
        rows = []
        for parameter in inspect.signature(target).parameters.values():
            text = translated(texts.get(parameter.name, ""), module, language)
            rows.append(
                [
                    [nodes.literal("", parameter.name)],
                    [default(parameter, short)],
                    self.parse(first_sentence(text), target),
                ]
            )
        return [table(HEADINGS[short], rows)]

    def parse(self, text: str, target: Any) -> list[nodes.Node]:
        """Parse the reStructuredText of a docstring in a page of Markdown."""
        before = dict(self.env.ref_context)
        # Where ``:meth:`submit``` is looked up.
        self.env.ref_context |= {"py:module": target.__module__, "py:class": target.__qualname__}
        try:
            found, messages = self.parse_inline(ROLE.sub(r"{\1}`\2`", text))
        finally:
            self.env.ref_context.clear()
            self.env.ref_context |= before
        return [*found, *messages]


def default(parameter: inspect.Parameter, language: str) -> nodes.Node:
    """Return the default as it stands in the source."""
    if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
        return nodes.Text("—")
    if parameter.default is parameter.empty:
        return nodes.Text(REQUIRED[language])
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", repr(parameter.default))
    return nodes.literal("", re.sub(r"<(?:function|built-in method) (\w+).*>", r"\1", text))


def table(headings: tuple[str, ...], rows: list[list[list[nodes.Node]]]) -> nodes.table:
    """Return a table whose first row is the heading."""
    group = nodes.tgroup("", cols=len(headings))
    group += [nodes.colspec(colwidth=1) for _ in headings]
    head = [[nodes.Text(heading)] for heading in headings]
    group += nodes.thead("", row(head))
    group += nodes.tbody("", *(row(cells) for cells in rows))
    return nodes.table("", group, classes=["defaults"])


def row(cells: list[list[nodes.Node]]) -> nodes.row:
    """Return a row of cells."""
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("defaults", Defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
