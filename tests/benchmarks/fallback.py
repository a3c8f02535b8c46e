"""Fallback: what it costs when nothing fails, and when the alternative has to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.harness import OURS, Candidate, Case, awaits, noop
from concurrency_patterns.fallback import Fallback, constant

if TYPE_CHECKING:
    from benchmarks.harness import Measure


async def failing() -> object:
    """Fail."""
    raise ConnectionError


async def alternative() -> object:
    """Answer."""
    return None


async def by_hand() -> object:
    """Answer in an ``except``."""
    try:
        return await failing()
    except ConnectionError:
        return await alternative()


def nopanic_success() -> Measure:
    """nopanic, when nothing fails."""
    from nopanic import fallback

    return awaits(fallback(None, on=ConnectionError)(noop))


def nopanic_failure() -> Measure:
    """nopanic, when the alternative has to answer."""
    from nopanic import fallback

    async def answer(*_: object) -> object:
        return await alternative()

    return awaits(fallback(answer, on=ConnectionError)(failing))


CASES = [
    Case(
        key="success",
        zh="一次成功",
        en="Success at once",
        candidates=[
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate("@Fallback", lambda: awaits(Fallback(constant(None))(noop)), OURS),
            Candidate("nopanic.fallback", nopanic_success, "nopanic"),
        ],
    ),
    Case(
        key="failure",
        zh="失败，由备选方案回答",
        en="Failure, and the alternative answers",
        candidates=[
            Candidate("(try and except)", lambda: awaits(by_hand)),
            Candidate("@Fallback", lambda: awaits(Fallback(alternative)(failing)), OURS),
            Candidate("nopanic.fallback", nopanic_failure, "nopanic"),
        ],
    ),
]
