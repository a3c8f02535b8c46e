"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import RateLimitExceeded, check_count, check_loop, check_positive, check_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

__all__ = ["TokenBucket", "TokenBucketStatistics"]

P = ParamSpec("P")
R = TypeVar("R")

NANOSECONDS = 1_000_000_000
# asyncio's timers fire up to about a millisecond late, more under load. A queue may make up for
# that much; without it a bucket of capacity 1 would lose a part of its rate at every wake-up.
LATENESS = 10_000_000


@dataclass(frozen=True, slots=True)
class TokenBucketStatistics:
    """What a token bucket holds and has done.

    Attributes:
        tokens: How many tokens are in the bucket now.
        waiting: How many calls wait for tokens.
        granted: How many calls got their tokens.
        rejected: How many calls were refused because the wait would have been too long.
    """

    tokens: float
    waiting: int
    granted: int
    rejected: int


class TokenBucket:
    """Let calls start at a rate that the service behind can bear.

    The bucket holds at most ``capacity`` tokens and gains ``rate`` tokens a second; a call takes
    one, or waits for it in line, first come, first served. After an idle spell up to ``capacity``
    calls start at once; in any period of W seconds at most ``capacity + rate * W`` calls start.

    A cancelled wait takes no token, and those behind it move up at once. Nothing polls: one timer
    is set for the moment at which the first in line can be served.

    Args:
        rate: Tokens gained a second; may be a fraction.
        capacity: The most tokens that the bucket holds, and so the largest burst. It starts full.

    Raises:
        ValueError: If ``rate`` is not above 0 or ``capacity`` is below 1.

    The algorithm is the generic cell rate algorithm (GCRA, ITU-T I.371), the form of the token
    bucket (RFC 2697) that keeps a single number; here a whole one, so that nothing drifts.
    """

    def __init__(self, rate: float, capacity: int) -> None:
        check_positive("rate", rate)
        check_count("capacity", capacity)
        self._level = _Level(rate, capacity)
        self._capacity = capacity
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        self._queued = 0  # tokens that those in line wait for
        self._timer: asyncio.TimerHandle | None = None
        self._granted = 0
        self._rejected = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def acquire(self, n: int = 1, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- refuses early, which asyncio.timeout cannot
        """Take ``n`` tokens; wait in line until they are there.

        Args:
            n: How many tokens.
            timeout: The longest acceptable wait in seconds; ``None`` for any. A wait that would
                take longer is refused at once, not after the time has passed.

        Raises:
            ValueError: If ``n`` is below 1 or above the capacity.
            RateLimitExceeded: If the wait would be longer than ``timeout``; its ``retry_after``
                tells after how many seconds the tokens will be there.
        """
        now = self._now()
        self._check(n)
        if not self._waiters and self._level.take(n, now):
            self._granted += 1
            return
        if timeout is not None:
            check_seconds("timeout", timeout)
            wait = self._level.wait(self._queued + n, now)
            if wait > timeout:
                self._rejected += 1
                raise RateLimitExceeded(
                    f"the tokens come in {wait:.3g} s, which is more than {timeout} s",
                    retry_after=wait,
                )
        await self._wait_in_line(n)

    def try_acquire(self, n: int = 1) -> bool:
        """Take ``n`` tokens if they are there and nobody waits; never wait.

        Args:
            n: How many tokens.

        Returns:
            Whether the tokens were taken.

        Raises:
            ValueError: If ``n`` is below 1 or above the capacity.
        """
        now = self._now()
        self._check(n)
        if self._waiters or not self._level.take(n, now):
            self._rejected += 1
            return False
        self._granted += 1
        return True

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: a token is spent, not lent."""

    async def call(self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Take one token, then call ``fn``.

        Args:
            fn: An asynchronous function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What ``fn`` returns.
        """
        await self.acquire()
        return await fn(*args, **kwargs)

    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate an ``async def`` so that each of its calls takes one token first."""
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(f"fn must be an async function, got {fn!r}")

        @functools.wraps(fn)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            return await self.call(fn, *args, **kwargs)

        return limited

    def statistics(self) -> TokenBucketStatistics:
        """Return what the bucket holds and has done; needs a running event loop for its clock."""
        return TokenBucketStatistics(
            tokens=self._level.tokens(self._now()),
            waiting=len(self._waiters),
            granted=self._granted,
            rejected=self._rejected,
        )

    def _check(self, n: int) -> None:
        check_count("n", n)
        if n > self._capacity:
            raise ValueError(f"n must be at most the capacity of {self._capacity}, got {n}")

    def _now(self) -> int:
        """Return the loop's time in nanoseconds."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = check_loop(self, self._loop)
            self._waiters.clear()  # whoever waited on a loop that is gone waits no longer
            self._queued = 0
            self._timer = None
        return round(loop.time() * NANOSECONDS)

    async def _wait_in_line(self, n: int) -> None:
        waiter = asyncio.get_running_loop().create_future()
        entry = (waiter, n)
        self._waiters.append(entry)
        self._queued += n
        if self._timer is None:
            self._serve()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._leave(entry)
            else:  # granted and cancelled in the same step
                self._granted -= 1
                self._level.give_back(n)
            self._serve()
            raise

    def _leave(self, entry: tuple[asyncio.Future[None], int]) -> None:
        if entry in self._waiters:  # _serve may have passed over it already
            self._waiters.remove(entry)
            self._queued -= entry[1]

    def _serve(self) -> None:
        """Grant what can be granted, in order, and set the timer for the next in line."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._now()
        while self._waiters:
            waiter, n = self._waiters[0]
            if not waiter.done():
                if not self._level.take(n, now, LATENESS):
                    wait = self._level.wait(n, now)
                    self._timer = asyncio.get_running_loop().call_later(wait, self._serve)
                    return
                self._granted += 1
                waiter.set_result(None)
            self._waiters.popleft()
            self._queued -= n


class _Level:
    """The arithmetic of the bucket: whole numbers, no clock of its own.

    The state is the moment at which the bucket will be full again. Time is counted in ticks of
    which one token takes a whole number, so that taking tokens never rounds.
    """

    def __init__(self, rate: float, capacity: int) -> None:
        exact = Fraction(str(rate))  # 0.1 means one tenth, not the nearest binary fraction
        self.ticks_per_nanosecond = exact.numerator
        self.ticks_per_token = exact.denominator * NANOSECONDS
        self.depth = capacity * self.ticks_per_token
        self.full_at: int | None = None

    def take(self, n: int, now: int, lateness: int = 0) -> bool:
        """Take ``n`` tokens if they are there at ``now``, or were due up to ``lateness`` ago."""
        ticks = now * self.ticks_per_nanosecond
        earliest = ticks - lateness * self.ticks_per_nanosecond
        full_at = self._full_at(ticks)
        full_at = max(full_at, earliest) + n * self.ticks_per_token
        if full_at > ticks + self.depth:
            return False
        self.full_at = full_at
        return True

    def give_back(self, n: int) -> None:
        """Put back ``n`` tokens that were taken and not used."""
        if self.full_at is not None:
            self.full_at -= n * self.ticks_per_token

    def wait(self, n: int, now: int) -> float:
        """Return the seconds until ``n`` tokens more than the line ahead wants are there."""
        ticks = now * self.ticks_per_nanosecond
        missing = max(self._full_at(ticks), ticks) + n * self.ticks_per_token - ticks - self.depth
        nanoseconds = -(-missing // self.ticks_per_nanosecond)  # rounded up: never too early
        return max(0, nanoseconds) / NANOSECONDS

    def tokens(self, now: int) -> float:
        """Return how many tokens are there at ``now``."""
        ticks = now * self.ticks_per_nanosecond
        missing = max(0, self._full_at(ticks) - ticks)
        return (self.depth - missing) / self.ticks_per_token

    def _full_at(self, ticks: int) -> int:
        if self.full_at is None:
            return ticks
        # After a step back of the clock the bucket is empty at worst: it cannot be stuck.
        self.full_at = min(self.full_at, ticks + self.depth)
        return self.full_at
