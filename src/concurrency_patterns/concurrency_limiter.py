"""Concurrency limiting: at most so many at a time (semaphore, bulkhead)."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import ConcurrencyLimitExceeded, check_count, check_loop, check_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

__all__ = ["ConcurrencyLimiter", "ConcurrencyLimiterStatistics"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ConcurrencyLimiterStatistics:
    """What a concurrency limiter holds and has done.

    Attributes:
        limit: How many may be inside at the same time.
        in_use: How many are inside now.
        waiting: How many wait for a slot.
        peak: The most that have ever been inside at the same time.
        rejected: How many were refused because the line was full or the wait too long.
    """

    limit: int
    in_use: int
    waiting: int
    peak: int
    rejected: int


class ConcurrencyLimiter:
    """Let at most ``limit`` callers use a resource at the same time.

    A service that slows down collects more and more calls in flight, until connections, file
    handles or memory run out. A limiter makes the callers wait for a slot in line, first come,
    first served; a newcomer never overtakes. With ``max_queue`` and ``max_wait`` the line itself
    is bounded, so that an overload is refused at once instead of growing.

    A slot is given back exactly once, whatever happens: on success, error or cancellation, also
    when the cancellation comes in the very step in which the slot was granted.

    Args:
        limit: How many may be inside at the same time.
        max_queue: How many may wait for a slot; ``None`` for any number, 0 for nobody.
        max_wait: The longest wait for a slot in seconds; ``None`` for any.

    Raises:
        ValueError: If ``limit`` is below 1, or ``max_queue`` or ``max_wait`` below 0.

    The counting semaphore is Dijkstra's (EWD 74, 1963); with a bounded line it is the bulkhead
    of Nygard, "Release It!".
    """

    def __init__(
        self, limit: int, max_queue: int | None = None, max_wait: float | None = None
    ) -> None:
        check_count("limit", limit)
        if max_queue is not None:
            check_count("max_queue", max_queue, least=0)
        if max_wait is not None:
            check_seconds("max_wait", max_wait)
        self._limit = limit
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._in_use = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._peak = 0
        self._rejected = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"ConcurrencyLimiter(limit={self._limit})"

    async def acquire(self) -> None:
        """Take a slot; wait in line until one is free.

        Raises:
            ConcurrencyLimitExceeded: If ``max_queue`` callers wait already (``reason`` is
                ``"queue"``), or no slot became free within ``max_wait`` (``"wait"``).
        """
        if not self.try_acquire():
            await self._wait_in_line()

    def try_acquire(self) -> bool:
        """Take a slot if one is free; never wait.

        Returns:
            Whether a slot was taken.
        """
        if asyncio.get_running_loop() is not self._loop:
            self._bind()
        if self._in_use >= self._limit:  # whoever waits has been handed each slot that came free
            return False
        self._in_use += 1
        if self._in_use > self._peak:  # noqa: PLR1730 -- max() adds a tenth to the time of a call
            self._peak = self._in_use
        return True

    def release(self) -> None:
        """Give a slot back; the first in line gets it.

        Raises:
            RuntimeError: If no slot is in use.
        """
        if self._in_use == 0:
            raise RuntimeError("release without acquire: no slot is in use")
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)  # handed over: the slot stays in use
                return
        self._in_use -= 1

    async def __aenter__(self) -> None:
        if not self.try_acquire():
            await self._wait_in_line()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

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
        if not inspect.iscoroutinefunction(fn):
            raise TypeError(f"fn must be an async function, got {fn!r}")

        @functools.wraps(fn)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            return await self.call(fn, *args, **kwargs)

        return limited

    def statistics(self) -> ConcurrencyLimiterStatistics:
        """Return what the limiter holds and has done."""
        return ConcurrencyLimiterStatistics(
            limit=self._limit,
            in_use=self._in_use,
            waiting=len(self._waiters),
            peak=self._peak,
            rejected=self._rejected,
        )

    def _bind(self) -> None:
        self._loop = check_loop(self, self._loop)
        self._waiters.clear()  # whoever waited or held a slot on a loop that is gone does no longer
        self._in_use = 0

    async def _wait_in_line(self) -> None:
        if self._max_queue is not None and len(self._waiters) >= self._max_queue:
            self._rejected += 1
            raise ConcurrencyLimitExceeded(
                f"{self._limit} are inside and {len(self._waiters)} wait", reason="queue"
            )
        if self._max_wait is None:
            await self._wait_for_slot()
            return
        try:
            async with asyncio.timeout(self._max_wait) as scope:
                await self._wait_for_slot()
        except TimeoutError:
            if not scope.expired():
                raise
            self._rejected += 1
            raise ConcurrencyLimitExceeded(
                f"no slot became free within {self._max_wait} s", reason="wait"
            ) from None

    async def _wait_for_slot(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.release()  # granted and cancelled in the same step: the next one gets it
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
