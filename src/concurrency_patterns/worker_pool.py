"""A pool of asyncio workers, and a map with a bound on what runs at the same time."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

from .errors import (
    PatternError,
    PoolClosed,
    QueueFull,
    check_count,
    check_loop,
    check_positive,
    check_seconds,
    notify,
)
from .timeout import deadline

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

__all__ = ["Submitter", "WorkerPool", "WorkerPoolStatistics", "bounded_map"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Outcome: TypeAlias = Literal["ok", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class WorkerPoolStatistics:
    """What a worker pool does and has done.

    Attributes:
        workers: How many tasks may run at the same time; 0 if the pool does not run.
        busy: How many workers have a task now.
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


class WorkerPool:
    """Run a few tasks at a time, fed from a bounded queue.

    One asyncio task for each of a million jobs costs memory for all of them at once, and starts
    all of them at once. A pool starts a few and makes whoever submits wait when the queue is
    full (backpressure). Every task has a handle with its result or its error, which is an
    :class:`asyncio.Task`: await it, or cancel it.

    Use it with ``async with``. Leaving the block normally waits until all submitted tasks are
    done; leaving it with an exception, a cancellation included, cancels them. A task that raises
    anything whatever does not cost a worker.

    A submitted task sees the context variables of its submitter, as one of
    :func:`asyncio.create_task` does, a :func:`~concurrency_patterns.timeout.deadline` among them;
    what it sets itself nobody else sees.

    Args:
        workers: How many tasks run at the same time.
        queue_size: How many tasks may wait for a worker before :meth:`submit` waits.
        task_timeout: The time for each task in seconds; ``None`` for any. A task that takes
            longer is cancelled and fails with
            :exc:`~concurrency_patterns.errors.DeadlineExceeded`.
        limiter: Entered around each task, such as a
            :class:`~concurrency_patterns.token_bucket.TokenBucket`. The worker waits for it, and
            the time of the task begins after that.

    Attributes:
        on_event: Called with the kind and the data of an event: ``worker_pool.task_ended``
            (``outcome``: ``"ok"``, ``"error"`` or ``"cancelled"``; ``waited``, the seconds in the
            queue and for the limiter; ``seconds``, those of the task itself),
            ``worker_pool.rejected``; see :func:`~concurrency_patterns.observe.observe`.

    Raises:
        ValueError: If ``workers`` or ``queue_size`` is below 1, or ``task_timeout`` not above 0.

    The thread pool of POSA2 (Schmidt et al., 2000), with the lifetime of structured concurrency.
    """

    # A worker is a place that an asyncio task takes while it runs: a submitted task, or one that
    # handles items of a map.

    def __init__(
        self,
        workers: int,
        queue_size: int = 100,
        *,
        task_timeout: float | None = None,
        limiter: AbstractAsyncContextManager[object] | None = None,
    ) -> None:
        check_count("workers", workers)
        check_count("queue_size", queue_size)
        if task_timeout is not None:
            check_positive("task_timeout", task_timeout)
        if limiter is not None and not hasattr(limiter, "__aenter__"):
            raise TypeError(f"limiter must work in `async with`, got {limiter!r}")
        self._size = workers
        self._queue_size = queue_size
        self._task_timeout = task_timeout
        self._limiter: AbstractAsyncContextManager[object] = nullcontext()
        if limiter is not None:
            self._limiter = limiter
        self._bare = task_timeout is None and limiter is None
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin()
        self._open = False
        self._ended: dict[Outcome, int] = {"ok": 0, "error": 0, "cancelled": 0}

    def _begin(self) -> None:
        self._open = True
        self._aborting = False
        self._workers = _Places(self._size)
        self._queue = _Places(self._queue_size)  # for tasks that have no worker yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._maps: set[_Map] = set()

    async def __aenter__(self) -> WorkerPool:
        loop = check_loop(self, self._loop)
        if loop is self._loop and (self._open or self._tasks):
            raise RuntimeError("this WorkerPool is running already")
        self._loop = loop
        self._begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close(grace=None if error is None else 0)

    async def close(self, grace: float | None = None) -> None:
        """Take no more tasks, finish those that were taken, and stop.

        Args:
            grace: The time to finish in seconds; what is not done then is cancelled. ``None``
                for any time.

        Raises:
            ValueError: If ``grace`` is negative or not finite.
            RuntimeError: If a task of the pool calls it, as it would wait for itself.
        """
        if grace is not None:
            check_seconds("grace", grace)
        if asyncio.current_task() in self._tasks:
            raise RuntimeError("a task of a WorkerPool cannot close it: it would wait for itself")
        self._open = False
        self._queue.let_all_in()  # to be told
        feeders = [task for reading in self._maps for task in reading.stop_reading()]
        try:
            if grace != 0:
                await self._drain(grace)
        finally:
            self._aborting = True
            await _cancel_and_wait([*self._tasks, *feeders])

    async def _drain(self, grace: float | None) -> None:
        scope = asyncio.timeout(grace)
        try:
            async with scope:
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            if not scope.expired():
                raise

    def resize(self, workers: int) -> None:
        """Change the number of workers.

        New ones begin at once. Those that are too many end when the task that they run is done.

        Args:
            workers: How many tasks run at the same time from now on.

        Raises:
            ValueError: If ``workers`` is below 1.
        """
        check_count("workers", workers)
        self._size = workers
        self._workers.resize(workers)

    async def submit(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[R]:
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
        return await self._submit(0, fn, args, kwargs)

    def submit_nowait(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[R]:
        """Put a task into the queue if there is room.

        Args:
            fn: An asynchronous function.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            The task's handle.

        Raises:
            QueueFull: If the queue is full, or others wait for room.
            PoolClosed: If the pool is not running.
        """
        return self._submit_nowait(0, fn, args, kwargs)

    def priority(self, level: int) -> Submitter:
        """Return what submits tasks with another priority.

        Args:
            level: Workers take the lowest level first; :meth:`submit` and :meth:`map` use 0. Tasks
                of one level are taken in their order.

        Raises:
            PoolClosed: If the pool is not running.
        """
        check_count("level", level, least=-(2**31))
        self._check_open()
        return Submitter(self, level)

    def map(
        self,
        fn: Callable[[T], Awaitable[R]],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = True,
        on_error: Literal["raise", "return", "skip"] = "raise",
    ) -> AsyncIterator[R]:
        """Call ``fn`` with each item of a source and yield the results.

        The source is read lazily: never further ahead of the results than twice the number of
        workers, so it may be endless. A result is yielded as soon as it is its turn, even while
        the source makes everybody wait for its next item.

        A worker handles one item after the other: a context variable that ``fn`` sets may be seen
        with a later item, but not outside of the map.

        Args:
            fn: An asynchronous function of one argument.
            source: The items; an iterable or an asynchronous one.
            ordered: Whether the results come in the order of the items, or as they are ready.
            on_error: What to do with an item that fails: ``"raise"`` its error, which ends the
                iteration and cancels what has been started; ``"return"`` the error in the place
                of the result; ``"skip"`` the item.

        Yields:
            The results.

        Raises:
            PoolClosed: If the pool is not running.
        """
        if on_error not in {"raise", "return", "skip"}:
            raise ValueError(f"on_error must be 'raise', 'return' or 'skip', got {on_error!r}")
        _check_function(fn)
        self._check_open()
        return self._results(functools.partial(_Map, self, fn, source, ordered=ordered), on_error)

    async def _results(self, begin: Callable[[], _Map], on_error: str) -> AsyncIterator[Any]:
        reading = begin()
        self._maps.add(reading)
        try:
            while True:
                item = reading.next_done()
                if item is None:
                    if reading.is_finished():
                        break
                    await reading.wait_for_outcome()
                elif item.error is None:
                    yield item.result
                elif on_error == "raise" or not isinstance(item.error, Exception):
                    raise item.error
                elif on_error == "return":
                    yield item.error
            if reading.failure is not None:
                raise reading.failure  # of the source: it comes behind what the source gave
        finally:
            await reading.close()
            self._maps.discard(reading)

    def statistics(self) -> WorkerPoolStatistics:
        """Return what the pool does and has done."""
        return WorkerPoolStatistics(
            workers=self._size if self._open else self._workers.taken,
            busy=self._workers.taken,
            queued=self._queue.taken + sum(len(reading.waiting) for reading in self._maps),
            succeeded=self._ended["ok"],
            failed=self._ended["error"],
            cancelled=self._ended["cancelled"],
        )

    def _check_open(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            check_loop(self, self._loop)
        elif self._open:
            return
        raise PoolClosed("the pool does not run: use it inside of `async with`")

    async def _submit(
        self,
        level: int,
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> asyncio.Task[R]:
        _check_function(fn)
        self._check_open()
        await self._queue.take()
        if not self._open:
            self._queue.give_back()
            raise PoolClosed("the pool was closed while submit waited for room")
        return self._start(level, fn, args, kwargs)

    def _submit_nowait(
        self,
        level: int,
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> asyncio.Task[R]:
        _check_function(fn)
        self._check_open()
        if not self._queue.try_take():
            notify(self.on_event, "worker_pool.rejected")
            raise QueueFull(f"{self._queue_size} tasks wait for a worker already")
        return self._start(level, fn, args, kwargs)

    def _start(
        self,
        level: int,
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> asyncio.Task[R]:
        job = _Job(self.on_event is not None)
        task = asyncio.create_task(self._run(job, level, fn, args, kwargs))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._on_ended, job))
        return task

    async def _run(
        self,
        job: _Job,
        level: int,
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> R:
        """Wait for a worker, then make the call: the task of a submitted function."""
        await self._workers.take(level)
        try:
            job.is_queued = False
            self._queue.give_back()
            if self._bare and job.times is None:
                result = await fn(*args, **kwargs)
            else:
                result = await self._guarded(functools.partial(fn, *args, **kwargs), job.times)
        except BaseException:
            job.outcome = "error"  # unless the task ends as cancelled
            raise
        else:
            job.outcome = "ok"
            return result
        finally:
            self._workers.give_back()

    def _on_ended(self, job: _Job, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if job.is_queued:  # it was cancelled before it had a worker
            self._queue.give_back()
        outcome = "cancelled" if task.cancelled() else job.outcome
        self._ended[outcome] += 1
        if job.times is not None:
            self._tell_ended(outcome, job.times)

    async def _guarded(self, call: Callable[[], Awaitable[R]], times: _Times | None) -> R:
        if times is not None:
            times.start()
        async with self._limiter:
            if times is not None:
                times.start()
            if self._task_timeout is None:
                return await call()
            async with deadline(self._task_timeout):
                return await call()

    def _tell_ended(self, outcome: Outcome, times: _Times) -> None:
        told = times.at_end()
        notify(self.on_event, "worker_pool.task_ended", outcome=outcome, **told)


def _check_function(fn: object) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be an async function, got {fn!r}")


class Submitter:
    """Submits tasks of one priority; :meth:`WorkerPool.priority` makes it."""

    def __init__(self, pool: WorkerPool, level: int) -> None:
        self._pool = pool
        self._level = level

    async def submit(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[R]:
        """Submit as :meth:`WorkerPool.submit` does, with this priority."""
        return await self._pool._submit(self._level, fn, args, kwargs)

    def submit_nowait(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[R]:
        """Submit as :meth:`WorkerPool.submit_nowait` does, with this priority."""
        return self._pool._submit_nowait(self._level, fn, args, kwargs)


class _Job:
    """What the pool knows of a submitted task, besides that it is one."""

    def __init__(self, timed: bool) -> None:
        self.is_queued = True
        self.outcome: Outcome = "cancelled"
        self.times = _Times() if timed else None


class _Times:
    """When a task was put into its line, and when it began to run."""

    __slots__ = ("_began", "_queued")

    def __init__(self) -> None:
        self._queued = asyncio.get_running_loop().time()
        self._began: float | None = None

    def start(self) -> None:
        self._began = asyncio.get_running_loop().time()

    def at_end(self) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        began = now if self._began is None else self._began
        return {"seconds": now - began, "waited": began - self._queued}


class _Item:
    """An item of a map; it keeps its outcome until the reader comes by."""

    done = False
    result: Any = None
    error: BaseException | None = None

    times: _Times | None = None  # if somebody listens

    def __init__(self, value: Any) -> None:
        self.value = value


class _Map:
    """A map: a window of items that moves along between the source and the reader.

    Its workers are tasks that handle items as long as some wait. They begin when there are items,
    and end when there are none, or when others wait for a worker.
    """

    def __init__(
        self,
        pool: WorkerPool,
        fn: Callable[[Any], Awaitable[Any]],
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool,
    ) -> None:
        self.failure: BaseException | None = None  # of the source
        self.waiting: deque[_Item] = deque()  # for a worker
        self._pool = pool
        self._fn = fn
        self._ordered = ordered
        self._started: deque[_Item] = deque()  # in the order of the source
        self._ready: deque[_Item] = deque()  # unordered: those that are done
        self._context = contextvars.copy_context()  # the reader's
        self._tasks: set[asyncio.Task[None]] = set()
        self._more_due = False
        self._reading = True
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._source: Iterator[Any] | None = None
        self._feeder: asyncio.Task[None] | None = None
        if isinstance(source, AsyncIterable):
            self._feeder = asyncio.create_task(self._feed(source), name="map feeder")
            self._feeder.add_done_callback(self._on_fed)
        else:
            self._source = iter(source)
            self._read_ahead(self._source)

    # What the reader does.

    def next_done(self) -> _Item | None:
        """Return the item whose outcome is to be given out next, if it is there."""
        line = self._started if self._ordered else self._ready
        if not line or not line[0].done:
            return None
        item = line.popleft()
        if self._source is not None:
            self._read_ahead(self._source)
        elif self._room is not None and not self._room.done():
            self._room.set_result(None)
        return item

    def is_finished(self) -> bool:
        """Tell whether the source is at its end, and the reader has got all outcomes."""
        return not (self._started or self._ready or self._reading)

    async def wait_for_outcome(self) -> None:
        """Wait until :meth:`next_done` may have something new."""
        self._reader = asyncio.Future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def close(self) -> None:
        """Stop reading, drop what waits, cancel what runs, and wait for it."""
        feeder = self.stop_reading()
        self._drop_waiting()
        await _cancel_and_wait([*self._tasks, *feeder])

    def _drop_waiting(self) -> None:
        while self.waiting:
            item = self.waiting.popleft()
            item.error = PoolClosed("the pool was closed")
            self._on_done(item, "cancelled")

    # What the source gives.

    def _start(self, value: Any) -> None:
        pool = self._pool
        if not pool._open:  # it may have been closed between two results
            raise PoolClosed("the pool was closed")
        item = _Item(value)
        if pool.on_event is not None:
            item.times = _Times()
        self._started.append(item)
        self.waiting.append(item)
        if not self._tasks:
            self._add_worker()
        elif not self._more_due:
            self._add_workers_soon()

    def _read_ahead(self, source: Iterator[Any]) -> None:
        """Read an iterable as far as the window allows."""
        while self._reading and len(self._started) + len(self._ready) < 2 * self._pool._size:
            try:
                self._start(next(source))
            except StopIteration:
                self._reading = False
            except Exception as error:  # noqa: BLE001 -- raised behind what the source gave
                self._reading, self.failure = False, error

    async def _feed(self, source: AsyncIterable[Any]) -> None:
        """Read an asynchronous source as far as the window allows."""
        async with _reading(source) as items:
            await self._wait_for_room()
            async for item in items:
                self._start(item)
                await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while len(self._started) + len(self._ready) >= 2 * self._pool._size:
            self._room = asyncio.Future()
            await self._room

    def stop_reading(self) -> list[asyncio.Task[None]]:
        """Read no further; return the task that reads, if any: it may have to clean up."""
        if self._feeder is None:
            return []
        self._feeder.cancel()
        return [self._feeder]

    def _on_fed(self, feeder: asyncio.Task[None]) -> None:
        if not feeder.cancelled():
            self.failure = feeder.exception()
        elif self._pool._open:
            self.failure = PatternError("the source raised CancelledError by itself")
        else:
            self.failure = PoolClosed("the pool was closed")
        self._reading = False
        self._wake_reader()

    # What the workers do.

    def _add_worker(self) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._work(), context=self._context.copy())
        self._tasks.add(task)
        self._pool._tasks.add(task)
        task.add_done_callback(self._on_ended)

    def _add_workers_soon(self) -> None:
        self._more_due = True
        asyncio.get_running_loop().call_soon(self._add_workers)

    def _add_workers(self) -> None:
        """Take as many workers again as there are, if they have left items waiting.

        Not all at once: items that take no time are done by the first one, before the others
        would even run.
        """
        self._more_due = False
        number = len(self._tasks)
        for _ in range(min(len(self.waiting), max(number, 1), self._pool._size - number)):
            self._add_worker()

    async def _work(self) -> None:
        """Handle one item after the other."""
        pool = self._pool
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        await pool._workers.take()
        try:
            while True:
                if not self.waiting:
                    await asyncio.sleep(0)  # the reader may have the next item ready
                if not self.waiting:
                    return
                item = self.waiting.popleft()
                if self.waiting and not self._more_due:
                    self._add_workers_soon()
                outcome: Outcome = "ok"
                try:
                    if pool._bare and item.times is None:
                        item.result = await self._fn(item.value)
                    else:
                        call = functools.partial(self._fn, item.value)
                        item.result = await pool._guarded(call, item.times)
                except asyncio.CancelledError as error:
                    outcome = "cancelled"
                    item.error = self._told(item, error, worker)
                except BaseException as error:
                    outcome = "error"
                    item.error = error
                    if isinstance(error, KeyboardInterrupt | SystemExit):
                        raise
                finally:
                    self._on_done(item, outcome)
                if worker.cancelling() or pool._workers.are_wanted():
                    return
        finally:
            pool._workers.give_back()

    def _told(self, item: _Item, error: BaseException, worker: asyncio.Task[None]) -> PatternError:
        fault: PatternError = PoolClosed("the pool was closed")
        if not self._pool._aborting:
            who = "was cancelled" if worker.cancelling() else "raised CancelledError by itself"
            fault = PatternError(f"the call with {item.value!r} {who}")
        fault.__cause__ = error
        return fault

    def _on_done(self, item: _Item, outcome: Outcome) -> None:
        item.done = True
        self._pool._ended[outcome] += 1
        if item.times is not None:
            self._pool._tell_ended(outcome, item.times)
        if not self._ordered:
            self._started.remove(item)
            self._ready.append(item)
        elif self._started[0] is not item:
            return  # not its turn
        if self._reader is not None:
            self._wake_reader()

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._pool._tasks.discard(task)
        if self._pool._aborting:
            self._drop_waiting()
        elif self.waiting:
            self._add_worker()  # in its place, at the end of the line


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
    _check_function(fn)
    check_count("limit", limit)
    results: list[R] = []

    async def work(source: Iterable[T]) -> None:
        for item in source:
            number = len(results)
            results.append(cast("R", None))  # its place
            try:
                results[number] = await fn(item)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                told = f"the call with {item!r} raised CancelledError by itself"
                raise PatternError(told) from error

    async def work_beside(source: AsyncIterable[T]) -> None:
        async for item in source:
            await work([item])

    if isinstance(items, AsyncIterable):
        async with _reading(items) as source:
            beside = _Shared(source)
            await _all_of([work_beside(beside) for _ in range(limit)])
    else:
        shared = iter(items)
        await _all_of([work(shared) for _ in range(limit)])
    return results


async def _all_of(works: list[Coroutine[Any, Any, None]]) -> None:
    """Run all of them at once; if one fails, cancel the others and raise its error as it is."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        failure = _first(errors)
    else:
        if any(task.cancelled() for task in tasks):  # a task group takes that for a silent end
            failure = PatternError("a call was cancelled by somebody else: its result is missing")
    if failure is not None:
        try:
            raise failure  # outside of `except`: it keeps the context in which it was raised
        finally:
            del failure  # no cycle through this frame


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    for other in errors.exceptions[1:]:
        first.add_note(f"while it was handled, another call failed: {other!r}")
    return first


class _Shared(AsyncIterator[T]):
    """One iterator for several readers; an async generator allows one at a time."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items
        self._turn = asyncio.Lock()

    async def __anext__(self) -> T:
        async with self._turn:
            return await anext(self._items)


@asynccontextmanager
async def _reading(source: AsyncIterable[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Iterate over an asynchronous source, and close it at the end."""
    items = aiter(source)
    if hasattr(items, "aclose"):
        async with aclosing(cast("AsyncGenerator[T]", items)):
            yield items
    else:
        yield items


class _Places:
    """So many places, given out by level, and within a level in the order of asking."""

    def __init__(self, number: int) -> None:
        self.taken = 0
        self._number = number
        self._line: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._ticket = count()

    def try_take(self) -> bool:
        """Take a place if there is one; nobody waits while there is."""
        if self.taken >= self._number:
            return False
        self.taken += 1
        return True

    async def take(self, level: int = 0) -> None:
        """Take a place, or wait for it."""
        if self.try_take():
            return
        waiter: asyncio.Future[None] = asyncio.Future()
        entry = (level, next(self._ticket), waiter)
        heapq.heappush(self._line, entry)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.give_back()  # granted and cancelled in the same step
            elif entry in self._line:
                self._line.remove(entry)
                heapq.heapify(self._line)
            raise

    def give_back(self) -> None:
        self.taken -= 1
        if self._line:
            self._hand_out(self._number)

    def are_wanted(self) -> bool:
        """Tell whether somebody waits, or more places are taken than there are."""
        return bool(self._line) or self.taken > self._number

    def resize(self, number: int) -> None:
        self._number = number
        self._hand_out(number)

    def let_all_in(self) -> None:
        self._hand_out(self.taken + len(self._line))

    def _hand_out(self, number: int) -> None:
        while self._line and self.taken < number:
            _, _, waiter = heapq.heappop(self._line)
            if not waiter.done():
                self.taken += 1
                waiter.set_result(None)


async def _cancel_and_wait(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for them; a cancellation of this wait comes out at its end."""
    for task in tasks:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    waiting = tasks
    while waiting:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
        waiting = [task for task in tasks if not task.done()]
    if cancelled is not None:
        raise cancelled
