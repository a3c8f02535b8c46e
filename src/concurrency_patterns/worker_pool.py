"""A pool of asyncio workers, and a map with a bound on what runs at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from .errors import PatternError, PoolClosed, check_count, check_loop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
    from types import TracebackType

__all__ = ["TaskHandle", "WorkerPool", "WorkerPoolStatistics", "bounded_map"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerPoolStatistics:
    """What a worker pool does and has done.

    Attributes:
        workers: How many workers there are.
        busy: How many of them run a task now.
        queued: How many tasks wait for a worker.
        succeeded: How many tasks returned.
        failed: How many tasks raised.
        cancelled: How many tasks were cancelled, queued or running.
    """

    workers: int
    busy: int
    queued: int
    succeeded: int
    failed: int
    cancelled: int


class TaskHandle(asyncio.Future[R], Generic[R]):
    """What has become of a submitted task: await it for the result, or cancel it.

    It is an :class:`asyncio.Future`. Cancelling it, or the await of it, cancels the task: a
    queued one never starts, a running one gets :exc:`asyncio.CancelledError` at its next await
    and may clean up first. An error that nobody asks for is logged by asyncio.
    """

    _worker: asyncio.Task[None] | None = None
    _withdraw: Callable[[], None] | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the task; return ``False`` if it has ended already."""
        if self.done():
            return False
        if self._worker is not None:
            return self._worker.cancel(msg)  # it cancels the handle once the task has cleaned up
        if self._withdraw is not None:
            self._withdraw()
        return super().cancel(msg)

    def _started(self, worker: asyncio.Task[None]) -> None:
        self._withdraw = None
        self._worker = worker

    def _ended_by_cancellation(self) -> None:
        self._worker = None
        super().cancel()


