"""Write into English pages which Chinese text they translate.

python tests/docs/stamp.py docs/en/retry.md    one page, after it was brought up to date
python tests/docs/stamp.py --all               all pages
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from steplock import Source, read_pairs

ROOT = Path(__file__).parents[2]
STAMP = re.compile(r"^translation:.*\n(?:[ \t]+.*\n)*", re.MULTILINE)


def stamped(zh: Source, en: Source) -> str:
    """Return the English page with the stamp of the Chinese one."""
    line = f'translation: {{of: {zh.name}, sha: "{zh.sha}"}}\n'
    if not en.front_matter:
        return f"---\n{line}---\n\n{en.text}"
    front, fence, rest = en.text.removeprefix("---\n").partition("---\n")
    return f"---\n{STAMP.sub('', front)}{line}{fence}{rest}"


def main(pages: list[str]) -> None:
    """Stamp the pages named on the command line, in either language."""
    known = {(ROOT / source.path): pair for pair in read_pairs(ROOT) for source in pair}
    chosen = list(known) if pages == ["--all"] else [Path(page).resolve() for page in pages]
    if not chosen or not set(chosen) <= set(known):
        sys.exit(f"{__doc__}\nno such pair of pages: {' '.join(pages)}" if pages else __doc__)
    for zh, en in dict.fromkeys(known[page] for page in chosen):
        (ROOT / en.path).write_text(stamped(zh, en), encoding="utf-8")
        print(f"{en.path} translates {zh.path}, {zh.sha}")  # noqa: T201 -- a command


if __name__ == "__main__":
    main(sys.argv[1:])
