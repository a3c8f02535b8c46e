"""Concurrency limiting: at most so many at a time (semaphore, bulkhead)."""

from __future__ import annotations

import asyncio
from asyncio import get_running_loop
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeAlias, TypeVar, cast

from .errors import (
    ConcurrencyLimitExceeded,
    check_count,
    check_loop,
    check_seconds,
    check_thread,
    decorate,
    notify,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from types import TracebackType

__all__ = ["ConcurrencyLimiter", "ConcurrencyLimiterStatistics"]

P = ParamSpec("P")
R = TypeVar("R")

# Who waits, for how many slots, and since when if anybody wants to know.
_Waiter: TypeAlias = "tuple[asyncio.Future[None], int, float | None]"

_ONE = 1  # the usual weight; True and 1.0 equal it, but are not it


@dataclass(frozen=True, slots=True)
class ConcurrencyLimiterStatistics:
    """What a concurrency limiter holds and has done.

    Attributes:
        limit: How many slots there are.
        in_use: How many slots are in use now.
        waiting: How many callers wait for slots.
        peak: The most slots that have ever been in use at the same time.
        rejected: How many callers were refused because the line was full or the wait too long.
        waits: How many callers had to wait, and got their slots.
        wait_time: How many seconds these have waited, together; 0 unless the limiter is ``timed``.
        runs: How many callers got their slots, waiting or not; 0 unless it is ``timed``.
        run_time: How many seconds the slots have been in use, added up over the slots; 0 unless it
            is ``timed``.
    """

    limit: int
    in_use: int
    waiting: int
    peak: int
    rejected: int
    waits: int
    wait_time: float
    runs: int
    run_time: float


class ConcurrencyLimiter:
    """Let at most ``limit`` callers use a resource at the same time.

    A service that slows down collects more and more calls in flight, until connections, file
    handles or memory run out. A limiter makes the callers wait for a slot in line, first come,
    first served; a newcomer never overtakes. With ``max_queue`` and ``max_wait`` the line itself
    is bounded, so that an overload is refused at once instead of growing.

    A slot is given back exactly once, whatever happens: on success, error or cancellation, also
    when the cancellation comes in the very step in which the slot was granted.

    Args:
        limit: How many slots there are.
        max_queue: How many may wait for slots; ``None`` for any number, 0 for nobody.
        max_wait: The longest wait for slots in seconds; ``None`` for any.
        timed: Whether the statistics tell how long callers wait for slots and how long they use
            them. Then the clock is read for each caller, which costs about as much as the rest.

    Attributes:
        on_event: Called with the kind and the data of an event: ``concurrency_limiter.waited``
            (``seconds``, ``weight``), ``concurrency_limiter.rejected`` (``reason``); see
            :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If ``limit`` is below 1, or ``max_queue`` or ``max_wait`` below 0.

    The counting semaphore is Dijkstra's (EWD 74, 1963); with a bounded line it is the bulkhead
    of Nygard, "Release It!".
    """

    def __init__(
        self,
        limit: int,
        max_queue: int | None = None,
        max_wait: float | None = None,
        *,
        timed: bool = False,
    ) -> None:
        check_count("limit", limit)
        if max_queue is not None:
            check_count("max_queue", max_queue, least=0)
        if max_wait is not None:
            check_seconds("max_wait", max_wait)
        self._limit = limit
        self._max_queue = max_queue
        self._max_wait = max_wait
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._in_use = 0
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None  # for the first in line
        self._emptied: asyncio.Future[None] | None = None  # somebody drains
        self._closed = False
        self._peak = 0
        self._rejected = 0
        self._waits = 0
        self._wait_time = 0.0
        self._timed = timed
        self._joins = timed or max_queue is not None or max_wait is not None
        self._runs = 0
        self._run_time = 0.0  # the integral of _in_use over time
        self._loop: asyncio.AbstractEventLoop | None = None
        self._time: Callable[[], float] = float  # the loop's, when there is one

    def __repr__(self) -> str:
        bounds = {"limit": self._limit, "max_queue": self._max_queue, "max_wait": self._max_wait}
        told = [f"{name}={value}" for name, value in bounds.items() if value is not None]
        return f"ConcurrencyLimiter({', '.join(told)})"

    async def acquire(self, weight: int = 1) -> None:
        """Take ``weight`` slots; wait in line until they are free.

        Args:
            weight: How many slots.

        Raises:
            ValueError: If ``weight`` is below 1 or above the limit.
            ConcurrencyLimitExceeded: If ``max_queue`` callers wait already (its ``reason`` is
                ``"queue"``), the slots did not become free within ``max_wait`` (``"wait"``), or
                the limiter is closed (``"closed"``).
        """
        if get_running_loop() is not self._loop:
            self._bind()
        if weight is not _ONE:
            self._check(weight)
        in_use = self._in_use + weight
        if in_use <= self._limit and not self._waiters and not self._closed:
            # As _take() does, written out: the call would add a tenth.
            self._in_use = in_use
            if in_use > self._peak:  # noqa: PLR1730 -- max() is a call, too, and adds a twentieth
                self._peak = in_use
            if self._timed:
                self._begin_run(weight)
            return
        joined = self._join() if self._joins or self.on_event is not None else None
        waiter: asyncio.Future[None] = asyncio.Future()
        entry = (waiter, weight, joined)
        self._waiters.append(entry)
        try:
            await waiter
        except asyncio.CancelledError:
            self._give_up(entry)
            raise
        except ConcurrencyLimitExceeded as refusal:
            notify(self.on_event, "concurrency_limiter.rejected", reason=refusal.reason)
            raise
        self._waits += 1
        if joined is not None:
            self._end_wait(weight, joined)

    def try_acquire(self, weight: int = 1) -> bool:
        """Take ``weight`` slots if they are free and nobody waits; never wait.

        Args:
            weight: How many slots.

        Returns:
            Whether the slots were taken.

        Raises:
            ValueError: If ``weight`` is below 1 or above the limit.
        """
        if get_running_loop() is not self._loop:
            self._bind()
        if weight is not _ONE:
            self._check(weight)
        self._grant()  # who was cancelled in this very step is in nobody's way
        if self._waiters or self._closed or self._in_use + weight > self._limit:
            return False
        self._take(weight)
        return True

    def release(self, weight: int = 1) -> None:
        """Give ``weight`` slots back; the first in line get them.

        Args:
            weight: How many slots.

        Raises:
            ValueError: If ``weight`` is below 1.
            RuntimeError: If fewer slots are in use, or somebody in another thread waits for them
                or for the limiter to be drained.
        """
        if weight is not _ONE:
            check_count("weight", weight)
        if self._in_use < weight:
            held = f"only {self._in_use} slots are" if self._in_use else "no slot is"
            raise RuntimeError(f"release without acquire: {held} in use")
        if self._waiters or self._emptied is not None:
            check_thread(self, self._loop)
        self._release(weight)

    __aenter__ = acquire

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._in_use < 1:
            self.release()  # it was released inside already
        elif self._waiters or self._timed or self._emptied is not None:
            self._release(1)
        else:
            self._in_use -= 1  # nobody to tell: the call would add a tenth

    @asynccontextmanager
    async def slots(self, weight: int) -> AsyncIterator[None]:
        """Hold ``weight`` slots in a block; ``async with limiter`` holds one.

        Args:
            weight: How many slots.

        Raises:
            ConcurrencyLimitExceeded: As :meth:`acquire` does.
        """
        await self.acquire(weight)
        try:
            yield
        finally:
            self.release(weight)

    async def call(self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn`` while holding a slot.

        Args:
            fn: An asynchronous function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What ``fn`` returns.
        """
        async with self:
            return await fn(*args, **kwargs)

    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate an ``async def`` so that each of its calls holds a slot."""
        return decorate(self.call, fn)

    def resize(self, limit: int) -> None:
        """Change the number of slots, at once.

        With more, waiters get them now. With fewer, nobody is interrupted: slots that are given
        back are not given out again until no more than ``limit`` are in use.

        Args:
            limit: How many slots there are from now on.

        Raises:
            ValueError: If ``limit`` is below 1, or below what somebody in line waits for.
        """
        check_count("limit", limit)
        check_thread(self, self._loop)
        waiting = [weight for waiter, weight, _ in self._waiters if not waiter.done()]
        widest = max(waiting, default=1)
        if limit < widest:
            raise ValueError(f"limit must be at least {widest}, which is waited for, got {limit}")
        self._limit = limit
        self._grant()

    async def drain(self) -> None:
        """Wait until no slot is in use and nobody waits."""
        loop = get_running_loop()
        if loop is not self._loop:
            self._bind()
        while self._in_use:  # who waits does so for slots in use
            if self._emptied is None:
                self._emptied = asyncio.Future()
            await asyncio.shield(self._emptied)

    def close(self) -> None:
        """Let nobody in any more; those who wait are refused, those who are inside stay."""
        check_thread(self, self._loop)
        self._closed = self._joins = True
        while self._waiters:
            waiter, _, _ = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(self._refusal("closed", "the limiter is closed"))

    def statistics(self) -> ConcurrencyLimiterStatistics:
        """Return what the limiter holds and has done."""
        run_time = self._run_time
        if self._timed and self._in_use:  # they are still at it
            run_time += self._in_use * self._time()
        return ConcurrencyLimiterStatistics(
            limit=self._limit,
            in_use=self._in_use,
            waiting=len(self._waiters),
            peak=self._peak,
            rejected=self._rejected,
            waits=self._waits,
            wait_time=self._wait_time,
            runs=self._runs,
            run_time=run_time,
        )

    def _check(self, weight: int) -> None:
        check_count("weight", weight)
        if weight > self._limit:
            raise ValueError(f"weight must be at most the limit of {self._limit}, got {weight}")

    def _take(self, weight: int) -> None:
        self._in_use += weight
        self._peak = max(self._peak, self._in_use)
        if self._timed:
            self._begin_run(weight)

    def _release(self, weight: int) -> None:
        if self._waiters and self._in_use == self._limit:
            waiter, wanted, _ = entry = self._waiters.popleft()
            if wanted == weight and not waiter.done():
                waiter.set_result(None)  # handed over: as much stays in use as before
                if self._timed:
                    self._runs += 1
                return
            self._waiters.appendleft(entry)
        self._give_back(weight)
        self._grant()
        if self._emptied is not None and not self._in_use:
            self._emptied.set_result(None)
            self._emptied = None

    def _begin_run(self, weight: int) -> None:
        self._runs += 1
        self._run_time -= weight * self._time()

    def _give_back(self, weight: int) -> None:
        self._in_use -= weight
        if self._timed:
            self._run_time += weight * self._time()

    def _end_wait(self, weight: int, joined: float) -> None:
        seconds = self._time() - joined
        if self._timed:
            self._wait_time += seconds
        notify(self.on_event, "concurrency_limiter.waited", seconds=seconds, weight=weight)

    def _bind(self) -> None:
        self._loop = check_loop(self, self._loop)
        self._waiters.clear()  # whoever waited or held a slot on a loop that is gone does no longer
        self._give_back(self._in_use)
        self._time = self._loop.time
        self._timer = None
        self._emptied = None

    def _refusal(self, reason: str, message: str) -> ConcurrencyLimitExceeded:
        self._rejected += 1
        return ConcurrencyLimitExceeded(message, reason=reason)

    def _refuse(self, reason: str, message: str) -> NoReturn:
        refusal = self._refusal(reason, message)
        notify(self.on_event, "concurrency_limiter.rejected", reason=reason)
        raise refusal

    def _join(self) -> float:
        """Join the line, if that may still be; return the time, at which a wait begins."""
        if self._closed:
            self._refuse("closed", "the limiter is closed")
        if self._max_queue is not None and len(self._waiters) >= self._max_queue:
            self._grant()  # who was cancelled in this very step does not fill the line
            waiting = len(self._waiters)
            if waiting >= self._max_queue:
                self._refuse("queue", f"{self._in_use} are inside and {waiting} wait")
        now = self._time()
        if self._timer is None and self._max_wait is not None:
            self._set_timer(now + self._max_wait)
        return now

    def _set_timer(self, due: float) -> None:
        """Wait for the first in line: all may wait equally long, so they expire in their order."""
        self._timer = get_running_loop().call_at(due, self._expire, due)

    def _due(self, entry: _Waiter) -> float:
        return cast("float", entry[2]) + cast("float", self._max_wait)

    def _expire(self, due: float) -> None:
        """Refuse those whose wait is over, and set the timer for whoever is the first then."""
        self._timer = None
        now = max(due, self._time())
        while self._waiters and self._due(self._waiters[0]) <= now:
            waiter, _, _ = self._waiters.popleft()
            if not waiter.done():
                message = f"the slots did not become free within {self._max_wait} s"
                waiter.set_exception(self._refusal("wait", message))
        if self._waiters:
            self._set_timer(self._due(self._waiters[0]))
        self._grant()  # a heavy one may have stood in front of lighter ones

    def _give_up(self, entry: _Waiter) -> None:
        waiter, weight, _ = entry
        if not waiter.cancelled() and waiter.exception() is None:
            self.release(weight)  # granted and cancelled in the same step
            return
        if entry in self._waiters:
            self._waiters.remove(entry)
        self._grant()  # it may have stood in front of lighter ones

    def _grant(self) -> None:
        """Hand slots to those in line, in order; a heavy one is not passed by lighter ones."""
        while self._waiters:
            waiter, weight, _ = self._waiters[0]
            if not waiter.done():
                if self._in_use + weight > self._limit:
                    return
                self._take(weight)
                waiter.set_result(None)
            self._waiters.popleft()