class WorkerPool:
    """Run tasks on a fixed number of workers, fed from a bounded queue.

    One asyncio task for each of a million jobs costs memory for all of them at once, and starts
    all of them at once. A pool starts a few and makes whoever submits wait when the queue is
    full (backpressure). Every task has a handle with its result or its error.

    Use it with ``async with``. Leaving the block normally waits until all submitted tasks are
    done; leaving it with an exception, a cancellation included, cancels them. A task that raises
    anything whatever does not cost a worker.

    Args:
        workers: How many tasks run at the same time.
        queue_size: How many tasks may wait for a worker before :meth:`submit` waits.

    Raises:
        ValueError: If ``workers`` or ``queue_size`` is below 1.

    The thread pool of POSA2 (Schmidt et al., 2000), with the lifetime of structured concurrency.
    """

    def __init__(self, workers: int, queue_size: int = 100) -> None:
        check_count("workers", workers)
        check_count("queue_size", queue_size)
        self._size = workers
        self._queue_size = queue_size
        self._open = False
        self._aborting = False
        self._busy = 0
        self._queued = 0
        self._succeeded = 0
        self._failed = 0
        self._cancelled = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> WorkerPool:
        if self._open:
            raise RuntimeError("this WorkerPool is running already")
        self._loop = check_loop(self, self._loop)
        self._open = True
        self._aborting = False
        self._room = asyncio.Semaphore(self._queue_size)
        self._queue: asyncio.Queue[_Job | None] = asyncio.Queue()
        self._workers = [
            self._loop.create_task(self._work(), name=f"worker {number}")
            for number in range(self._size)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        if error is not None:
            await self._abort()
            return
        for _ in self._workers:  # behind all that was submitted: each worker ends at one of them
            self._queue.put_nowait(None)
        try:
            await asyncio.wait(self._workers)
        except asyncio.CancelledError:
            await self._abort()
            raise

    async def submit(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[R]:
        """Put a task into the queue; wait while the queue is full.

        Args:
            fn: An asynchronous function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The task's handle. Awaiting it gives what ``fn`` returns or raises.

        Raises:
            PoolClosed: If the pool is not running, or is closed while this call waits.
        """
        if not self._open:
            raise PoolClosed("submit needs a pool that runs: use it inside of `async with`")
        await self._room.acquire()
        if not self._open:
            self._room.release()
            raise PoolClosed("the pool was closed while submit waited for room")
        handle: TaskHandle[R] = TaskHandle()
        handle._withdraw = self._withdraw
        self._queued += 1
        self._queue.put_nowait(_Job(handle, fn, args, kwargs))
        return handle

    async def map(
        self,
        fn: Callable[[T], Awaitable[R]],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = True,
    ) -> AsyncIterator[R]:
        """Call ``fn`` with each item of a source and yield the results.

        The source is read lazily: never further ahead of the results than twice the number of
        workers, so it may be endless. A result is yielded as soon as it is its turn, even while
        the source makes everybody wait for its next item.

        Args:
            fn: An asynchronous function of one argument.
            source: The items; an iterable or an asynchronous one.
            ordered: Whether the results come in the order of the items, or as they are ready.

        Yields:
            The results. The first error ends the iteration and cancels what has been started.

        Raises:
            PoolClosed: If the pool is not running.
        """
        if not self._open:
            raise PoolClosed("map needs a pool that runs: use it inside of `async with`")
        stream = _Stream[R](ahead=2 * self._size, ordered=ordered)
        feeder = asyncio.create_task(self._feed(stream, fn, source), name="map feeder")
        try:
            async for result in stream:
                yield result
            await feeder  # an error of the source comes after the results of what it gave
        finally:
            await _cancel_all([feeder, *stream.unfinished])

    def statistics(self) -> WorkerPoolStatistics:
        """Return what the pool does and has done."""
        return WorkerPoolStatistics(
            workers=self._size,
            busy=self._busy,
            queued=self._queued,
            succeeded=self._succeeded,
            failed=self._failed,
            cancelled=self._cancelled,
        )

    async def _feed(
        self,
        stream: _Stream[R],
        fn: Callable[[T], Awaitable[R]],
        source: Iterable[T] | AsyncIterable[T],
    ) -> None:
        try:
            async with _reading(source) as items:
                await stream.room()
                async for item in items:
                    stream.add(await self.submit(fn, item))
                    await stream.room()
        finally:
            stream.end()

    async def _work(self) -> None:
        while not self._aborting:
            job = await self._queue.get()
            if job is None:
                return
            if not job.handle.done():
                self._leave_queue()
                await self._run(job)

    async def _run(self, job: _Job) -> None:
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        job.handle._started(worker)
        self._busy += 1
        try:
            result = await job.fn(*job.args, **job.kwargs)
        except asyncio.CancelledError:
            self._cancelled += 1
            job.handle._ended_by_cancellation()
            if self._aborting:
                raise
        except (KeyboardInterrupt, SystemExit) as error:
            job.handle.set_exception(error)
            raise
        except BaseException as error:  # noqa: BLE001 -- whatever a task raises belongs to its handle
            self._failed += 1
            job.handle.set_exception(error)
        else:
            self._succeeded += 1
            job.handle.set_result(result)
        finally:
            self._busy -= 1
        if worker.cancelling():
            await _forget_cancellation(worker)

    def _leave_queue(self) -> None:
        self._queued -= 1
        self._room.release()

    def _withdraw(self) -> None:
        self._cancelled += 1
        self._leave_queue()

    async def _abort(self) -> None:
        self._aborting = True
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if job is not None:
                job.handle.cancel()
        await _cancel_all(self._workers)


@dataclass(slots=True)
class _Job:
    handle: TaskHandle[Any]
    fn: Callable[..., Awaitable[Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stream(Generic[R]):
    """The handles between the feeder of a map and its reader, and the bound on their number."""

    def __init__(self, ahead: int, *, ordered: bool) -> None:
        self._room = asyncio.Semaphore(ahead)
        self._next: asyncio.Queue[TaskHandle[R] | None] = asyncio.Queue()
        self._ordered = ordered
        self._ended = False
        self.unfinished: set[TaskHandle[R]] = set()

    async def room(self) -> None:
        """Wait until one more item may be read from the source."""
        await self._room.acquire()

    def add(self, handle: TaskHandle[R]) -> None:
        """Pass a handle on: now if the order matters, else when it is done."""
        self.unfinished.add(handle)
        if self._ordered:
            self._next.put_nowait(handle)
        else:
            handle.add_done_callback(self._pass_on)

    def end(self) -> None:
        """Say that no more handles will be added."""
        self._next.put_nowait(None)

    def _pass_on(self, handle: asyncio.Future[R]) -> None:
        self._next.put_nowait(cast("TaskHandle[R]", handle))

    def __aiter__(self) -> _Stream[R]:
        return self

    async def __anext__(self) -> R:
        while not self._ended or self.unfinished:
            handle = await self._next.get()
            if handle is None:
                self._ended = True
                continue
            result = await handle
            self.unfinished.discard(handle)
            self._room.release()
            return result
        raise StopAsyncIteration


async def bounded_map(
    fn: Callable[[T], Coroutine[Any, Any, R]],
    items: Iterable[T] | AsyncIterable[T],
    limit: int,
) -> list[R]:
    """Call ``fn`` with each item, at most ``limit`` at the same time, and return all results.

    ``asyncio.gather`` starts everything at once; a semaphore inside bounds what runs, but still
    makes one task for each item. Here ``limit`` workers share one iterator.

    Args:
        fn: An asynchronous function of one argument.
        items: The items; an iterable or an asynchronous one.
        limit: How many calls run at the same time.

    Returns:
        The results, in the order of the items.

    Raises:
        ValueError: If ``limit`` is below 1.
        Exception: The first error that ``fn`` or the source raises; everything else is cancelled
            before it is raised.
    """
    check_count("limit", limit)
    results: list[tuple[int, R]] = []

    async def work(numbered: AsyncIterator[tuple[int, T]]) -> None:
        async for number, item in numbered:
            results.append((number, await _call_one(fn, item)))

    try:
        async with _reading(items) as source, asyncio.TaskGroup() as group:
            numbered = _Shared(source)
            for _ in range(limit):
                group.create_task(work(numbered))
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    results.sort(key=lambda pair: pair[0])
    return [result for _, result in results]


async def _call_one(fn: Callable[[T], Coroutine[Any, Any, R]], item: T) -> R:
    try:
        return await fn(item)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # A task group takes a CancelledError for a silent end: the result would be missing.
        raise PatternError(f"the call with {item!r} raised CancelledError by itself") from error


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    for other in errors.exceptions[1:]:
        first.add_note(f"while it was handled, another call failed: {other!r}")
    return first


class _Shared(AsyncIterator[tuple[int, T]]):
    """One numbered iterator for several readers; an async generator allows one at a time."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items
        self._number = -1
        self._turn = asyncio.Lock()

    async def __anext__(self) -> tuple[int, T]:
        async with self._turn:
            item = await anext(self._items)
            self._number += 1
            return self._number, item


@asynccontextmanager
async def _reading(source: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Read any source as an asynchronous iterator, and close it at the end."""
    items = aiter(source) if isinstance(source, AsyncIterable) else _asynchronous(source)
    if isinstance(items, AsyncIterator) and hasattr(items, "aclose"):
        async with aclosing(cast("AsyncGenerator[T]", items)):
            yield items
    else:
        yield items


async def _asynchronous(source: Iterable[T]) -> AsyncIterator[T]:
    for item in source:
        yield item


async def _cancel_all(futures: list[Any]) -> None:
    """Cancel what is not done and wait for it; a cancellation of this wait comes afterwards."""
    for future in futures:
        future.cancel()
    cancelled: asyncio.CancelledError | None = None
    while waiting := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    for future in futures:
        if not future.cancelled():
            future.exception()  # retrieved: nobody will ask for it any more
    if cancelled is not None:
        raise cancelled


async def _forget_cancellation(worker: asyncio.Task[None]) -> None:
    """Make a worker whole again after the cancellation of the task that it ran."""
    while worker.cancelling():
        worker.uncancel()
    # A task that cancels its own handle and then returns leaves, before 3.13, a cancellation
    # behind that has not been delivered; the next task must not get it.
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
