"""Retry: what it costs when all goes well, and what each failed attempt costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    OURS,
    Candidate,
    Case,
    Unavailable,
    awaits,
    calls,
    generic,
    noop,
    plain_noop,
)
from concurrency_patterns import Fixed, Retry

if TYPE_CHECKING:
    from benchmarks.harness import Maker, Measure

FAILURES = 10  # before the success, in the cases with failures
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def ours() -> Wrapper:
    """Ours, with no wait between the attempts."""
    return Retry(on=ConnectionError, attempts=FAILURES + 1, backoff=Fixed(0))


def ours_full() -> Wrapper:
    """Ours with limits of time."""
    return Retry(
        on=ConnectionError,
        attempts=FAILURES + 1,
        backoff=Fixed(0),
        max_elapsed=60,
        attempt_timeout=30,
    )


def tenacity() -> Wrapper:
    """tenacity."""
    from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_none

    return retry(
        retry=retry_if_exception_type(ConnectionError),
        stop=stop_after_attempt(FAILURES + 1),
        wait=wait_none(),
        reraise=True,
    )


def stamina() -> Wrapper:
    """stamina, with its hooks (logging) off."""
    import stamina
    from stamina.instrumentation import set_on_retry_hooks

    set_on_retry_hooks([])
    return stamina.retry(
        on=ConnectionError,
        attempts=FAILURES + 1,
        wait_initial=0,
        wait_max=0,
        wait_jitter=0,
        timeout=None,
    )


def backoff() -> Wrapper:
    """backoff, with its logger off."""
    import backoff

    return backoff.on_exception(
        backoff.constant,
        ConnectionError,
        max_tries=FAILURES + 1,
        interval=0,
        jitter=None,
        logger=None,
    )


def hyx() -> Wrapper:
    """hyx, for asynchronous functions only."""
    from hyx.retry import retry

    return retry(on=ConnectionError, attempts=FAILURES, backoff=0)


def nopanic() -> Wrapper:
    """nopanic."""
    from nopanic import backoff, retry

    return retry(attempts=FAILURES + 1, on=ConnectionError, backoff=backoff.fixed(0))


def redress() -> Wrapper:
    """redress."""
    from redress import default_classifier, retry

    return retry(
        classifier=default_classifier,
        strategy=lambda _context: 0.0,
        max_attempts=FAILURES + 1,
        max_unknown_attempts=None,
    )


PEERS: list[tuple[str, Callable[[], Wrapper], str]] = [
    ("nopanic.retry", nopanic, "nopanic"),
    ("backoff.on_exception", backoff, "backoff"),
    ("redress.retry", redress, "redress"),
    ("stamina.retry", stamina, "stamina"),
    ("tenacity.retry", tenacity, "tenacity"),
]
HYX = ("hyx.retry.retry", hyx, "hyx")


class Flaky:
    """A function that fails some times, succeeds once, and begins again."""

    def __init__(self) -> None:
        self._left = FAILURES

    def plain(self) -> None:
        """Fail or succeed."""
        self._left -= 1
        if self._left >= 0:
            raise ConnectionError
        self._left = FAILURES

    async def call(self) -> None:
        """Fail or succeed."""
        self.plain()


def smooth(wrapper: Callable[[], Wrapper]) -> Maker:
    """Call a function that never fails."""

    async def make() -> Measure:
        return awaits(wrapper()(noop))

    return make


def smooth_plain(wrapper: Callable[[], Wrapper]) -> Maker:
    """Call a plain function that never fails."""
    return lambda: calls(wrapper()(plain_noop))


def bumpy(wrapper: Callable[[], Wrapper]) -> Maker:
    """Call a function that fails ten times."""

    async def make() -> Measure:
        flaky = Flaky()

        async def call() -> None:
            await flaky.call()

        wrapped = wrapper()(call)
        await asyncio.wait_for(wrapped(), 10)
        if flaky._left != FAILURES:
            raise Unavailable("gave up before the tenth retry")
        return awaits(wrapped)

    return make


def bumpy_plain(wrapper: Callable[[], Wrapper]) -> Maker:
    """Call a plain function that fails ten times."""

    def make() -> Measure:
        flaky = Flaky()

        def call() -> None:
            flaky.plain()

        return calls(wrapper()(call))

    return make


def loop_by_hand() -> Wrapper:
    """Retry in a bare loop."""

    def wrap(fn: Callable[[], Any]) -> Callable[[], Any]:
        async def call() -> Any:
            for _ in range(FAILURES):
                try:
                    return await fn()
                except ConnectionError:
                    await asyncio.sleep(0)
            return await fn()

        return call

    return wrap


def plain_loop_by_hand() -> Wrapper:
    """Retry in a bare loop."""

    def wrap(fn: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            for _ in range(FAILURES):
                try:
                    return fn()
                except ConnectionError:
                    time.sleep(0)
            return fn()

        return call

    return wrap


def ours_call() -> Measure:
    """Ours without a decorator."""
    retry = Retry(on=ConnectionError)
    return awaits(lambda: retry.call(noop))


def ours_block() -> Measure:
    """Ours as a block."""
    retry = Retry(on=ConnectionError)

    async def call() -> None:
        async for attempt in retry:
            async with attempt:
                await noop()

    return awaits(call)


CASES = [
    Case(
        key="success",
        zh="async def，一次成功",
        en="async def, success at once",
        candidates=[
            Candidate("await noop()", lambda: awaits(noop)),
            Candidate("@Retry", smooth(ours), OURS, at_most=3.2),
            Candidate("@Retry(max_elapsed, attempt_timeout)", smooth(ours_full), OURS),
            Candidate("Retry.call", ours_call, OURS),
            Candidate("async for attempt in Retry", ours_block, OURS),
            Candidate("(decorator that does nothing)", lambda: awaits(generic(noop))),
            *(Candidate(name, smooth(peer), package) for name, peer, package in (HYX, *PEERS)),
        ],
    ),
    Case(
        key="failures",
        zh="async def，10 次失败后成功，中间不等",
        en="async def, 10 failures and a success, no waits",
        candidates=[
            Candidate("(bare loop with sleep(0))", bumpy(loop_by_hand)),
            Candidate("@Retry", bumpy(ours), OURS, at_most=1.3),
            Candidate("@Retry(max_elapsed, attempt_timeout)", bumpy(ours_full), OURS),
            *(Candidate(name, bumpy(peer), package) for name, peer, package in (HYX, *PEERS)),
        ],
        least=12,
        quick=12,
    ),
    Case(
        key="success_sync",
        zh="def，一次成功",
        en="def, success at once",
        candidates=[
            Candidate("noop()", lambda: calls(plain_noop)),
            Candidate("@Retry", smooth_plain(ours), OURS, at_most=5.5),
            *(Candidate(name, smooth_plain(peer), package) for name, peer, package in PEERS),
        ],
    ),
    Case(
        key="failures_sync",
        zh="def，10 次失败后成功，中间不等",
        en="def, 10 failures and a success, no waits",
        candidates=[
            Candidate("(bare loop with sleep(0))", bumpy_plain(plain_loop_by_hand)),
            Candidate("@Retry", bumpy_plain(ours), OURS),
            *(Candidate(name, bumpy_plain(peer), package) for name, peer, package in PEERS),
        ],
        least=12,
        quick=12,
    ),
]
