"""Producer–consumer on asyncio: a bounded channel that can be closed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import ChannelClosed, ChannelEmpty, PatternError, QueueFull, check_count, check_loop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from contextlib import AbstractAsyncContextManager

__all__ = ["Channel", "ChannelStatistics", "produce_consume"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What a channel holds and has seen.

    Attributes:
        capacity: How many items the channel may hold.
        buffered: How many it holds now.
        peak: The most it has ever held.
        sent: How many items were sent into it.
        received: How many of them were taken out.
        waiting_senders: How many tasks wait for room.
        waiting_receivers: How many tasks wait for an item.
        closed: Whether it is closed.
    """

    capacity: int
    buffered: int
    peak: int
    sent: int
    received: int
    waiting_senders: int
    waiting_receivers: int
    closed: bool


class Channel(Generic[T]):
    """Hand items from the tasks that make them to the tasks that use them.

    A list between two tasks grows without bound when the maker is faster, and it cannot say
    that nothing more will come. A channel makes a fast sender wait (backpressure), and after
    :meth:`close` it hands out what it still holds and then ends the iteration of every receiver.

    Items come out in the order in which they went in, and tasks are served in the order in which
    they came. A cancelled :meth:`send` has sent nothing; a cancelled :meth:`receive` has taken
    nothing.

    Args:
        capacity: How many items may wait in the channel.

    Raises:
        ValueError: If ``capacity`` is below 1.

    This is the bounded buffer of Dijkstra (EWD 123, 1965) with the closing of CSP's descendants
    (Go, Trio).
    """

    # An item stays in the buffer until the very step in which its receiver returns it. A task
    # that is woken is only promised an item or a slot; if it is cancelled before it runs, the
    # promise goes to the next in line, and nothing was in flight that could have been lost.

    def __init__(self, capacity: int) -> None:
        check_count("capacity", capacity)
        self._capacity = capacity
        self._buffer: deque[T] = deque()
        self._ready = 0  # items in the buffer that are not promised to a receiver
        self._free = capacity  # slots not taken and not promised to a sender
        self._senders: deque[asyncio.Future[None]] = deque()
        self._receivers: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._sent = 0
        self._peak = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, item: T) -> None:
        """Put an item into the channel; wait while it is full.

        Args:
            item: What to send.

        Raises:
            ChannelClosed: If the channel is closed, before or while this call waits.
        """
        if asyncio.get_running_loop() is not self._loop:
            self._bind()
        if self._closed:
            raise ChannelClosed("send on a closed channel")
        if self._free > 0:
            self._free -= 1
        else:
            await self._wait_for_slot()
        self._put(item)

    def send_nowait(self, item: T) -> None:
        """Put an item into the channel if there is room at once.

        Args:
            item: What to send.

        Raises:
            QueueFull: If the channel is full, or others wait for room.
            ChannelClosed: If the channel is closed.
        """
        if self._closed:
            raise ChannelClosed("send on a closed channel")
        if self._free <= 0:
            raise QueueFull(f"the channel is full: capacity {self._capacity}")
        self._free -= 1
        self._put(item)

    async def receive(self) -> T:
        """Take the oldest item out of the channel; wait while it is empty.

        Returns:
            The item.

        Raises:
            ChannelClosed: If the channel is closed and empty.
        """
        if asyncio.get_running_loop() is not self._loop:
            self._bind()
        if self._ready > 0:
            self._ready -= 1
            self._offer_slot()
        else:
            await self._wait_for_item()
        return self._buffer.popleft()

    def receive_nowait(self) -> T:
        """Take the oldest item out of the channel if there is one.

        Returns:
            The item.

        Raises:
            ChannelEmpty: If there is none, or others wait for it.
            ChannelClosed: If the channel is closed and empty.
        """
        if self._ready > 0:
            self._ready -= 1
            self._offer_slot()
            return self._buffer.popleft()
        if self._closed:
            raise ChannelClosed("receive on a channel that is closed and empty")
        raise ChannelEmpty("the channel holds no item that is not promised")

    def close(self) -> None:
        """Say that nothing more will be sent.

        Waiting senders get :exc:`ChannelClosed`, what is in the channel can still be received,
        and then every receiver gets :exc:`ChannelClosed` and every ``async for`` ends. Closing
        a closed channel does nothing.
        """
        self._closed = True
        for line in (self._senders, self._receivers):
            while line:
                waiter = line.popleft()
                if not waiter.done():
                    waiter.set_exception(ChannelClosed("the channel was closed"))

    def __aiter__(self) -> Channel[T]:
        """Return the channel: iterating receives until it is closed and empty."""
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except ChannelClosed:
            raise StopAsyncIteration from None

    def statistics(self) -> ChannelStatistics:
        """Return what the channel holds and has seen."""
        return ChannelStatistics(
            capacity=self._capacity,
            buffered=len(self._buffer),
            peak=self._peak,
            sent=self._sent,
            received=self._sent - len(self._buffer),
            waiting_senders=len(self._senders),
            waiting_receivers=len(self._receivers),
            closed=self._closed,
        )

    def _bind(self) -> None:
        self._loop = check_loop(self, self._loop)
        self._senders.clear()  # whoever waited on a loop that is gone waits no longer
        self._receivers.clear()
        self._ready = len(self._buffer)
        self._free = self._capacity - self._ready

    def _put(self, item: T) -> None:
        self._buffer.append(item)
        self._sent += 1
        held = self._capacity - self._free
        if held > self._peak:  # noqa: PLR1730 -- max() doubles the time of a send
            self._peak = held
        self._offer_item()

    async def _wait_for_slot(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._senders.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not _leave(self._senders, waiter):
                self._offer_slot()
            raise
        if self._closed:
            raise ChannelClosed("the channel was closed")

    async def _wait_for_item(self) -> None:
        if self._closed:
            raise ChannelClosed("receive on a channel that is closed and empty")
        waiter = asyncio.get_running_loop().create_future()
        self._receivers.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not _leave(self._receivers, waiter):
                self._free -= 1  # the item takes its place again
                self._offer_item()
            raise

    def _offer_slot(self) -> None:
        """A slot is free: promise it to the first sender in line, or keep it."""
        self._free += 1
        if self._senders and self._free > 0 and _wake_first(self._senders):
            self._free -= 1

    def _offer_item(self) -> None:
        """An item is there: promise it to the first receiver in line, or keep it."""
        if self._receivers and _wake_first(self._receivers):
            self._offer_slot()  # what is promised takes no place any more
        else:
            self._ready += 1


def _wake_first(line: deque[asyncio.Future[None]]) -> bool:
    while line:
        waiter = line.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return True
    return False


def _leave(line: deque[asyncio.Future[None]], waiter: asyncio.Future[None]) -> bool:
    """Take a cancelled waiter out of its line; tell whether it had been promised nothing."""
    if waiter.cancelled():
        if waiter in line:
            line.remove(waiter)
        return True
    return waiter.exception() is not None


async def produce_consume(
    source: Iterable[T] | AsyncIterable[T],
    handle: Callable[[T], Awaitable[object]],
    *,
    consumers: int,
    capacity: int = 10,
) -> None:
    """Handle every item of a source, several at a time, and end when all are handled.

    The source is read only as fast as the consumers keep up: at most ``capacity`` items wait.

    Args:
        source: The items; an iterable or an asynchronous one, also an endless one.
        handle: Called with each item, exactly once.
        consumers: How many items are handled at the same time.
        capacity: How many items may wait between the source and the consumers.

    Raises:
        ExceptionGroup: If the source or ``handle`` raises. Everything else is cancelled first.
        ValueError: If ``consumers`` or ``capacity`` is below 1.
    """
    check_count("consumers", consumers)
    channel: Channel[T] = Channel(capacity)

    async def produce() -> None:
        await _send_all(source, channel)
        channel.close()

    async def consume() -> None:
        async for item in channel:
            await _handle_one(handle, item)

    async with asyncio.TaskGroup() as group:
        group.create_task(produce(), name="producer")
        for number in range(consumers):
            group.create_task(consume(), name=f"consumer {number}")


async def _send_all(source: Iterable[T] | AsyncIterable[T], channel: Channel[T]) -> None:
    if not isinstance(source, AsyncIterable):
        for item in source:
            await channel.send(item)
        return
    closing: AbstractAsyncContextManager[Any] = (
        aclosing(source) if hasattr(source, "aclose") else nullcontext()
    )
    async with closing:
        async for item in source:
            await channel.send(item)


async def _handle_one(handle: Callable[[T], Awaitable[object]], item: T) -> None:
    try:
        await handle(item)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # A task group takes a CancelledError for a silent end: the item would be lost unseen.
        raise PatternError(f"handling {item!r} raised CancelledError by itself") from error
