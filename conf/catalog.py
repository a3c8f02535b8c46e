"""Keep the Chinese catalogs of the API reference in step with the docstrings.

    python conf/catalog.py update   # take over new docstrings, drop those that are gone
    python conf/catalog.py check    # end with 1 if anything is missing, untranslated or different

There is one catalog a module: conf/locales/zh_CN/LC_MESSAGES/reference/<module>.po.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import polib

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "en"
CATALOGS = ROOT / "conf" / "locales" / "zh_CN" / "LC_MESSAGES" / "reference"
MARKUP = re.compile(r"``.+?``|:[\w:]+:`[^`]+`")
TYPE = ":sphinx_autodoc_typehints"  # a type, which nobody translates


class NoDocstringError(Exception):
    """A page of the reference has no docstring: the check would pass without checking."""


class NotTranslatableError(Exception):
    """sphinx-autodoc-typehints has written a type into a text."""


def templates(docs: Path = DOCS, python_path: str = "") -> dict[str, polib.POFile]:
    """Return the messages of the docstrings for each page of the reference.

    The titles of the pages are not among them: the pages are written in both languages.
    """
    pages = sorted(path.stem for path in (docs / "reference").glob("*.rst"))
    with tempfile.TemporaryDirectory() as out:
        only = ["-D", "master_doc=reference/index", "-D", "include_patterns=reference/*"]
        command = ["-m", "sphinx", "-q", "-E", "-b", "gettext", "-c", "conf", *only]
        environment = os.environ | ({"PYTHONPATH": python_path} if python_path else {})
        subprocess.run(
            [sys.executable, *command, str(docs), out], cwd=ROOT, check=True, env=environment
        )
        found = {page: Path(out, "reference", f"{page}.pot") for page in pages}
        return {page: messages(page, path) for page, path in found.items() if path.exists()}


def messages(page: str, path: Path) -> polib.POFile:
    """Return the messages that come from docstrings."""
    wanted = polib.POFile()
    for entry in polib.pofile(str(path)):
        # polib splits "file.py:docstring of package.name:3" at the blanks.
        words = [where for where, _ in entry.occurrences]
        names = sorted({name for before, name in itertools.pairwise(words) if before == "of"})
        if TYPE in entry.msgid:
            if " -- " in entry.msgid:
                raise NotTranslatableError(entry.msgid)
        elif names:
            where = [(name, "") for name in names]
            wanted.append(polib.POEntry(msgid=entry.msgid, occurrences=where))
    if not wanted:
        raise NoDocstringError(page)
    return wanted


def merged(wanted: polib.POFile, old: polib.POFile) -> polib.POFile:
    """Return the catalog with exactly the messages wanted, and the translations there were."""
    new = polib.POFile(wrapwidth=100)
    new.metadata = {
        "Language": "zh_CN",
        "Content-Type": "text/plain; charset=UTF-8",
        "Content-Transfer-Encoding": "8bit",
    }
    before = {entry.msgid: entry for entry in old if not entry.obsolete}
    for entry in wanted:
        known = before.get(entry.msgid)
        new.append(
            polib.POEntry(
                msgid=entry.msgid,
                msgstr=known.msgstr if known else "",
                flags=list(known.flags) if known else [],
                occurrences=entry.occurrences,
            )
        )
    return new


def problems(wanted: polib.POFile, catalog: polib.POFile) -> list[str]:
    """Return what keeps the catalog from being a full translation of the messages wanted."""
    entries = {entry.msgid: entry for entry in catalog if not entry.obsolete}
    names = {entry.msgid for entry in wanted}
    found = [f"not in the catalog: {msgid}" for msgid in sorted(names - entries.keys())]
    found += [f"no such docstring any more: {msgid}" for msgid in sorted(entries.keys() - names)]
    found += [f"obsolete: {entry.msgid}" for entry in catalog.obsolete_entries()]
    for msgid, entry in entries.items():
        if entry.fuzzy:
            found.append(f"fuzzy: {msgid}")
        elif not entry.msgstr:
            found.append(f"untranslated: {msgid}")
        elif sorted(MARKUP.findall(msgid)) != sorted(MARKUP.findall(entry.msgstr)):
            found.append(f"other markup than in the docstring: {msgid}")
    if not found and str(merged(wanted, catalog)) != str(catalog):
        found.append("not as `python conf/catalog.py update` writes it")
    return found


def load(path: Path) -> polib.POFile:
    """Return the catalog, empty if there is none."""
    return polib.pofile(str(path), wrapwidth=100) if path.exists() else polib.POFile()


def update(wanted: dict[str, polib.POFile], folder: Path = CATALOGS) -> None:
    """Write all catalogs anew, with the translations that there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for page, template in wanted.items():
        path = folder / f"{page}.po"
        merged(template, load(path)).save(str(path))
    for path in folder.glob("*.po"):
        if path.stem not in wanted:
            path.unlink()


def check(wanted: dict[str, polib.POFile], folder: Path = CATALOGS) -> list[str]:
    """Return the problems of all catalogs."""
    if not wanted:
        raise NoDocstringError("no page at all")
    found = [
        f"{page}.po: {problem}"
        for page, template in wanted.items()
        for problem in problems(template, load(folder / f"{page}.po"))
    ]
    extra = sorted(path.name for path in folder.glob("*.po") if path.stem not in wanted)
    return found + [f"{name}: no such page" for name in extra]


def main(arguments: list[str]) -> int:
    """Do what the command line asks for."""
    if arguments not in (["update"], ["check"]):
        print(__doc__)
        return 2
    wanted = templates()
    if arguments == ["update"]:
        update(wanted)
        return 0
    found = check(wanted)
    total = sum(len(template) for template in wanted.values())
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{total} messages in {len(wanted)} catalogs, {len(found)} problems")
    if found:
        print("`tox exec -e docs -- python conf/catalog.py update` writes down what to translate")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
