"""Check Chinese spacing and punctuation: ``python tests/docs/chinese.py [--fix]``.

autocorrect knows the rules (a blank between Chinese and Latin, full-width punctuation); this
only hands it the Chinese pages, and the translated messages one by one, and prints what it would
write. ``--fix`` mends the pages; a message is mended by hand, as it is reStructuredText.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import autocorrect_py
import polib

ROOT = Path(__file__).parent.parent.parent
# A term with a hyphen, not two words with a minus between them. Hidden behind a character that
# nobody writes, as this binding reads no configuration.
TERM, HIDDEN = "生产者-消费者", "生产者丶消费者"


def chinese_pages() -> list[Path]:
    """Return the pages that Chinese readers read."""
    return [ROOT / "README.zh.md", *sorted((ROOT / "docs" / "zh").rglob("*.md"))]


def corrected(text: str) -> str:
    """Return Markdown as autocorrect would write it."""
    return autocorrect_py.format_for(text.replace(TERM, HIDDEN), "page.md").replace(HIDDEN, TERM)


def faults_of_page(path: Path) -> list[str]:
    """Return a line for each line of a page that is not written as it should be."""
    text = path.read_text(encoding="utf-8")
    lines = zip(text.splitlines(), corrected(text).splitlines(), strict=True)
    name = path.relative_to(ROOT)
    return [
        f"{name}:{number}: {old.strip()} -> {new.strip()}"
        for number, (old, new) in enumerate(lines, 1)
        if old != new
    ]


def as_markdown(message: str) -> str:
    """Return a translated message with its reStructuredText markup as that of Markdown.

    The blank that reStructuredText wants between markup and a full-width bracket is left out.
    """
    message = re.sub(r":[\w:]+:(?=`)", "", message)
    return re.sub(
        r"(?<=`)(?:\\)? (?=[（“])|(?<=[）”])(?:\\)? (?=`)", "", message.replace("``", "`")
    )


def faults_of_catalog(path: Path) -> list[str]:
    """Return a line for each message that is not written as it should be."""
    name = path.relative_to(ROOT)
    messages = [as_markdown(entry.msgstr) for entry in polib.pofile(str(path))]
    return [f"{name}: {old} -> {corrected(old)}" for old in messages if old != corrected(old)]


def main() -> int:
    """Print the faults, or mend the pages with ``--fix``; return 1 if there are any."""
    if "--fix" in sys.argv[1:]:
        for path in chinese_pages():
            path.write_text(corrected(path.read_text(encoding="utf-8")), encoding="utf-8")
    found = [fault for path in chinese_pages() for fault in faults_of_page(path)]
    for path in sorted((ROOT / "conf" / "locales" / "zh_CN").rglob("*.po")):
        found += faults_of_catalog(path)
    print(*found, sep="\n")  # noqa: T201 -- a script
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
