"""Pin each dependency group of pyproject.toml: ``tox -e pin``, or ``tox -e pin -- -U``.

One file a group, with hashes, good for every Python that the package supports, and without the
address of any index: whoever installs chooses where from.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONS = [
    "--quiet",
    "--universal",
    "--python-version=3.11",
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
]


def main() -> None:
    """Write conf/requirements/<group>.txt for each group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for group in project["dependency-groups"]:
        target = f"conf/requirements/{group}.txt"
        where = ["--group", group, "--output-file", target, "pyproject.toml"]
        subprocess.run(
            ["uv", "pip", "compile", *OPTIONS, *sys.argv[1:], *where], cwd=ROOT, check=True
        )


if __name__ == "__main__":
    main()
