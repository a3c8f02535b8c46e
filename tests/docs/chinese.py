"""Check Chinese spacing and punctuation: ``python tests/docs/chinese.py [--fix]``.

autocorrect knows the rules (a blank between Chinese and Latin, full-width punctuation); this
only hands it the Chinese pages and prints what it would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import autocorrect_py

ROOT = Path(__file__).parent.parent.parent
# A term with a hyphen, not two words with a minus between them. Hidden behind a character that
# nobody writes, as this binding reads no configuration.
TERM, HIDDEN = "生产者-消费者", "生产者丶消费者"


def chinese_files() -> list[Path]:
    """Return the files that Chinese readers read."""
    pages = sorted((ROOT / "docs" / "zh").rglob("*.md"))
    catalogs = sorted((ROOT / "conf" / "locales" / "zh_CN").rglob("*.po"))
    return [ROOT / "README.zh.md", *pages, *catalogs]


def read(path: Path) -> str:
    """Return the text, with the term hidden that autocorrect takes for two words."""
    return path.read_text(encoding="utf-8").replace(TERM, HIDDEN)


def faults(path: Path) -> list[str]:
    """Return a line for each line of the file that is not written as it should be."""
    result = autocorrect_py.lint_for(read(path), path.name)
    name = path.relative_to(ROOT)
    return [
        f"{name}:{line.line}: {line.old.strip()} -> {line.new.strip()}" for line in result.lines
    ]


def main() -> int:
    """Print the faults, or mend them with ``--fix``; return 1 if there are any."""
    if "--fix" in sys.argv[1:]:
        for path in chinese_files():
            text = autocorrect_py.format_for(read(path), path.name)
            path.write_text(text.replace(HIDDEN, TERM), encoding="utf-8")
    found = [fault for path in chinese_files() for fault in faults(path)]
    print(*found, sep="\n")  # noqa: T201 -- a script
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
