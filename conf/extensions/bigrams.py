"""Search in Chinese without a dictionary: every two neighbouring characters are a term.

The page's index and the reader's query are cut alike, so that any run of characters that stands
in a page is found. Sphinx's own Chinese search cuts only the index, and misses most phrases.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import snowballstemmer
from sphinx.search.zh import SearchChinese

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CHARACTERS = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(f"([{CHARACTERS}]+)|[a-zA-Z0-9_]+")

SPLITTER = r"""
var splitQuery = (query) =>
  (query.match(/[CHARACTERS]+|[a-zA-Z0-9_]+/g) || []).flatMap((run) =>
    run.length > 1 && /^[CHARACTERS]/.test(run)
      ? Array.from({ length: run.length - 1 }, (_, i) => run.slice(i, i + 2))
      : [run],
  );
""".replace("CHARACTERS", CHARACTERS)


class BigramChinese(SearchChinese):
    """Chinese in pairs of characters, anything else in words."""

    # Sphinx 9.0 names the stemmer's class by this, and Chinese has none (sphinx#14229).
    language_name = "English"
    js_splitter_code = SPLITTER

    def __init__(self, options: dict[str, str]) -> None:
        # The parent's would look for a dictionary of words.
        self.options = options
        self.latin_terms: set[str] = set()
        self.stemmer = snowballstemmer.stemmer("english")

    def split(self, input: str) -> list[str]:  # noqa: A002 -- as in SearchLanguage, which may be called by keyword
        """Cut a text of a page into terms; single characters too, for a query of one."""
        terms = []
        for match in TOKEN.finditer(input):
            run = match[0]
            if match[1]:
                terms += [run[i : i + 2] for i in range(len(run) - 1)]
                terms += run
            else:
                terms.append(run)
                self.latin_terms.add(run)
        return terms

    def word_filter(self, stemmed_word: str) -> bool:
        """Keep a single character if it is Chinese."""
        match = TOKEN.match(stemmed_word)
        return len(stemmed_word) > 1 or bool(match and match[1])


def setup(app: Sphinx) -> dict[str, Any]:
    """Replace Sphinx's Chinese search."""
    app.add_search_language(BigramChinese)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
