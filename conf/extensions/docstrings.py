"""The API reference: every public name has a docstring, and its short names lead to it."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

logger = logging.getLogger(__name__)
PACKAGE = "concurrency_patterns"


def undocumented(module: ModuleType) -> Iterator[str]:
    """Yield the public names of ``module`` that have no docstring of their own."""
    if not module.__doc__:
        yield module.__name__
    for name in module.__all__:
        value = getattr(module, name, None)
        if value is not None and not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a constant or an alias of a type is told by a comment
        where = f"{module.__name__}.{name}"
        written = value.__doc__ or ""
        if not written or written.startswith(f"{name}("):  # the latter is dataclass's own
            yield where
        if inspect.isclass(value):
            yield from undocumented_methods(value, where)


def undocumented_methods(cls: type, where: str) -> Iterator[str]:
    """Yield the public methods and properties of ``cls`` that have no docstring."""
    for name in vars(cls):
        member = inspect.getattr_static(cls, name)
        documentable = inspect.isroutine(member) or isinstance(
            member, property | classmethod | staticmethod
        )
        if documentable and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield f"{where}.{name}"


def check_docstrings(  # noqa: PLR0917 -- autodoc-process-docstring passes six
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Warn, and so fail the build, about a public name without a docstring."""
    if what == "module":
        for missing in undocumented(obj):
            logger.warning("%s has no docstring", missing)


def skip_private(  # noqa: PLR0917 -- autodoc-skip-member passes six
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what the module does not name in ``__all__``."""
    if what != "module":
        return None
    module = sys.modules.get(getattr(obj, "__module__", ""))
    return True if name not in getattr(module, "__all__", [name]) else None


def separate_comment(  # noqa: PLR0917 -- autodoc-process-docstring passes six
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep Napoleon from reading "still running: nobody waits" as a type and its description."""
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]  # an empty comment, which Napoleon does not take apart


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Lead ``Retry`` and ``concurrency_patterns.Retry`` to ``concurrency_patterns.retry.Retry``."""
    if node.get("refdomain") != "py":
        return None
    end = "." + node["reftarget"].removeprefix(f"{PACKAGE}.")
    domain = env.get_domain("py")
    found = [name for name in domain.objects if name.startswith(PACKAGE) and name.endswith(end)]
    if len(found) != 1:
        return None
    kind = node["reftype"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, kind, found[0], node, content)


def unite_yields(  # noqa: PLR0917 -- autodoc-process-docstring passes six
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Tell what a generator yields as what it returns.

    sphinx-autodoc-typehints would write the type into the text of ``Yields:``, and do so with
    another markup in each of its versions, so that no translation fits.
    """
    lines[:] = [re.sub(r"^:Yields:", ":returns:", line) for line in lines]


class ChineseDash(SphinxTransform):
    """Write "name：meaning" in a Chinese list of arguments, where Sphinx puts two hyphens."""

    default_priority = 800

    def apply(self, **_: Any) -> None:
        """Replace the hyphens, if this is the Chinese site."""
        if not self.config.language.startswith("zh"):
            return
        for text in list(self.document.findall(nodes.Text)):
            if text == " -- " and isinstance(
                text.parent.parent, nodes.field_body | nodes.list_item
            ):
                text.parent.replace(text, nodes.Text("："))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts."""
    app.connect("autodoc-skip-member", skip_private)
    app.connect("autodoc-process-docstring", check_docstrings)
    app.connect("autodoc-process-docstring", separate_comment, priority=400)  # Napoleon: 500
    app.connect("autodoc-process-docstring", unite_yields)  # after Napoleon, before the types
    app.add_transform(ChineseDash)
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
