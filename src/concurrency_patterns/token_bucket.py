"""Rate limiting with a token bucket."""

from __future__ import annotations

import asyncio
import copy
import math
from asyncio import get_running_loop
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar

from .errors import (
    RateLimitExceeded,
    check_count,
    check_loop,
    check_positive,
    check_seconds,
    clock_of,
    decorate,
    notify,
)
from .timeout import remaining

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from types import TracebackType
    from typing import TypeAlias

__all__ = ["TokenBucket", "TokenBucketStatistics", "TokenBuckets"]

P = ParamSpec("P")
R = TypeVar("R")
Cost = TypeVar("Cost")

if TYPE_CHECKING:
    # What ends the wait (granted if it is done without a refusal), the cost, and the latest moment.
    _Waiter: TypeAlias = tuple[asyncio.Future[RateLimitExceeded | None], Cost, float]

# Nobody has to care for less: it is the resolution of asyncio's clock.
EARLY = 1e-9
# A timer fires about a millisecond late, more under load. A queue may make up for that much;
# without it a bucket of capacity 1 would lose a part of its rate at every wake-up.
LATE = 0.01
# Only the number itself passes for it, and not what is equal to it: 1.0 or True.
ONE = 1


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
        ValueError: If ``rate`` is not above 0 or too low to fill it ever, or ``capacity`` below 1.

    The algorithm is the generic cell rate algorithm (GCRA, ITU-T I.371): the token bucket
    (RFC 2697) told by the moment at which it will be full again.
    """

    def __init__(self, rate: float, capacity: int) -> None:
        check_count("capacity", capacity)
        _check_fills(rate, capacity)
        level = _Level(rate, capacity)
        self._begin(level, _PlainLine(level), capacity, f"rate={rate!r}, capacity={capacity}")

    @classmethod
    def strict(cls, limit: int, per: float) -> TokenBucket:
        """Make a bucket that never lets more than ``limit`` calls start in any ``per`` seconds.

        A bucket of capacity N and rate N lets nearly 2 N calls start in one second: those it has
        saved up and those that the second brings. Where somebody counts strictly, this one
        remembers when each call started (a sliding window log), and needs memory for that.

        A call starts when ``acquire`` returns. If other code holds the event loop up between the
        grant and that moment, the period counts from the later one; what the caller does after
        it, this bucket cannot see.

        What :meth:`settle` gives back is taken from the calls that started first and still count,
        since nobody tells which call it is. So settle a call before ``per`` seconds have passed:
        after that its own tokens count no more, and it would be those of others.

        Args:
            limit: How many tokens in each period.
            per: The length of the period in seconds.

        Raises:
            ValueError: If ``limit`` is below 1 or ``per`` not above 0.
        """
        check_count("limit", limit)
        check_positive("per", per)
        bucket = cls.__new__(cls)
        level = _Window(limit, per)
        bucket._begin(level, _Line(level), limit, f"limit={limit}, per={per!r}")
        return bucket

    def _begin(
        self, level: _Level | _Window, line: _Line[int], capacity: int, described: str
    ) -> None:
        self._level = level
        self._line = line
        self._capacity = capacity
        self._described = described
        self._is_shared = False  # does it belong to a TokenBuckets?
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
                around allows, is refused at once and not after the time has passed; in line, as
                soon as a debt or a lower rate makes it so long. A token that is granted in time
                comes later only if the event loop is late.

        Raises:
            ValueError: If ``n`` is below 1 or above the capacity.
            RateLimitExceeded: If the wait would be too long; its ``retry_after`` tells after how
                many seconds the tokens will be there.
        """
        if get_running_loop() is not self._loop:
            self._bind()
        if n is not ONE:
            self._check(n)
        if timeout is not None:
            check_seconds("timeout", timeout)
        line, level, now = self._line, self._level, self._clock()
        if level.full_at <= now and not line.waiters:
            # As line.take() does, written out: most calls find a full bucket, and it would double
            # their time. For the same reason the loop is got without looking into asyncio.
            level.full_at = now + n * level.interval
            line.granted += 1
        elif line.waiters or not line.take(n, now):
            if self.on_event is None:
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
        if get_running_loop() is not self._loop:
            self._bind()
        if n is not ONE:
            self._check(n)
        line, level, now = self._line, self._level, self._clock()
        if level.full_at <= now and not line.waiters:  # as in acquire()
            level.full_at = now + n * level.interval
            line.granted += 1
            return True
        if not line.waiters and line.take(n, now):
            return True
        line.rejected += 1
        if self.on_event is not None:
            seconds = line.due(n, now) - now
            notify(self.on_event, "token_bucket.rejected", retry_after=seconds, n=n)
        return False

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
        self._settle(estimated, actual, self._bind(), self._line)

    def set_rate(self, rate: float) -> None:
        """Change the rate, also for those who wait.

        Args:
            rate: Tokens gained a second from now on.

        Raises:
            ValueError: If ``rate`` is not above 0, or too low as for a new bucket.
            TypeError: If the bucket is a strict one, which has no rate.
        """
        self._set_rate(rate, self._bind(), self._line)

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
        return decorate(self.call, fn)

    def statistics(self) -> TokenBucketStatistics:
        """Return what the bucket holds and has done; needs a running event loop for its clock."""
        tokens = self._level.tokens(self._bind().time())
        return self._line.statistics(tokens)

    def _check(self, n: int) -> None:
        check_count("n", n)
        if n > self._capacity:
            raise ValueError(f"n must be at most the capacity of {self._capacity}, got {n}")

    def _settle(
        self, estimated: int, actual: int, loop: asyncio.AbstractEventLoop, line: _Line[Any]
    ) -> None:
        check_count("estimated", estimated, least=0)
        check_count("actual", actual, least=0)
        self._level.settle(actual - estimated, loop.time())
        if actual > estimated:
            line.adjust()
        else:
            line.serve()

    def _set_rate(self, rate: float, loop: asyncio.AbstractEventLoop, line: _Line[Any]) -> None:
        if not isinstance(self._level, _Level):
            raise TypeError("a strict bucket has a limit and a period, and no rate to change")
        _check_fills(rate, self._capacity)
        self._level.set_rate(rate, loop.time())
        self._described = f"rate={rate!r}, capacity={self._capacity}"
        line.adjust()

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Return the running loop; begin anew with it if it is another one than before."""
        if self._is_shared:
            raise RuntimeError(f"{self!r} belongs to a TokenBuckets, and is used only through it")
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self._clock = clock_of(loop)
            self._line.begin()
            self._level.on_clock_changed(loop.time())
        return loop


class TokenBuckets:
    """Take tokens from several buckets at once: all or nothing, in one line.

    A service that bills requests and tokens a minute has two limits, and a call costs different
    amounts of each. Taking from one bucket and then waiting for the other wastes what the first
    one gave. Here a call waits until all that it needs have enough, and then takes from all.

    The buckets belong to it from then on and are used only through it: where two lines stood
    before one bucket, nobody could say who is next. Calls that share only some of their limits,
    such as two models with one quota of requests, go through one ``TokenBuckets``, and each
    names the buckets that it needs.

    Args:
        **buckets: The buckets by name, such as ``requests=TokenBucket(...)``.

    Attributes:
        on_event: As in :class:`TokenBucket`; ``n`` is what was asked for, by name.

    Raises:
        ValueError: If there is none, or one belongs to a ``TokenBuckets`` already or is waited for.
    """

    def __init__(self, **buckets: TokenBucket) -> None:
        if not buckets:
            raise ValueError("buckets must not be empty")
        if len(set(buckets.values())) < len(buckets):
            raise ValueError(f"buckets must not be the same, got {buckets}")
        for name, bucket in buckets.items():
            if bucket._is_shared or bucket._line.waiters:
                raise ValueError(f"{name} must be a bucket that nobody else uses, got {bucket!r}")
        for bucket in buckets.values():
            bucket._is_shared = True
            bucket._loop = None  # so that each use of its own is refused
        self._buckets = buckets
        self._levels = {name: bucket._level for name, bucket in buckets.items()}
        self._line: _Line[Mapping[str, int]] = _Line(_Levels(self._levels))
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={bucket!r}" for name, bucket in self._buckets.items())
        return f"TokenBuckets({inside})"

    async def acquire(self, costs: Mapping[str, int], timeout: float | None = None) -> None:  # noqa: ASYNC109 -- as above
        """Take tokens from the buckets that are named; wait in line until all have enough.

        Args:
            costs: How many tokens of which bucket.
            timeout: The longest acceptable wait in seconds, as in :meth:`TokenBucket.acquire`.

        Raises:
            ValueError: If a name is unknown, or a number below 1 or above the capacity.
            RateLimitExceeded: If the wait would be too long.
        """
        loop = self._bind()
        costs = dict(costs)  # the caller's own may change while this one waits
        if not costs or not costs.keys() <= self._buckets.keys():
            raise ValueError(f"costs must name some of {list(self._buckets)}, got {list(costs)}")
        for name, n in costs.items():
            self._buckets[name]._check(n)
        if timeout is not None:
            check_seconds("timeout", timeout)
        if self._line.waiters or not self._line.take(costs, loop.time()):
            await _wait_and_tell(self, self._line, costs, timeout)

    def settle(self, name: str, estimated: int, actual: int) -> None:
        """Correct what a call took from one bucket, as :meth:`TokenBucket.settle` does."""
        self._bucket(name)._settle(estimated, actual, self._bind(), self._line)

    def set_rate(self, name: str, rate: float) -> None:
        """Change the rate of one bucket, as :meth:`TokenBucket.set_rate` does."""
        self._bucket(name)._set_rate(rate, self._bind(), self._line)

    def statistics(self) -> dict[str, TokenBucketStatistics]:
        """Return for each bucket its tokens, and what the common line has done."""
        now = self._bind().time()
        return {
            name: self._line.statistics(level.tokens(now)) for name, level in self._levels.items()
        }

    def _bucket(self, name: str) -> TokenBucket:
        if name not in self._buckets:
            raise ValueError(f"name must be one of {list(self._buckets)}, got {name!r}")
        return self._buckets[name]

    def _bind(self) -> asyncio.AbstractEventLoop:
        loop = check_loop(self, self._loop)
        if loop is not self._loop:
            self._loop = loop
            self._line.begin()
            for level in self._levels.values():
                level.on_clock_changed(loop.time())
        return loop


class _Source(Protocol[Cost]):
    """Where tokens come from: arithmetic that is handed the time."""

    def take(self, n: Cost, now: float, late: float = 0.0) -> bool:
        """Take tokens if they are there at ``now``, or have been for as long as ``late``."""

    def due(self, n: Cost, now: float) -> float:
        """Return when tokens can be taken: not after ``now`` if they are there."""

    def start(self, n: Cost, now: float) -> None:
        """Hear that the call starts for which tokens were taken."""

    def withdraw(self, n: Cost, now: float) -> None:
        """Put tokens back that were taken for a call which will not start."""

    def copy(self) -> _Source[Cost]:
        """Return one like this to try on what will be."""


class _Line(Generic[Cost]):
    """Those who wait for tokens, in order, and the one timer that serves them."""

    def __init__(self, level: _Source[Cost]) -> None:
        self.level = level
        self.granted = 0
        self.rejected = 0
        self.begin()

    def begin(self) -> None:
        """Forget who waited on a loop that is gone: they wait no longer."""
        self.waiters: deque[_Waiter[Cost]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        # How the level will be when all in line have been served, and when; None if not known.
        self._plan: tuple[_Source[Cost], float] | None = None

    def take(self, n: Cost, now: float) -> bool:
        """Take tokens if they are there; only for when nobody waits."""
        self._plan = None
        if not self.level.take(n, now):
            return False
        self.level.start(n, now)
        self.granted += 1
        return True

    async def wait(self, n: Cost, timeout: float | None) -> None:  # noqa: ASYNC109 -- as above
        """Wait in line until the tokens are granted."""
        loop = get_running_loop()
        limit = _least(timeout, remaining())
        latest = math.inf if limit is None else self._latest(n, limit, loop.time())
        waiter: _Waiter[Cost] = (asyncio.Future(), n, latest)
        self.join(waiter)
        if self._timer is None:
            self.serve()
        try:
            refused = await waiter[0]
        except asyncio.CancelledError:
            self._cancel(waiter, loop.time())
            raise
        if refused is not None:
            raise refused
        self.level.start(n, loop.time())
        self._plan = None

    def join(self, waiter: _Waiter[Cost]) -> None:
        """Stand in line."""
        self.waiters.append(waiter)
        if self._plan is not None:
            level, at = self._plan
            self._plan = level, _play(level, waiter[1], at)

    def leave(self, waiter: _Waiter[Cost]) -> None:
        """Stand in line no longer."""
        self.waiters.remove(waiter)

    def due(self, n: Cost, now: float) -> float:
        """Return when a call that joins the line now can be served."""
        if self._plan is None:
            level, at = self.level.copy(), now
            for _, ahead, _ in self.waiters:
                at = _play(level, ahead, at)
            self._plan = level, at
        level, at = self._plan
        return level.due(n, max(now, at))

    def _latest(self, n: Cost, limit: float, now: float) -> float:
        """Return until when the call may wait; refuse it if it would wait for longer."""
        wait = self.due(n, now) - now
        if wait > limit + EARLY:
            raise self._refusal(wait, limit)
        return now + limit + EARLY

    def _refusal(self, wait: float, limit: float) -> RateLimitExceeded:
        self.rejected += 1
        return RateLimitExceeded(
            f"the tokens come in {wait:.3g} s, which is more than {limit:.3g} s", retry_after=wait
        )

    def _cancel(self, waiter: _Waiter[Cost], now: float) -> None:
        future, n, _ = waiter
        if not future.cancelled():
            if future.result() is None:  # granted and cancelled in the same step
                self.granted -= 1
                self.level.withdraw(n, now)
        elif waiter in self.waiters:
            self.leave(waiter)
        self.serve()

    def adjust(self) -> None:
        """Go by what has changed: refuse those who would wait for too long now, serve the others.

        Their wait was foreseen when they joined; nothing but such a change makes it longer.
        """
        now = at = get_running_loop().time()
        level = self.level.copy()
        for waiter in list(self.waiters):
            future, n, latest = waiter
            due = level.due(n, at)
            if due <= latest:
                at = _play(level, n, at)
            elif not future.done():
                self.leave(waiter)
                future.set_result(self._refusal(due - now, latest - now))
        self.serve()

    def serve(self) -> None:
        """Grant what can be granted, in order, and set the timer for the next in line."""
        self._serve(get_running_loop().time(), 0.0)

    def _ring(self, due: float) -> None:
        """Serve at the moment for which the timer was set, or as long after it as it was late.

        A timer may fire a nanosecond early, and on a clock of many days that is less than the
        next number. So its moment counts as come.
        """
        now = get_running_loop().time()
        self._serve(max(now, due), min(max(0.0, now - due), LATE))

    def _serve(self, now: float, late: float) -> None:
        self._plan = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self.waiters:
            waiter = self.waiters[0]
            future, n, _ = waiter
            if not future.done():
                if not self.level.take(n, now, late):
                    due = self.level.due(n, now)
                    self._timer = get_running_loop().call_at(due, self._ring, due)
                    return
                self.granted += 1
                future.set_result(None)
            self.leave(waiter)

    def statistics(self, tokens: float) -> TokenBucketStatistics:
        """Return what the line has done, beside the tokens that there are."""
        return TokenBucketStatistics(tokens, len(self.waiters), self.granted, self.rejected)


class _PlainLine(_Line[int]):
    """The line before a plain bucket: a sum tells how long it takes, however many wait."""

    def begin(self) -> None:
        super().begin()
        self._ahead = 0

    def join(self, waiter: _Waiter[int]) -> None:
        self.waiters.append(waiter)
        self._ahead += waiter[1]

    def leave(self, waiter: _Waiter[int]) -> None:
        self.waiters.remove(waiter)
        self._ahead -= waiter[1]

    def due(self, n: int, now: float) -> float:
        return self.level.due(self._ahead + n, now)


def _play(level: _Source[Cost], n: Cost, now: float) -> float:
    """Let a call take its tokens as soon as they are there; return when that is."""
    now = max(now, level.due(n, now))
    level.take(n, now)
    level.start(n, now)
    return now


async def _wait_and_tell(
    owner: TokenBucket | TokenBuckets,
    line: _Line[Cost],
    n: Cost,
    timeout: float | None,  # noqa: ASYNC109 -- as above
) -> None:
    """Wait in line, and tell the listener how that went."""
    clock = get_running_loop().time
    start = clock()
    try:
        await line.wait(n, timeout)
    except RateLimitExceeded as error:
        notify(owner.on_event, "token_bucket.rejected", retry_after=error.retry_after, n=n)
        raise
    notify(owner.on_event, "token_bucket.waited", seconds=clock() - start, n=n)


class _Level:
    """The arithmetic of the bucket, without a clock of its own: it is handed the time.

    All that counts is ``full_at``, when the bucket will be full again. Each token moves it by an
    interval, and the sum of a million intervals would drift. So while the bucket does not get
    full, it is told as a product: ``since + taken * interval``.
    """

    __slots__ = ("capacity", "depth", "early", "full_at", "interval", "since", "taken")

    def __init__(self, rate: float, capacity: int) -> None:
        self.capacity = capacity
        self.since = self.full_at = 0.0
        self.taken = 0
        self._set_interval(rate)

    def _set_interval(self, rate: float) -> None:
        self.interval = 1 / rate  # seconds a token
        self.depth = self.capacity * self.interval  # seconds to fill the empty bucket
        # Who sleeps for just as long as a token takes must find it there, in spite of rounding.
        self.early = self.interval * 1e-6

    def take(self, n: int, now: float, late: float = 0.0) -> bool:
        if self.full_at + self.early < now - late:  # what overflows is lost
            self.full_at = now - late
        full_at = self._full_after(n)
        if full_at - self.depth > now + self.early:
            return False
        self.full_at = full_at
        self.taken += n
        return True

    def due(self, n: int, now: float) -> float:
        if self.full_at <= now:
            return now + max(0, n - self.capacity) * self.interval
        return self._full_after(n) - self.depth

    def _full_after(self, n: int) -> float:
        if self.full_at != self.since + self.taken * self.interval:  # it was set to another time
            self.since = self.full_at
            self.taken = 0
        return self.since + (self.taken + n) * self.interval

    def start(self, n: int, now: float) -> None:
        pass

    def withdraw(self, n: int, now: float) -> None:
        self.settle(-n, now)

    def settle(self, n: int, now: float) -> None:
        """Take ``n`` tokens in excess, there or not; or give back, if it is below 0."""
        self.full_at = max(self.full_at, now)
        self.full_at = self._full_after(n)
        self.taken += n

    def copy(self) -> _Level:
        return copy.copy(self)

    def tokens(self, now: float) -> float:
        """Return how many tokens are there at ``now``; below 0 if the bucket owes some."""
        return round(self.capacity - self._missing(now), 6)

    def _missing(self, now: float) -> float:
        return max(0.0, self.full_at - now) / self.interval

    def set_rate(self, rate: float, now: float) -> None:
        """Keep the tokens that are there, and gain others at another rate."""
        missing = self._missing(now)
        self._set_interval(rate)
        self.full_at = now + missing * self.interval

    def on_clock_changed(self, now: float) -> None:
        """Begin on another clock: the bucket is empty at worst, so that it cannot be stuck."""
        self.full_at = min(self.full_at, now + self.depth)


class _Window:
    """A log of which call started when: never more than ``limit`` in any period.

    Between the grant and the start, others may hold the event loop up. A token counts in
    ``used`` from the grant on, and is in the log from the start on.
    """

    full_at = math.inf  # it cannot be told by one moment: always ask due()
    interval = 0.0

    def __init__(self, limit: int, per: float) -> None:
        self.limit = limit
        self.per = per
        self.log: deque[tuple[float, int]] = deque()
        self.used = 0

    def take(self, n: int, now: float, late: float = 0.0) -> bool:
        self._forget(now)
        if self.used + n > self.limit:
            return False
        self.used += n
        return True

    def due(self, n: int, now: float) -> float:
        self._forget(now)
        used, at = self.used, now
        for when, started in self.log:
            if used + n <= self.limit:
                return at
            used -= started
            at = when + self.per
        # What is not in the log is about to start.
        return at if used + n <= self.limit else now + self.per

    def start(self, n: int, now: float) -> None:
        self.log.append((now, n))

    def withdraw(self, n: int, now: float) -> None:
        self.used -= n

    def settle(self, n: int, now: float) -> None:
        """Take ``n`` tokens in excess, which count from now on; or give back, if it is below 0.

        Nobody tells whose tokens come back. Those that started first go first, so that what stays
        counts for at least as long as it should.
        """
        if n > 0:
            self.used += n
            self.log.append((now, n))
            return
        self._forget(now)
        while n and self.log:
            when, started = self.log.popleft()
            back = min(-n, started)
            n += back
            self.used -= back
            if started > back:
                self.log.appendleft((when, started - back))

    def copy(self) -> _Window:
        other = copy.copy(self)
        other.log = self.log.copy()
        return other

    def tokens(self, now: float) -> float:
        """Return how many tokens are there at ``now``; below 0 if the bucket owes some."""
        self._forget(now)
        return float(self.limit - self.used)

    def on_clock_changed(self, now: float) -> None:
        """Begin on another clock: what was taken counts from now on, if nobody knows better."""
        unstarted = self.used - sum(started for _, started in self.log)
        if unstarted or (self.log and self.log[-1][0] > now):
            self.log = deque([(now, self.used)])

    def _forget(self, now: float) -> None:
        while self.log and self.log[0][0] + self.per <= now + EARLY:
            self.used -= self.log.popleft()[1]


class _Levels:
    """Several levels as one: what is taken is taken from all."""

    def __init__(self, levels: Mapping[str, _Level | _Window]) -> None:
        self._levels = levels

    def take(self, n: Mapping[str, int], now: float, late: float = 0.0) -> bool:
        taken: list[str] = []
        for name, count in n.items():
            if not self._levels[name].take(count, now, late):
                for other in taken:
                    self._levels[other].withdraw(n[other], now)
                return False
            taken.append(name)
        return True

    def due(self, n: Mapping[str, int], now: float) -> float:
        return max(self._levels[name].due(count, now) for name, count in n.items())

    def start(self, n: Mapping[str, int], now: float) -> None:
        for name, count in n.items():
            self._levels[name].start(count, now)

    def withdraw(self, n: Mapping[str, int], now: float) -> None:
        for name, count in n.items():
            self._levels[name].withdraw(count, now)

    def copy(self) -> _Levels:
        return _Levels({name: level.copy() for name, level in self._levels.items()})


def _check_fills(rate: float, capacity: int) -> None:
    """Refuse a bucket that takes longer to fill than a number can tell."""
    check_positive("rate", rate)
    check_positive("capacity", capacity)
    if math.isinf(capacity / rate):
        raise ValueError(f"rate must be enough to fill a capacity of {capacity}, got {rate!r}")


def _least(timeout: float | None, left: float | None) -> float | None:
    if timeout is None:
        return left
    return timeout if left is None else min(timeout, left)
