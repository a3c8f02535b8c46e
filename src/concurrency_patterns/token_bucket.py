"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

from .errors import (
    RateLimitExceeded,
    check_count,
    check_loop,
    check_positive,
    check_seconds,
    notify,
)
from .timeout import remaining

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from types import TracebackType

__all__ = ["TokenBucket", "TokenBucketStatistics", "TokenBuckets"]

P = ParamSpec("P")
R = TypeVar("R")
Cost = TypeVar("Cost")

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

    Attributes:
        on_event: Called with the kind and the data of an event: ``token_bucket.waited``
            (``seconds``, ``n``), ``token_bucket.rejected`` (``retry_after``, ``n``); see
            :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If ``rate`` is not above 0 or ``capacity`` is below 1.

    The algorithm is the generic cell rate algorithm (GCRA, ITU-T I.371): the token bucket
    (RFC 2697) told by the moment at which it will be full again.
    """

    def __init__(self, rate: float, capacity: int) -> None:
        check_positive("rate", rate)
        check_count("capacity", capacity)
        self._begin(_Level(rate, capacity), capacity, f"rate={rate!r}, capacity={capacity}")

    @classmethod
    def strict(cls, limit: int, per: float) -> TokenBucket:
        """Make a bucket that never lets more than ``limit`` calls start in any ``per`` seconds.

        A bucket of capacity N and rate N lets nearly 2 N calls start in one second: those it has
        saved up and those that the second brings. Where somebody counts strictly, this one
        remembers when each token was taken (a sliding window log), and needs memory for that.

        Args:
            limit: How many tokens in each period.
            per: The length of the period in seconds.

        Raises:
            ValueError: If ``limit`` is below 1 or ``per`` not above 0.
        """
        check_count("limit", limit)
        check_positive("per", per)
        bucket = cls.__new__(cls)
        bucket._begin(_Window(limit, per), limit, f"limit={limit}, per={per!r}")
        return bucket

    def _begin(self, level: _Level | _Window, capacity: int, described: str) -> None:
        self._level: _Level | _Window = level
        self._capacity = capacity
        self._described = described
        self._line: _Line[int] = _Line(level)
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        kind = "TokenBucket" if isinstance(self._level, _Level) else "TokenBucket.strict"
        return f"{kind}({self._described})"

    async def acquire(self, n: int = 1, timeout: float | None = None) -> None:  # noqa: ASYNC109 -- refuses early, which asyncio.timeout cannot
        """Take ``n`` tokens; wait in line until they are there.

        Args:
            n: How many tokens.
            timeout: The longest acceptable wait in seconds; ``None`` for any. A wait that would
                take longer, or longer than the :func:`~concurrency_patterns.timeout.deadline`
                around allows, is refused at once and not after the time has passed.

        Raises:
            ValueError: If ``n`` is below 1 or above the capacity.
            RateLimitExceeded: If the wait would be too long; its ``retry_after`` tells after how
                many seconds the tokens will be there.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind()
        if n != 1:
            self._check(n)
        if timeout is not None:
            check_seconds("timeout", timeout)
        line, level, now = self._line, self._level, loop.time()
        if level.full_at <= now and not line.waiters:
            # As level.take() does, written out: most calls find a full bucket, and the call
            # would add a quarter to their time.
            level.since = now
            level.taken = n
            level.full_at = now + n * level.interval
            line.granted += 1
        elif not line.waiters and level.take(n, now):
            line.granted += 1
        elif self.on_event is None:
            await line.wait(n, timeout)
        else:
            await _wait_and_tell(self, line, n, timeout)

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
        line, level, now = self._line, self._level, loop.time()
        if level.full_at <= now and not line.waiters:  # as in acquire()
            level.since = now
            level.taken = n
            level.full_at = now + n * level.interval
        elif line.waiters or not level.take(n, now):
            line.rejected += 1
            if self.on_event is not None:
                seconds = line.time_until(n, now)
                notify(self.on_event, "token_bucket.rejected", retry_after=seconds, n=n)
            return False
        line.granted += 1
        return True

    def settle(self, estimated: int, actual: int) -> None:
        """Correct the price of a call that took ``estimated`` tokens and has cost ``actual``.

        What was too much comes back at once. What was too little is taken even if the bucket does
        not hold it: then it owes, and the next callers wait until that is paid off.

        Args:
            estimated: How many tokens the call has taken.
            actual: How many it should have taken.

        Raises:
            ValueError: If one of them is negative.
        """
        check_count("estimated", estimated, least=0)
        check_count("actual", actual, least=0)
        self._level.give_back(estimated - actual, self._bind().time())
        self._line.serve()

    def set_rate(self, rate: float) -> None:
        """Change the rate, also for those who wait.

        Args:
            rate: Tokens gained a second from now on.

        Raises:
            ValueError: If ``rate`` is not above 0.
            TypeError: If the bucket is a strict one, which has no rate.
        """
        check_positive("rate", rate)
        if not isinstance(self._level, _Level):
            raise TypeError("a strict bucket has a limit and a period, and no rate to change")
        self._level.set_rate(rate, self._bind().time())
        self._described = f"rate={rate!r}, capacity={self._capacity}"
        self._line.serve()

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
        tokens = self._level.tokens(self._bind().time())
        return self._line.statistics(tokens)

    def _check(self, n: int) -> None:
        check_count("n", n)
        if n > self._capacity:
            raise ValueError(f"n must be at most the capacity of {self._capacity}, got {n}")

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; begin anew with it if it is another one than before."""
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self._line.begin()
            self._level.on_clock_changed(loop.time())
        return loop


class TokenBuckets:
    """Take tokens from several buckets at once: all or nothing, in one line.

    A service that bills requests and tokens a minute has two limits, and a call costs different
    amounts of each. Taking from one bucket and then waiting for the other wastes what the first
    one gave. Here a call waits until all of them have enough, and then takes from all.

    Args:
        **buckets: The buckets by name, such as ``requests=TokenBucket(...)``.

    Attributes:
        on_event: As in :class:`TokenBucket`; ``n`` is what was asked for, by name.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, **buckets: TokenBucket) -> None:
        if not buckets:
            raise ValueError("buckets must not be empty")
        self._buckets = buckets
        self._line: _Line[Mapping[str, int]] = _Line(_Levels(buckets))
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={bucket!r}" for name, bucket in self._buckets.items())
        return f"TokenBuckets({inside})"

    async def acquire(self, costs: Mapping[str, int], timeout: float | None = None) -> None:  # noqa: ASYNC109 -- as above
        """Take tokens from the buckets that are named; wait in line until all have enough.

        Args:
            costs: How many tokens of which bucket.
            timeout: The longest acceptable wait in seconds; a longer one is refused at once.

        Raises:
            ValueError: If a name is unknown, or a number below 1 or above the capacity.
            RateLimitExceeded: If the wait would be too long.
        """
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self._line.begin()
        if not costs or not costs.keys() <= self._buckets.keys():
            raise ValueError(f"costs must name some of {list(self._buckets)}, got {list(costs)}")
        for name, n in costs.items():
            self._buckets[name]._bind()
            self._buckets[name]._check(n)
        if timeout is not None:
            check_seconds("timeout", timeout)
        if not self._line.waiters and self._line.level.take(costs, loop.time()):
            self._line.granted += 1
        else:
            await _wait_and_tell(self, self._line, costs, timeout)

    def settle(self, name: str, estimated: int, actual: int) -> None:
        """Correct what a call took from one bucket, as :meth:`TokenBucket.settle` does."""
        if name not in self._buckets:
            raise ValueError(f"name must be one of {list(self._buckets)}, got {name!r}")
        self._buckets[name].settle(estimated, actual)
        self._line.serve()

    def statistics(self) -> dict[str, TokenBucketStatistics]:
        """Return for each bucket its tokens, and what the common line has done."""
        return {
            name: self._line.statistics(bucket.statistics().tokens)
            for name, bucket in self._buckets.items()
        }


