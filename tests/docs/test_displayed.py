"""What is displayed is what was run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from displayed import unproved
from programs import read_page

if TYPE_CHECKING:
    from pathlib import Path

LANGUAGES = ["zh", "en"]
LEAST_IN_A_LANGUAGE = 30
LEAST_ON_A_PATTERN_PAGE = 5
PATTERN_PAGES = [
    "producer-consumer",
    "worker-pool",
    "rate-limiting",
    "retry",
    "timeout-cancellation",
    "circuit-breaker",
    "fallback",
    "composition",
    "best-practices",
    "observability",
    "from-the-chapter",
]


def count(path: Path) -> int:
    """Return how many programs of a page are run."""
    page = read_page(path.read_text(encoding="utf-8"), str(path))
    return sum(not program.not_run for program in page.programs)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_shown_was_run(pytestconfig: pytest.Config, language: str) -> None:
    """Every Python block of the built pages is a program that was run, and the reverse."""
    folder = pytestconfig.getoption("--doctrees")
    if folder is None:
        pytest.skip("needs the built pages: tox -e docs, or --doctrees build/doctrees")
    doctrees = pytestconfig.rootpath / folder / language
    assert any(doctrees.rglob("*.doctree")), f"nothing was built into {doctrees}"
    if told := "\n".join(unproved(doctrees, pytestconfig.rootpath / "docs" / language)):
        pytest.fail(told, pytrace=False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_programs_are_many(pytestconfig: pytest.Config, language: str) -> None:
    """No change of a page or of the runner makes the programs vanish unnoticed."""
    pages = (pytestconfig.rootpath / "docs" / language).rglob("*.md")
    assert sum(map(count, pages)) >= LEAST_IN_A_LANGUAGE


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", PATTERN_PAGES)
def test_a_pattern_page_has_programs(pytestconfig: pytest.Config, language: str, name: str) -> None:
    """Each page of a pattern shows its use, its failures and the textbook's fault."""
    page = pytestconfig.rootpath / "docs" / language / f"{name}.md"
    assert count(page) >= LEAST_ON_A_PATTERN_PAGE
