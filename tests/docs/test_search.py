"""The Chinese search cuts pages and queries alike."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "conf" / "extensions"))

from bigrams import SPLITTER, BigramChinese  # noqa: E402 -- found through the path above

TERMS = [
    "令牌桶",
    "快速失败",
    "指数退避",
    "优雅降级",
    "熔断器",
    "生产者",
    "工作池",
    "背压",
    "截止时间",
    "可观测性",
]


def pairs(term: str) -> set[str]:
    """Return the pairs of neighbouring characters."""
    return {term[i : i + 2] for i in range(len(term) - 1)}


def split_query(query: str) -> list[str]:
    """Do what the browser's part does, read off its own regular expressions."""
    pattern = re.search(r"query\.match\(/(.+?)/g\)", SPLITTER)
    assert pattern is not None
    runs = re.findall(pattern[1], query)
    return [
        piece
        for run in runs
        for piece in (sorted(pairs(run)) if not run.isascii() and len(run) > 1 else [run])
    ]


@pytest.mark.parametrize("term", TERMS)
def test_index_and_query_are_cut_alike(term: str) -> None:
    """What the query is cut into is what a page that holds the term is indexed under."""
    index = BigramChinese({}).split(f"先讲{term}，再讲 asyncio。")
    assert pairs(term) <= set(index)
    assert set(split_query(term)) == pairs(term)


def test_words_and_single_characters() -> None:
    """Latin words stay whole, and a query of one character is served too."""
    language = BigramChinese({})
    assert language.split("asyncio队列 锁") == ["asyncio", "队列", "队", "列", "锁"]
    assert language.word_filter("锁")
    assert not language.word_filter("x")
    assert sorted(split_query("asyncio队列")) == ["asyncio", "队列"]


def test_the_stemmer_exists() -> None:
    """Sphinx 9.0 writes this name into the search's script; there is no ChineseStemmer."""
    assert BigramChinese.language_name == "English"


def pages_with(index: dict[str, Any], term: str) -> set[int]:
    """Return the pages that hold a term in their text or in a title."""
    found = [index[part].get(term, []) for part in ("terms", "titleterms")]
    return {page for entry in found for page in (entry if isinstance(entry, list) else [entry])}


@pytest.mark.parametrize("term", TERMS)
def test_the_built_index_holds_the_term(pytestconfig: pytest.Config, term: str) -> None:
    """Some page of the built site is found under all pairs of the term."""
    folder = pytestconfig.getoption("--site", default=None) or "build/html"
    path = ROOT / folder / "zh" / "searchindex.js"
    if not path.exists():
        pytest.skip("the site is not built: tox -e docs")
    text = path.read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip().removesuffix(")"))
    assert set.intersection(*(pages_with(index, pair) for pair in pairs(term)))


def test_the_built_query_is_cut_by_our_rule(pytestconfig: pytest.Config) -> None:
    """The browser gets our rule, and a stemmer that exists."""
    folder = pytestconfig.getoption("--site", default=None) or "build/html"
    path = ROOT / folder / "zh" / "_static" / "language_data.js"
    if not path.exists():
        pytest.skip("the site is not built: tox -e docs")
    script = path.read_text(encoding="utf-8")
    assert SPLITTER.strip() in script
    assert "ChineseStemmer" not in script
