"""Build both sites, and what stands above them: ``python conf/build.py [--check-catalogs]``.

The two languages are built side by side, each by the command that is printed, into build/html.
With ``--check-catalogs`` the check of ``conf/catalog.py`` runs beside them.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import settings

ROOT = Path(__file__).parent.parent
HTML = ROOT / "build" / "html"
LANGUAGES = {"zh": "zh_CN", "en": "en"}


def command(folder: str) -> list[str]:
    """Return the command that builds one language.

    The environment is read afresh each time (``-E -a``): links in programs, the sidebar and the
    pictures depend on more than the page itself.
    """
    options = ["-q", "-E", "-a", "-n", "-W", "--keep-going", "-c", "conf"]
    place = ["-D", f"language={LANGUAGES[folder]}", "-d", f"build/doctrees/{folder}"]
    return ["-m", "sphinx", *options, *place, f"docs/{folder}", f"build/html/{folder}"]


def build_pages() -> int:
    """Build both languages at the same time, and return 0 if both were built without a warning."""
    running = []
    for folder in LANGUAGES:
        arguments = command(folder)
        print("python", shlex.join(arguments), flush=True)
        running.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT))
    return max(abs(process.wait()) for process in running)


def build_root() -> None:
    """Write the page that chooses a language, the page for what is missing, and .nojekyll."""
    values = {
        "{site_url}": settings.SITE_URL,
        "{base}": urlsplit(settings.SITE_URL).path,
        "{fonts}": settings.FONTS,
    }
    for source in (ROOT / "conf" / "root").glob("*.html"):
        text = source.read_text(encoding="utf-8")
        for name, value in values.items():
            text = text.replace(name, value)
        (HTML / source.name).write_text(text, encoding="utf-8")
    (HTML / ".nojekyll").touch()  # GitHub Pages drops _static without it


def main() -> int:
    """Build everything."""
    check = None
    if "--check-catalogs" in sys.argv[1:]:
        check = subprocess.Popen([sys.executable, "conf/catalog.py", "check"], cwd=ROOT)
    failed = build_pages()
    if not failed:
        build_root()
    return failed or (abs(check.wait()) if check else 0)


if __name__ == "__main__":
    sys.exit(main())
