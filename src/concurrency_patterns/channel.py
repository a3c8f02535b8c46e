"""Producer–consumer on asyncio: a bounded channel that can be closed."""

from __future__ import annotations

import asyncio
import functools
import math
from abc import ABC, abstractmethod
from asyncio import get_running_loop
from collections import deque
from collections.abc import AsyncIterable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .errors import (
    ChannelClosed,
    ChannelEmpty,
    PatternError,
    QueueFull,
    check_count,
    check_loop,
    check_seconds,
    check_thread,
    notify,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
    )
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

__all__ = ["Channel", "ChannelStatistics", "Receiver", "Sender", "produce_consume"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """What a channel holds and has seen.

    Attributes:
        capacity: How many items the channel may hold.
        buffered: How many it holds now; more than ``capacity`` while a batch is gathered, or if a
            receiver was cancelled as an item was on its way to it.
        peak: The most it has ever held.
        sent: How many items were sent into it.
        received: How many of them were taken out.
        dropped: How many items were dropped because it was full.
        waiting_senders: How many tasks wait for room.
        waiting_receivers: How many tasks wait for an item.
        closed: Whether it is closed.
    """

    capacity: int
    buffered: int
    peak: int
    sent: int
    received: int
    dropped: int
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
        overflow: What :meth:`send` does when it is full: ``"wait"`` for room, ``"reject"`` the
            item with :exc:`~concurrency_patterns.errors.QueueFull`, ``"drop_oldest"`` to make
            room, or ``"drop_newest"``, which is the item itself.
        on_drop: Called with each item that is dropped; what it raises is logged.

    Attributes:
        on_event: Called with the kind and the data of an event: ``channel.dropped`` (``item``),
            ``channel.rejected``, ``channel.closed``; see
            :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If ``capacity`` is below 1, or ``overflow`` none of these words.

    This is the bounded buffer of Dijkstra (EWD 123, 1965) with the closing of CSP's descendants
    (Go, Trio).
    """

    # An item stays in the buffer until the very step in which its receiver returns it. A task
    # that is woken is only promised an item or a slot; if it is cancelled before it runs, the
    # promise goes to the next in line, and nothing was in flight that could have been lost. So
    # a receiver of a closed channel waits until all that is promised to others has been taken.
    #
    # What is promised is an item or a slot, not which one. Another task that comes before the
    # woken one runs may take the oldest item or send first, if there are enough for both: so items
    # come out in their order, and tasks need not wait for each other in turn, item by item.

    def __init__(
        self,
        capacity: int,
        *,
        overflow: Literal["wait", "reject", "drop_oldest", "drop_newest"] = "wait",
        on_drop: Callable[[T], object] | None = None,
    ) -> None:
        check_count("capacity", capacity)
        if overflow not in {"wait", "reject", "drop_oldest", "drop_newest"}:
            raise ValueError(
                "overflow must be 'wait', 'reject', 'drop_oldest' or 'drop_newest', "
                f"got {overflow!r}"
            )
        self._capacity = capacity
        self._overflow = overflow
        self._on_drop = on_drop
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._buffer: deque[T] = deque()
        self._promised = 0  # items in the buffer that are promised to a receiver
        # So many items the buffer may hold: one more for each that is promised, one less for each
        # slot that is promised to a sender; none when the channel is closed.
        self._room: float = capacity
        self._senders: deque[asyncio.Future[None]] = deque()
        self._receivers: deque[asyncio.Future[None]] = deque()
        self._gathering: deque[asyncio.Future[None]] = deque()  # those whose batch has begun
        self._open_senders = 0
        self._open_receivers = 0
        self._closed = ""  # why
        self._sent = 0
        self._peak = 0
        self._dropped = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(self, item: T) -> None:
        """Put an item into the channel; wait while it is full, or do what ``overflow`` says.

        Args:
            item: What to send.

        Raises:
            ChannelClosed: If the channel is closed, before or while this call waits.
            QueueFull: If it is full and ``overflow`` is ``"reject"``.
        """
        if get_running_loop() is not self._loop:
            self._bind()
        buffer = self._buffer
        held = len(buffer)
        if held >= self._room:
            if self._overflow != "wait" or self._closed:
                self._overflow_with(item)
                return
            waiter: asyncio.Future[None] = asyncio.Future()
            self._senders.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._give_up_slot(waiter)
                raise
            self._room += 1  # the promise is kept
            if self._closed:
                raise ChannelClosed(self._closed)
            held = len(buffer)
        # As _put() does, written out: the call would add a twentieth to the time of an item.
        buffer.append(item)
        self._sent += 1
        if self._receivers and _wake(self._receivers):
            self._promised += 1
            self._room += 1
            if self._senders:
                self._offer_slot()
        elif held >= self._peak:
            self._note_peak()

    def send_nowait(self, item: T) -> None:
        """Put an item into the channel if there is room at once, or do what ``overflow`` says.

        Args:
            item: What to send.

        Raises:
            QueueFull: If the channel is full, or others wait for room.
            ChannelClosed: If the channel is closed.
            RuntimeError: If the channel is in use by an event loop in another thread.
        """
        check_thread(self, self._loop)
        if len(self._buffer) < self._room:
            self._put(item)
        else:
            self._overflow_with(item)

    async def receive(self) -> T:
        """Take the oldest item out of the channel; wait while it is empty.

        Returns:
            The item.

        Raises:
            ChannelClosed: If the channel is closed and empty.
        """
        if get_running_loop() is not self._loop:
            self._bind()
        buffer = self._buffer
        if len(buffer) <= self._promised:
            if self._closed and not buffer:
                raise ChannelClosed(self._closed)
            waiter: asyncio.Future[None] = asyncio.Future()
            self._receivers.append(waiter)
            if self._senders:
                self._offer_slot()
            try:
                await waiter
            except asyncio.CancelledError:
                self._give_up_item(waiter)
                raise
            self._promised -= 1  # the promise is kept
            self._room -= 1
            if self._closed and len(buffer) == 1:
                _refuse(self._receivers, self._closed)
        item = buffer.popleft()
        if self._senders and len(buffer) < self._room and _wake(self._senders):
            self._room -= 1
        return item

    def receive_nowait(self) -> T:
        """Take the oldest item out of the channel if there is one.

        Returns:
            The item.

        Raises:
            ChannelEmpty: If there is none, or others wait for it.
            ChannelClosed: If the channel is closed and empty.
            RuntimeError: If the channel is in use by an event loop in another thread.
        """
        check_thread(self, self._loop)
        if len(self._buffer) > self._promised:
            item = self._buffer.popleft()
            self._offer_slot()
            return item
        if self._closed and not self._buffer:
            raise ChannelClosed(self._closed)
        raise ChannelEmpty("the channel holds no item that is not promised")

    def close(self) -> None:
        """Say that nothing more will be sent.

        Waiting senders get :exc:`~concurrency_patterns.errors.ChannelClosed`, what is in the
        channel can still be received, and then every receiver gets that error and every
        ``async for`` ends. Closing a closed channel does nothing.
        """
        self._close("the channel is closed")

    def __aiter__(self) -> Channel[T]:
        """Return the channel: iterating receives until it is closed and empty."""
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except ChannelClosed:
            raise StopAsyncIteration from None

    def batches(self, max_size: int, max_wait: float) -> AsyncIterator[list[T]]:
        """Receive items in batches, until the channel is closed and empty.

        While a batch is gathered, its items stay in the channel without taking a place there; a
        cancelled wait for a batch has taken nothing, and the iteration can go on after it.

        Args:
            max_size: How many items a batch holds at most.
            max_wait: How many seconds after its first item a batch is given out at the latest.

        Returns:
            An iterator over batches of at least one item.

        Raises:
            ValueError: If ``max_size`` is below 1, or ``max_wait`` negative or not finite.
        """
        check_count("max_size", max_size)
        check_seconds("max_wait", max_wait)
        return _Batches(self, max_size, max_wait)

    def sender(self) -> Sender[T]:
        """Return one of several senders; when the last of them is closed, the channel closes.

        Make all of them before the first one can be closed. A task that is cancelled before its
        first step never reaches its ``with``: to close a sender with its task whatever happens,
        write ``task.add_done_callback(lambda _: sender.close())``.
        """
        self._open_senders += 1
        return Sender(self)

    def receiver(self) -> Receiver[T]:
        """Return one of several receivers; when the last of them is closed, the channel closes.

        Then senders get :exc:`~concurrency_patterns.errors.ChannelClosed` instead of waiting for
        room that nobody will make, and :meth:`receive_nowait` still gives what was left.
        """
        self._open_receivers += 1
        return Receiver(self)

    def statistics(self) -> ChannelStatistics:
        """Return what the channel holds and has seen."""
        return ChannelStatistics(
            capacity=self._capacity,
            buffered=len(self._buffer),
            peak=self._peak,
            sent=self._sent,
            received=self._sent - len(self._buffer),
            dropped=self._dropped,
            waiting_senders=len(self._senders),
            waiting_receivers=len(self._receivers),
            closed=bool(self._closed),
        )

    def _bind(self) -> None:
        self._loop = check_loop(self, self._loop)
        self._senders.clear()  # whoever waited on a loop that is gone waits no longer
        self._receivers.clear()
        self._gathering.clear()
        self._promised = 0
        self._room = -math.inf if self._closed else self._capacity

    def _close(self, reason: str) -> None:
        check_thread(self, self._loop)
        first = not self._closed
        self._closed = self._closed or reason
        self._room = -math.inf
        _refuse(self._senders, reason)
        _refuse(self._gathering, reason)  # a batch that has begun waits for nothing more
        if not self._buffer:
            _refuse(self._receivers, reason)
        if first:
            notify(self.on_event, "channel.closed")

    def _put(self, item: T) -> None:
        self._buffer.append(item)
        self._sent += 1
        if self._receivers and self._offer_item():
            return
        if len(self._buffer) > self._peak:
            self._note_peak()

    def _note_peak(self) -> None:
        self._peak = max(self._peak, len(self._buffer) - self._promised)

    def _overflow_with(self, item: T) -> None:
        """Do what ``overflow`` says with an item for which there is no room."""
        if self._closed:
            raise ChannelClosed(self._closed)
        if self._overflow in {"wait", "reject"}:
            notify(self.on_event, "channel.rejected")
            raise QueueFull(f"the channel is full: capacity {self._capacity}")
        self._dropped += 1
        dropped = item
        if self._overflow == "drop_oldest":
            dropped = self._buffer.popleft()  # a full channel has one that is not promised
            self._sent -= 1
            self._put(item)
        if self._on_drop is not None:
            tell(self._on_drop, dropped)
        notify(self.on_event, "channel.dropped", item=dropped)

    def _offer_slot(self) -> None:
        """If there is a free slot, promise it to the first sender in line.

        A receiver that waits will take an item as soon as it comes, and is as good as a free slot;
        but only for those in line, and not for a newcomer, who would overtake them.
        """
        if len(self._buffer) < self._room + len(self._receivers) and _wake(self._senders):
            self._room -= 1

    def _offer_item(self) -> bool:
        """An item is there: promise it to the first receiver in line, if there is one."""
        if not _wake(self._receivers):
            return False
        self._promised += 1
        self._room += 1  # what is promised takes no place any more
        self._offer_slot()
        return True

    def _give_up_slot(self, waiter: asyncio.Future[None]) -> None:
        if not _leave(self._senders, waiter):
            self._room += 1
            self._offer_slot()

    def _give_up_item(self, waiter: asyncio.Future[None]) -> None:
        if not _leave(self._receivers, waiter):
            self._give_up_items(1)

    def _give_up_items(self, count: int) -> None:
        self._promised -= count
        self._room -= count  # they take their places again
        for _ in range(count):
            self._offer_item()
        self._note_peak()

    async def _gather_item(self, *, first: bool) -> None:
        """Have an item promised to the caller, the ``first`` of a batch or one more."""
        if get_running_loop() is not self._loop:
            self._bind()
        if len(self._buffer) > self._promised:
            self._promised += 1
            self._room += 1
            self._offer_slot()
            return
        if self._closed and not (first and self._buffer):
            raise ChannelClosed(self._closed)
        waiter: asyncio.Future[None] = asyncio.Future()
        self._receivers.append(waiter)
        self._offer_slot()
        if not first:
            self._gathering.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            self._give_up_item(waiter)
            raise
        finally:
            if waiter in self._gathering:
                self._gathering.remove(waiter)

    def _take_items(self, count: int) -> list[T]:
        """Take what was promised by :meth:`_gather_item`, all in one step."""
        self._promised -= count
        self._room -= count
        items = [self._buffer.popleft() for _ in range(count)]
        if self._closed and not self._buffer:
            _refuse(self._receivers, self._closed)
        return items


class _Batches(Generic[T]):
    """The batches of a channel: no generator, for that would end with its first time-out."""

    def __init__(self, channel: Channel[T], max_size: int, max_wait: float) -> None:
        self._channel = channel
        self._max_size = max_size
        self._max_wait = max_wait

    def __aiter__(self) -> _Batches[T]:
        return self

    async def __anext__(self) -> list[T]:
        gathered, loop = 0, get_running_loop()
        try:
            await self._channel._gather_item(first=True)
            gathered = 1
            async with asyncio.timeout(self._max_wait):
                while gathered < self._max_size:
                    await self._channel._gather_item(first=False)
                    gathered += 1
        except (ChannelClosed, TimeoutError):
            if not gathered:
                raise StopAsyncIteration from None
        except BaseException:
            if self._channel._loop is loop:  # or nothing is promised any more
                self._channel._give_up_items(gathered)
            raise
        return self._channel._take_items(gathered)


class _End(ABC, Generic[T]):
    """One end of a channel, with a life of its own."""

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel
        self._closed = False

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the channel; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._leave()

    @abstractmethod
    def _leave(self) -> None:
        """Tell the channel that this end is closed."""

    def _check_open(self) -> Channel[T]:
        if self._closed:
            raise ChannelClosed(f"this {type(self).__name__} is closed")
        return self._channel


class Sender(_End[T]):
    """One of several senders of a channel; :meth:`Channel.sender` makes it."""

    def _leave(self) -> None:
        self._channel._open_senders -= 1
        if self._channel._open_senders == 0:
            self._channel._close("all senders are closed")

    async def send(self, item: T) -> None:
        """Send as :meth:`Channel.send` does."""
        await self._check_open().send(item)

    def send_nowait(self, item: T) -> None:
        """Send as :meth:`Channel.send_nowait` does."""
        self._check_open().send_nowait(item)


class Receiver(_End[T]):
    """One of several receivers of a channel; :meth:`Channel.receiver` makes it."""

    def _leave(self) -> None:
        self._channel._open_receivers -= 1
        if self._channel._open_receivers == 0:
            self._channel._close("all receivers are closed")

    async def receive(self) -> T:
        """Receive as :meth:`Channel.receive` does."""
        return await self._check_open().receive()

    def receive_nowait(self) -> T:
        """Receive as :meth:`Channel.receive_nowait` does."""
        return self._check_open().receive_nowait()

    def __aiter__(self) -> Receiver[T]:
        """Return the receiver: iterating receives until the channel is closed and empty."""
        return self

    async def __anext__(self) -> T:
        return await anext(self._check_open())


def _wake(line: deque[asyncio.Future[None]]) -> bool:
    """Wake the first in a line who still waits, if there is one."""
    while line:
        try:
            line.popleft().set_result(None)
        except asyncio.InvalidStateError:  # cancelled, and not yet out of the line
            continue
        return True
    return False


def _leave(line: deque[asyncio.Future[None]], waiter: asyncio.Future[None]) -> bool:
    """Take a cancelled waiter out of its line; tell whether it had been promised nothing."""
    if waiter.cancelled():
        if waiter in line:
            line.remove(waiter)
        return True
    return waiter.exception() is not None


def _refuse(line: deque[asyncio.Future[None]], reason: str) -> None:
    """Tell all in a line that they wait in vain."""
    while line:
        waiter = line.popleft()
        if not waiter.done():
            waiter.set_exception(ChannelClosed(reason))


async def produce_consume(
    source: Iterable[T] | AsyncIterable[T],
    handle: Callable[[T], Awaitable[object]],
    *,
    consumers: int,
    capacity: int = 10,
    unhandled: list[T] | None = None,
) -> None:
    """Handle every item of a source, several at a time, and end when all are handled.

    The source is read only as fast as the consumers keep up: at most ``capacity`` items wait.
    Each consumer is one task: a context variable that ``handle`` sets is still set when the same
    consumer handles its next item.

    Args:
        source: The items; an iterable or an asynchronous one, also an endless one.
        handle: Called with each item, exactly once.
        consumers: How many items are handled at the same time.
        capacity: How many items may wait between the source and the consumers.
        unhandled: A list to which are added, if something fails or is cancelled, the items that
            were read from the source and whose ``handle`` did not return.

    Raises:
        ExceptionGroup: If the source or ``handle`` raises. Everything else is cancelled first.
        ValueError: If ``consumers`` or ``capacity`` is below 1.
    """
    check_count("consumers", consumers)
    channel: Channel[T] = Channel(capacity)
    left: list[T] = []

    async def produce() -> None:
        async with aclosing(_each(source)) as items:
            async for item in items:
                try:
                    await channel.send(item)
                except BaseException:
                    left.append(item)
                    raise

    async def consume() -> None:
        async for item in channel:
            try:
                await handle(item)
            except BaseException:
                left.append(item)
                raise

    try:
        async with asyncio.TaskGroup() as group:
            producer = group.create_task(_told(produce, "the source"), name="producer")
            producer.add_done_callback(lambda _: channel.close())
            for number in range(consumers):
                consumer = group.create_task(_told(consume, "handle"), name=f"consumer {number}")
                # When the last one is gone, the producer must not wait for room any more.
                consumer.add_done_callback(functools.partial(_close, channel.receiver()))
    finally:
        left.extend(channel._buffer)
        if unhandled is not None:
            unhandled.extend(left)
    if left:
        raise PatternError(f"{len(left)} items were not handled: a consumer was cancelled")


async def _told(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Make an error of a CancelledError that nobody asked for.

    A task group takes it for a silent end: items would be lost unseen.
    """
    try:
        await work()
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise PatternError(f"{what} raised CancelledError by itself") from error


def _close(receiver: Receiver[Any], _: object) -> None:
    receiver.close()


async def _each(source: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """Iterate over any source, and close it at the end."""
    if not isinstance(source, AsyncIterable):
        for item in source:
            yield item
        return
    closing: AbstractAsyncContextManager[Any] = (
        aclosing(source) if hasattr(source, "aclose") else nullcontext()
    )
    async with closing:
        async for item in source:
            yield item