class _Source(Protocol[Cost]):
    """Where tokens come from: arithmetic that is handed the time."""

    def take(self, n: Cost, now: float, late: float = 0.0) -> bool:
        """Take tokens if they are there at ``now``, or were due up to ``late`` ago."""

    def give_back(self, n: Cost, now: float) -> None:
        """Put tokens back that were taken and not used."""

    def wait(self, line: list[Cost], now: float) -> float:
        """Return the seconds after which all of the line can have been served."""


class _Line(Generic[Cost]):
    """Those who wait for tokens, in order, and the one timer that serves them."""

    def __init__(self, level: _Source[Cost]) -> None:
        self.level = level
        self.granted = 0
        self.rejected = 0
        self.begin()

    def begin(self) -> None:
        """Forget who waited on a loop that is gone: they wait no longer."""
        self.waiters: deque[tuple[asyncio.Future[None], Cost]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, n: Cost, timeout: float | None) -> None:  # noqa: ASYNC109 -- as above
        """Wait in line until the tokens are granted."""
        loop = asyncio.get_running_loop()
        limit = _least(timeout, remaining())
        if limit is not None:
            self._refuse_if_longer(n, limit, loop.time())
        waiter = loop.create_future()
        entry = (waiter, n)
        self.waiters.append(entry)
        if self._timer is None:
            self.serve()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # granted and cancelled in the same step
                self.granted -= 1
                self.level.give_back(n, loop.time())
            elif entry in self.waiters:
                self.waiters.remove(entry)
            self.serve()
            raise

    def _refuse_if_longer(self, n: Cost, limit: float, now: float) -> None:
        wait = self.time_until(n, now)
        if wait > limit + EARLY:
            self.rejected += 1
            raise RateLimitExceeded(
                f"the tokens come in {wait:.3g} s, which is more than {limit:.3g} s",
                retry_after=wait,
            )

    def time_until(self, n: Cost, now: float) -> float:
        """Return the seconds after which a call that joins the line now can be served."""
        return self.level.wait([*(cost for _, cost in self.waiters), n], now)

    def serve(self, due: float = math.inf) -> None:
        """Grant what can be granted, in order, and set the timer for the next in line.

        Args:
            due: When the timer that calls should have fired.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.waiters:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = min(max(0.0, now - due), LATE)
        while self.waiters:
            waiter, n = self.waiters[0]
            if not waiter.done():
                if not self.level.take(n, now, late):
                    due = now + self.level.wait([n], now)
                    self._timer = loop.call_at(due, self.serve, due)
                    return
                self.granted += 1
                waiter.set_result(None)
            self.waiters.popleft()

    def statistics(self, tokens: float) -> TokenBucketStatistics:
        """Return what the line has done, beside the tokens that there are."""
        return TokenBucketStatistics(tokens, len(self.waiters), self.granted, self.rejected)


async def _wait_and_tell(
    owner: TokenBucket | TokenBuckets,
    line: _Line[Cost],
    n: Cost,
    timeout: float | None,  # noqa: ASYNC109 -- as above
) -> None:
    """Wait in line, and tell the listener how that went."""
    clock = asyncio.get_running_loop().time
    start = clock()
    try:
        await line.wait(n, timeout)
    except RateLimitExceeded as error:
        notify(owner.on_event, "token_bucket.rejected", retry_after=error.retry_after, n=n)
        raise
    notify(owner.on_event, "token_bucket.waited", seconds=clock() - start, n=n)


class _Level:
    """The arithmetic of the bucket, without a clock of its own: it is handed the time.

    At ``since`` the bucket was full, and ``taken`` tokens have been taken since then; so it will
    be full again at ``full_at = since + taken / rate``. A product of a whole number does not
    drift, as a sum of a million small steps would.
    """

    __slots__ = ("capacity", "depth", "full_at", "interval", "since", "taken")

    def __init__(self, rate: float, capacity: int) -> None:
        self.capacity = capacity
        self.interval = 1 / rate  # seconds a token
        self.depth = capacity * self.interval + EARLY  # seconds to fill the empty bucket
        self.since = self.full_at = 0.0
        self.taken = 0

    def take(self, n: int, now: float, late: float = 0.0) -> bool:
        if self.full_at <= now - late:  # it is full: what overflows is lost
            self.since = since = now - late
            self.taken = n
            self.full_at = since + n * self.interval
            return True
        full_at = self.since + (self.taken + n) * self.interval
        if full_at > now + self.depth:
            return False
        self.taken += n
        self.full_at = full_at
        return True

    def give_back(self, n: int, now: float) -> None:
        self.take(0, now)  # a full bucket keeps nothing for what is taken in excess now
        self._set(self.since, self.taken - n)

    def wait(self, line: list[int], now: float) -> float:
        full_at = max(self.full_at, now) + sum(line) * self.interval
        return max(0.0, full_at - self.depth + EARLY - now)

    def tokens(self, now: float) -> float:
        """Return how many tokens are there at ``now``; below 0 if the bucket owes some."""
        missing = max(0.0, self.full_at - now)
        return round(self.capacity - missing / self.interval, 6)

    def set_rate(self, rate: float, now: float) -> None:
        """Keep the tokens that are there, and gain others at another rate."""
        missing = self.capacity - self.tokens(now)
        taken = math.ceil(missing)
        self.interval = 1 / rate
        self.depth = self.capacity * self.interval + EARLY
        self._set(now - (taken - missing) * self.interval, taken)

    def on_clock_changed(self, now: float) -> None:
        """Begin on another clock: the bucket is empty at worst, so that it cannot be stuck."""
        if self.full_at > now + self.depth:
            self._set(now, self.capacity)

    def _set(self, since: float, taken: int) -> None:
        self.since = since
        self.taken = taken
        self.full_at = since + taken * self.interval


class _Window:
    """A log of what was taken when: never more than ``limit`` in any period."""

    def __init__(self, limit: int, per: float) -> None:
        self.limit = limit
        self.per = per
        self.full_at = math.inf  # it cannot be told by one moment: always ask take()
        self.since = self.interval = 0.0
        self.taken = 0
        self.log: deque[tuple[float, int]] = deque()
        self.used = 0

    def take(self, n: int, now: float, late: float = 0.0) -> bool:
        self._forget(now)
        if self.used + n > self.limit:
            return False
        self.log.append((now, n))
        self.used += n
        return True

    def give_back(self, n: int, now: float) -> None:
        if n < 0:  # owed: it counts from now on, like what is taken
            self.log.append((now, -n))
            self.used -= n
            return
        self._forget(now)
        # Nobody tells whose tokens these are. Those of this moment go first: a grant that was
        # cancelled. Then the oldest, so that what stays in the log counts for longest.
        while n and self.log:
            of_now = self.log[-1][0] >= now
            when, held = self.log.pop() if of_now else self.log.popleft()
            back = min(n, held)
            n -= back
            self.used -= back
            if held > back:
                (self.log.append if of_now else self.log.appendleft)((when, held - back))

    def wait(self, line: list[int], now: float) -> float:
        self._forget(now)
        log, used, at = deque(self.log), self.used, now
        for n in line:
            while log and used + n > self.limit:
                when, back = log.popleft()
                at = max(at, when + self.per)
                used -= back
            log.append((at, n))
            used += n
        return at - now

    def tokens(self, now: float) -> float:
        """Return how many tokens are there at ``now``; below 0 if the bucket owes some."""
        self._forget(now)
        return float(self.limit - self.used)

    def on_clock_changed(self, now: float) -> None:
        """Begin on another clock: what was taken on the old one counts from now on."""
        if self.log and self.log[-1][0] > now:
            self.log = deque([(now, self.used)])

    def _forget(self, now: float) -> None:
        while self.log and self.log[0][0] + self.per <= now + EARLY:
            self.used -= self.log.popleft()[1]


class _Levels:
    """Several levels as one: what is taken is taken from all."""

    def __init__(self, buckets: Mapping[str, TokenBucket]) -> None:
        self._buckets = buckets

    def take(self, n: Mapping[str, int], now: float, late: float = 0.0) -> bool:
        taken: list[tuple[_Level | _Window, int]] = []
        for name, count in n.items():
            level = self._buckets[name]._level
            if not level.take(count, now, late):
                for other, given in taken:
                    other.give_back(given, now)
                return False
            taken.append((level, count))
        return True

    def give_back(self, n: Mapping[str, int], now: float) -> None:
        for name, count in n.items():
            self._buckets[name]._level.give_back(count, now)

    def wait(self, line: list[Mapping[str, int]], now: float) -> float:
        waits = []
        for name, bucket in self._buckets.items():
            wanted = [costs[name] for costs in line if name in costs]
            if wanted:
                waits.append(bucket._level.wait(wanted, now))
        return max(waits)


def _least(timeout: float | None, left: float | None) -> float | None:
    if timeout is None:
        return left
    return timeout if left is None else min(timeout, left)
