"""Live preview of one language: ``tox -e watch -- zh``, or ``-- en``."""

from __future__ import annotations

import sys

from build import LANGUAGES
from sphinx_autobuild.__main__ import main

if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "zh"
    if folder not in LANGUAGES:
        sys.exit(f"choose one of {', '.join(LANGUAGES)}, not {folder}")
    watched = ["--watch", "src", "--watch", "conf/pictures", "--watch", "conf/static"]
    language = ["-c", "conf", "-D", f"language={LANGUAGES[folder]}"]
    main([*watched, *language, f"docs/{folder}", f"build/watch/{folder}"])
