"""The Chinese and the English pages are in step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from steplock import (
    CHECKS,
    README_CHECKS,
    Source,
    missing_pages,
    read_pairs,
    reference_pages,
    repeated_targets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Check = Callable[[Source, Source], Iterator[str]]


@pytest.fixture(name="root")
def _root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.rootpath


def by_name(check: Check) -> str:
    """Name a test by its check."""
    return check.__name__


def refuse(faults: Iterator[str]) -> None:
    """Fail with one fault a line."""
    if told := "\n".join(faults):
        pytest.fail(told, pytrace=False)


def test_pages_exist_in_both_languages(root: Path) -> None:
    """Every page exists in both languages."""
    assert read_pairs(root)
    refuse(missing_pages(root))


@pytest.mark.parametrize("check", CHECKS, ids=by_name)
def test_pages_are_in_step(root: Path, check: Check) -> None:
    """Each pair of pages passes each check."""
    refuse(fault for zh, en in read_pairs(root) for fault in check(zh, en))


def test_reference_pages_are_in_step(root: Path) -> None:
    """The pages of the reference differ in their words alone."""
    refuse(reference_pages(root))


def test_targets_are_unique(root: Path) -> None:
    """No target stands twice in one language."""
    refuse(repeated_targets(read_pairs(root)))


@pytest.mark.parametrize("check", README_CHECKS, ids=by_name)
def test_readmes_are_in_step(root: Path, check: Check) -> None:
    """README.zh.md and README.md are one text."""
    zh = Source.read(root / "README.zh.md", root, root)
    en = Source.read(root / "README.md", root, root)
    refuse(check(zh, en))
