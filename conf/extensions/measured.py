"""``{measured}`proof.programs_zh```: a number that a run of the checks has written.

``proof.programs_zh`` is the key ``programs_zh`` in build/proof.json. As long as nothing was
measured, the page shows a dash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.util.docutils import SphinxRole

if TYPE_CHECKING:
    from sphinx.application import Sphinx

BUILD = Path(__file__).parent.parent.parent / "build"
NOTHING = "—"


def lookup(path: str, folder: Path = BUILD) -> str:
    """Return the figure that stands under ``path``, which begins with the name of the file."""
    name, *keys = path.split(".")
    file = folder / f"{name}.json"
    value: Any = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or isinstance(value, dict):
        return NOTHING
    return f"{value:,}" if isinstance(value, int | float) else str(value)


class Measured(SphinxRole):
    """One figure in running text."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the figure."""
        self.env.note_dependency(str(BUILD / f"{self.text.split('.')[0]}.json"))
        return [nodes.inline("", lookup(self.text), classes=["measured"])], []


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the role."""
    app.add_role("measured", Measured())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
