"""Timeout: what a time limit around a call costs that keeps to it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from benchmarks.harness import OURS, Candidate, Case, awaits, blocks, noop
from concurrency_patterns import Timeout, deadline, move_on_after

if TYPE_CHECKING:
    from benchmarks.harness import Measure

SECONDS = 60.0


def standard() -> Measure:
    """asyncio.timeout, written in the place where it is needed."""

    async def call() -> object:
        async with asyncio.timeout(SECONDS):
            return await noop()

    return awaits(call)


def ours_call() -> Measure:
    """Ours as a policy."""
    policy = Timeout(SECONDS)
    return awaits(lambda: policy.call(noop))


def ours_decorator() -> Measure:
    """Ours as a decorator."""
    return awaits(Timeout(SECONDS)(noop))


def anyio_call() -> Measure:
    """anyio."""
    import anyio

    async def call() -> object:
        with anyio.fail_after(SECONDS):
            return await noop()

    return awaits(call)


def nopanic_decorator() -> Measure:
    """nopanic."""
    from nopanic import timeout

    return awaits(timeout(SECONDS)(noop))


async def hyx_decorator() -> Measure:
    """hyx."""
    from hyx.timeout import timeout

    return awaits(timeout(SECONDS)(noop))


CASES = [
    Case(
        key="call",
        zh="给一次调用限时",
        en="A time limit for one call",
        candidates=[
            Candidate("asyncio.timeout", standard),
            Candidate("Timeout.call", ours_call, OURS, at_most=1.3),
            Candidate("@Timeout", ours_decorator, OURS, at_most=1.3),
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate(
                "asyncio.wait_for", lambda: awaits(lambda: asyncio.wait_for(noop(), SECONDS))
            ),
            Candidate("anyio.fail_after", anyio_call, "anyio"),
            Candidate("nopanic.timeout", nopanic_decorator, "nopanic"),
            Candidate("hyx.timeout.timeout", hyx_decorator, "hyx"),
        ],
    ),
    Case(
        key="block",
        zh="给一段代码限时",
        en="A time limit for a block",
        candidates=[
            Candidate("asyncio.timeout", lambda: blocks(lambda: asyncio.timeout(SECONDS))),
            Candidate("deadline", lambda: blocks(lambda: deadline(SECONDS)), OURS),
            Candidate("move_on_after", lambda: blocks(lambda: move_on_after(SECONDS)), OURS),
        ],
    ),
]
