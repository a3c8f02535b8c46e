"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import RateLimitExceeded, check_count, check_loop, check_positive, check_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

__all__ = ["TokenBucket", "TokenBucketStatistics"]

P = ParamSpec("P")
R = TypeVar("R")

# A timer may fire this much too early: it is the resolution of asyncio's clock.
EARLY = 1e-9
# And about a millisecond late, more under load. A queue may make up for that much; without it a
# bucket of capacity 1 would lose a part of its rate at every wake-up.
LATE = 0.01


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

    The algorithm is the generic cell rate algorithm (GCRA, ITU-T I.371): the token bucket
    (RFC 2697) told by the moment at which it will be full again.
    """

    def __init__(self, rate: float, capacity: int) -> None:
        check_positive("rate", rate)
        check_count("capacity", capacity)
        self._level = _Level(rate, capacity)
        self._rate = rate
        self._capacity = capacity
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()
        self._queued = 0  # tokens that those in line wait for
        self._timer: asyncio.TimerHandle | None = None
        self._granted = 0
        self._rejected = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"TokenBucket(rate={self._rate!r}, capacity={self._capacity})"

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
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind()
        if n != 1:
            self._check(n)
        if not self._waiters and self._level.take(n, loop.time()):
            self._granted += 1
            return
        if timeout is not None:
            self._refuse_if_too_long(n, timeout, loop.time())
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
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind()
        if n != 1:
            self._check(n)
        if self._waiters or not self._level.take(n, loop.time()):
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
            tokens=self._level.tokens(self._bind().time()),
            waiting=len(self._waiters),
            granted=self._granted,
            rejected=self._rejected,
        )

    def _check(self, n: int) -> None:
        check_count("n", n)
        if n > self._capacity:
            raise ValueError(f"n must be at most the capacity of {self._capacity}, got {n}")

    def _refuse_if_too_long(self, n: int, timeout: float, now: float) -> None:
        check_seconds("timeout", timeout)
        wait = self._level.wait(self._queued + n, now)
        if wait > timeout + EARLY:
            self._rejected += 1
            raise RateLimitExceeded(
                f"the tokens come in {wait:.3g} s, which is more than {timeout} s",
                retry_after=wait,
            )

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; begin anew with it if it is another one than before."""
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self._waiters.clear()  # whoever waited on a loop that is gone waits no longer
            self._queued = 0
            self._timer = None
            self._level.on_clock_changed(loop.time())
        return loop

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
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiters:
            waiter, n = self._waiters[0]
            if not waiter.done():
                if not self._level.take(n, now, LATE):
                    self._timer = loop.call_later(self._level.wait(n, now), self._serve)
                    return
                self._granted += 1
                waiter.set_result(None)
            self._waiters.popleft()
            self._queued -= n


class _Level:
    """The arithmetic of the bucket, without a clock of its own: it is handed the time.

    At ``since`` the bucket was full, and ``taken`` tokens have been taken since then; so it will
    be full again at ``since + taken / rate``. A product of a whole number does not drift, as a
    sum of a million small steps would.
    """

    __slots__ = ("depth", "interval", "since", "taken")

    def __init__(self, rate: float, capacity: int) -> None:
        self.interval = 1 / rate  # seconds a token
        self.depth = capacity * self.interval  # seconds to fill the empty bucket
        self.since = 0.0
        self.taken = 0

    def take(self, n: int, now: float, late: float = 0.0) -> bool:
        """Take ``n`` tokens if they are there at ``now``, or were due up to ``late`` ago."""
        interval = self.interval
        if self.since + self.taken * interval <= now - late:  # full: what overflows is lost
            if n * interval > self.depth + late + EARLY:
                return False
            self.since = now - late
            self.taken = n
            return True
        taken = self.taken + n
        if self.since + taken * interval > now + self.depth + EARLY:
            return False
        self.taken = taken
        return True

    def give_back(self, n: int) -> None:
        """Put back ``n`` tokens that were taken and not used."""
        self.taken -= n

    def wait(self, n: int, now: float) -> float:
        """Return the seconds until ``n`` tokens are there."""
        full_at = max(self.since + self.taken * self.interval, now)
        return max(0.0, full_at + n * self.interval - self.depth - now)

    def tokens(self, now: float) -> float:
        """Return how many tokens are there at ``now``."""
        missing = max(0.0, self.since + self.taken * self.interval - now)
        return max(0.0, round((self.depth - missing) / self.interval, 6))

    def on_clock_changed(self, now: float) -> None:
        """Begin on another clock: the bucket is empty at worst, so that it cannot be stuck."""
        if self.since + self.taken * self.interval > now + self.depth:
            self.since = now
            self.taken = round(self.depth / self.interval)
