"""The option of the browser tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--site``."""
    parser.addoption(
        "--site", metavar="DIR", help="the built site; without a browser its tests fail, not skip"
    )
