"""A pool of asyncio workers, and a map with a bound on what runs at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast

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

__all__ = ["Submitter", "TaskHandle", "WorkerPool", "WorkerPoolStatistics", "bounded_map"]

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
        self._limiter = limiter
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._bare = task_timeout is None and limiter is None
        self._open = False
        self._aborting = False
        self._workers: set[asyncio.Task[None]] = set()
        self._begin()
        self._busy = 0
        self._succeeded = 0
        self._failed = 0
        self._cancelled = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> WorkerPool:
        self._loop = check_loop(self, self._loop)
        if self._workers:
            raise RuntimeError("this WorkerPool is running already")
        self._open = True
        self._aborting = False
        self._begin()
        self.resize(self._size)
        return self

    def _begin(self) -> None:
        self._room = _Room(self._queue_size)
        self._line: deque[_Job] = deque()
        self._lines: list[tuple[int, deque[_Job]]] = [(0, self._line)]
        self._idle: deque[asyncio.Future[None]] = deque()
        self._waking = False  # somebody was woken, and _wake_more has not run since
        self._wake_due = False  # but it will

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close(grace=None if error is None else 0)

    async def close(self, grace: float | None = None) -> None:
        """Take no more tasks, finish those that were taken, and stop the workers.

        Args:
            grace: The time to finish in seconds; what is not done then is cancelled. ``None``
                for any time.

        Raises:
            ValueError: If ``grace`` is negative or not finite.
        """
        if grace is not None:
            check_seconds("grace", grace)
        self._open = False
        self._room.wake_all()
        _wake(self._idle, len(self._idle))
        try:
            if self._workers and grace != 0:
                await asyncio.wait(self._workers, timeout=grace)
        finally:
            await self._abort()

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
        if not self._open:
            return
        for _ in range(workers - len(self._workers)):
            worker = asyncio.create_task(self._work(), name="worker")
            self._workers.add(worker)
            worker.add_done_callback(self._on_worker_ended)
        _wake(self._idle, len(self._workers) - workers)

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
        return await self._submit(self._line, fn, args, kwargs)

    def submit_nowait(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[R]:
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
        return self._submit_nowait(self._line, fn, args, kwargs)

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

    async def map(
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
        self._check_open()
        stream = _Stream(self, fn, source, ordered=ordered)
        try:
            while True:
                job = stream.next_done()
                if job is None:
                    if stream.is_finished():
                        break
                    await stream.wait_for_outcome()
                elif job.error is None:
                    yield job.result
                elif on_error == "raise" or not isinstance(job.error, Exception):
                    raise job.error
                elif on_error == "return":
                    yield cast("R", job.error)
            if stream.failure is not None:
                raise stream.failure  # of the source: it comes behind what the source gave
        finally:
            await stream.close()

    def statistics(self) -> WorkerPoolStatistics:
        """Return what the pool does and has done."""
        return WorkerPoolStatistics(
            workers=len(self._workers),
            busy=self._busy,
            queued=self._queued(),
            succeeded=self._succeeded,
            failed=self._failed,
            cancelled=self._cancelled,
        )

    def _on_worker_ended(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if worker.cancelled() and self._open:
            self.resize(self._size)  # somebody else has cancelled it: another takes its place

    def _check_open(self) -> None:
        if not self._open:
            raise PoolClosed("the pool does not run: use it inside of `async with`")

    async def _submit(
        self,
        line: deque[_Job],
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TaskHandle[R]:
        self._check_open()
        await self._room.take()
        if not self._open:
            raise PoolClosed("the pool was closed while submit waited for room")
        return self._enqueue_handle(line, fn, args, kwargs)

    def _submit_nowait(
        self,
        line: deque[_Job],
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TaskHandle[R]:
        self._check_open()
        if not self._room.try_take():
            notify(self.on_event, "worker_pool.rejected")
            raise QueueFull(f"{self._queue_size} tasks wait for a worker already")
        return self._enqueue_handle(line, fn, args, kwargs)

    def _enqueue_handle(
        self,
        line: deque[_Job],
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TaskHandle[R]:
        handle: TaskHandle[R] = TaskHandle(self, fn, args, kwargs)
        self._enqueue(line, handle)
        return handle

    def _enqueue(self, line: deque[_Job], job: _Job) -> None:
        if self.on_event is not None:
            job._times = _Times()
        line.append(job)
        if self._idle and not self._waking:
            self._waking = _wake(self._idle, 1) > 0

    def _line_of(self, level: int) -> deque[_Job]:
        for known, line in self._lines:
            if known == level:
                return line
        line = deque()
        self._lines.append((level, line))
        self._lines.sort(key=lambda pair: pair[0])
        return line

    def _withdraw(self, job: _Job) -> None:
        """Take a job that was cancelled out of its line."""
        for _, line in self._lines:
            if job in line:
                line.remove(job)
        self._cancelled += 1
        self._tell_ended(job, "cancelled")

    def _tell_ended(self, job: _Job, outcome: str) -> None:
        """Tell how a task ended, if somebody listened when it was submitted."""
        if job._times is not None:
            times = job._times.at_end()
            notify(self.on_event, "worker_pool.task_ended", outcome=outcome, **times)

    def _queued(self) -> int:
        return sum(len(line) for _, line in self._lines)

    def _next_job(self) -> _Job | None:
        for _, line in self._lines:
            if line:
                return line.popleft()
        return None

    async def _work(self) -> None:
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        while not self._aborting and len(self._workers) <= self._size:
            job = self._next_job()
            if job is None:
                if not self._open:
                    return
                await self._wait_for_job()
                continue
            job._worker = worker
            if job._in_queue:
                self._room.give_back()
            if job._times is not None:
                job._times.start()
            self._busy += 1
            outcome = "ok"
            try:
                result = await (job._call() if self._bare else self._guarded(job))
                self._succeeded += 1
                job._end(result)
            except asyncio.CancelledError as error:
                outcome = "cancelled"
                self._cancelled += 1
                job._fail(error)
                if self._aborting:
                    raise
            except BaseException as error:
                outcome = "error"
                self._failed += 1
                job._fail(error)
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
            finally:
                self._busy -= 1
                if job._times is not None:
                    self._tell_ended(job, outcome)
            if worker.cancelling():
                await _forget_cancellation(worker)
            job = result = None  # not kept alive while this worker waits
        self._workers.discard(worker)  # it was one too many

    async def _wait_for_job(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        try:
            await waiter
        finally:
            if not self._wake_due:
                self._wake_due = True
                asyncio.get_running_loop().call_soon(self._wake_more)

    def _wake_more(self) -> None:
        """Wake as many workers again as are at work, when those woken before have begun.

        Not all at once: jobs that end without waiting are done by the first one, before the
        others would even run.
        """
        self._wake_due = False
        wanted = min(self._queued(), max(self._busy, 1))
        self._waking = _wake(self._idle, wanted) > 0

    async def _guarded(self, job: _Job) -> Any:
        if self._limiter is None:
            return await self._timed(job)
        async with self._limiter:
            if job._times is not None:
                job._times.start()
            return await self._timed(job)

    async def _timed(self, job: _Job) -> Any:
        if self._task_timeout is None:
            return await job._call()
        async with deadline(self._task_timeout):
            return await job._call()

    async def _abort(self) -> None:
        self._aborting = True
        while (job := self._next_job()) is not None:
            self._cancelled += 1
            job._fail(asyncio.CancelledError("the pool was closed"))
            self._tell_ended(job, "cancelled")
        cancelled = await _cancel_and_wait(self._workers)
        if cancelled is not None:
            raise cancelled


class Submitter:
    """Submits tasks of one priority; :meth:`WorkerPool.priority` makes it."""

    def __init__(self, pool: WorkerPool, level: int) -> None:
        self._pool = pool
        self._level = level

    async def submit(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[R]:
        """Submit as :meth:`WorkerPool.submit` does, with this priority."""
        return await self._pool._submit(self._pool._line_of(self._level), fn, args, kwargs)

    def submit_nowait(
        self, fn: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[R]:
        """Submit as :meth:`WorkerPool.submit_nowait` does, with this priority."""
        return self._pool._submit_nowait(self._pool._line_of(self._level), fn, args, kwargs)


class TaskHandle(asyncio.Future[R], Generic[R]):
    """What has become of a submitted task: await it for the result, or cancel it.

    It is an :class:`asyncio.Future`. Cancelling it, or the await of it, cancels the task: a
    queued one never starts, a running one gets :exc:`asyncio.CancelledError` at its next await
    and may clean up first. An error that nobody asks for is logged by asyncio.
    """

    _in_queue = True
    _worker: asyncio.Task[None] | None = None
    _times: _Times | None = None

    def __init__(
        self,
        pool: WorkerPool,
        fn: Callable[..., Awaitable[R]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        self._pool = pool
        self._fn = fn
        self._args = args
        self._kwargs = kwargs

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the task; return ``False`` if it has ended already."""
        if self.done():
            return False
        if self._worker is not None:
            return self._worker.cancel(msg)  # this ends when the task has cleaned up
        super().cancel()
        self._pool._withdraw(self)
        self._pool._room.give_back()
        return True

    def _call(self) -> Awaitable[R]:
        return self._fn(*self._args, **self._kwargs)

    def _end(self, result: R) -> None:
        self._worker = None
        self.set_result(result)

    def _fail(self, error: BaseException) -> None:
        self._worker = None
        if isinstance(error, asyncio.CancelledError):
            super().cancel()
        elif isinstance(error, StopIteration):  # a future refuses it, as a coroutine does
            self.set_exception(RuntimeError("the task raised StopIteration"))
        else:
            self.set_exception(error)


class _Job(Protocol):
    """A call that waits for a worker or runs on one."""

    _in_queue: bool  # it takes a place in the queue while it waits
    _worker: asyncio.Task[None] | None  # that runs it
    _times: _Times | None  # if somebody wants to know

    def _call(self) -> Awaitable[Any]:
        """Make the call."""

    def _end(self, result: Any) -> None:
        """Take note of its result."""

    def _fail(self, error: BaseException) -> None:
        """Take note of its error, or that it was cancelled."""


class _Times:
    """When a job was put into its line, and when it began to run."""

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


class _StreamJob:
    """A job of a map: it keeps its outcome until the reader comes by."""

    _in_queue = False  # the window of its map bounds how many there are
    _worker: asyncio.Task[None] | None = None
    _times: _Times | None = None
    done = False
    result: Any = None
    error: BaseException | None = None

    def __init__(self, stream: _Stream, item: Any) -> None:
        self._stream = stream
        self._item = item

    def _call(self) -> Awaitable[Any]:
        return self._stream.fn(self._item)

    def _end(self, result: Any) -> None:
        self._worker = None
        self.result = result
        self.done = True
        self._stream.on_done(self)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            fault: PatternError = PoolClosed("the pool was closed")
            if not self._stream.pool._aborting:
                told = f"the call with {self._item!r} raised CancelledError by itself"
                fault = PatternError(told)
            fault.__cause__ = error
            error = fault
        self.error = error
        self._end(None)


class _Stream:
    """The jobs of a map between the source and the reader: a window that moves along."""

    def __init__(
        self,
        pool: WorkerPool,
        fn: Callable[[Any], Awaitable[Any]],
        source: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool,
    ) -> None:
        self.fn = fn
        self.pool = pool
        self.failure: BaseException | None = None  # of the source
        self._ordered = ordered
        self._started: deque[_StreamJob] = deque()  # in the order of the items
        self._ready: deque[_StreamJob] = deque()  # unordered: those that are done
        self._reading = True
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._items: Iterator[Any] | None = None
        self._feeder: asyncio.Task[None] | None = None
        if isinstance(source, AsyncIterable):
            self._feeder = asyncio.create_task(self._feed(source), name="map feeder")
            self._feeder.add_done_callback(self._on_fed)
        else:
            self._items = iter(source)
            self._read_ahead(self._items)

    def next_done(self) -> _StreamJob | None:
        """Return the job whose outcome is to be given out next, if it is there."""
        line = self._started if self._ordered else self._ready
        if not line or not line[0].done:
            return None
        job = line.popleft()
        if self._items is not None:
            self._read_ahead(self._items)
        elif self._room is not None and not self._room.done():
            self._room.set_result(None)
        return job

    def is_finished(self) -> bool:
        """Tell whether the source is at its end, and the reader has got all outcomes."""
        return not (self._started or self._ready or self._reading)

    async def wait_for_outcome(self) -> None:
        """Wait until :meth:`next_done` may have something new."""
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def on_done(self, job: _StreamJob) -> None:
        """Take note of an outcome; called by the job."""
        if not self._ordered:
            self._started.remove(job)
            self._ready.append(job)
        elif self._started[0] is not job:
            return  # not its turn
        if self._reader is not None:
            self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _has_room(self) -> bool:
        return len(self._started) + len(self._ready) < 2 * self.pool._size

    def _start(self, item: Any) -> None:
        pool = self.pool
        if not pool._open:  # it may have been closed between two results
            raise PoolClosed("the pool was closed")
        job = _StreamJob(self, item)
        self._started.append(job)
        pool._enqueue(pool._line, job)

    def _read_ahead(self, items: Iterator[Any]) -> None:
        """Read an iterable as far as the window allows."""
        while self._reading and len(self._started) + len(self._ready) < 2 * self.pool._size:
            try:
                self._start(next(items))
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

    def _on_fed(self, feeder: asyncio.Task[None]) -> None:
        if feeder.cancelled():
            self.failure = PatternError("the source raised CancelledError by itself")
        else:
            self.failure = feeder.exception()
        self._reading = False
        self._wake_reader()

    async def _wait_for_room(self) -> None:
        while not self._has_room():
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def close(self) -> None:
        """Stop reading, withdraw what has not been started, cancel what runs, wait for it."""
        running = []
        for job in self._started:
            if job._worker is not None:
                running.append(job)
            elif not job.done:
                self.pool._withdraw(job)
        self._ordered = False  # from here on, every end wakes us
        cancelled: asyncio.CancelledError | None = None
        if self._feeder is not None:
            cancelled = await _cancel_and_wait([self._feeder])
        for job in running:
            if job._worker is not None:
                job._worker.cancel()
        while not all(job.done for job in running):
            try:
                await self.wait_for_outcome()
            except asyncio.CancelledError as error:
                cancelled = error
        self._started.clear()
        if cancelled is not None:
            raise cancelled


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

    async def work(numbered: Iterator[tuple[int, T]]) -> None:
        for number, item in numbered:
            try:
                results.append((number, await fn(item)))
            except asyncio.CancelledError as error:
                _refuse_foreign_cancellation(item, error)
                raise

    async def work_beside(numbered: AsyncIterator[tuple[int, T]]) -> None:
        async for pair in numbered:
            await work(iter([pair]))

    try:
        if isinstance(items, AsyncIterable):
            async with _reading(items) as source, asyncio.TaskGroup() as group:
                shared = _Shared(source)
                for _ in range(limit):
                    group.create_task(work_beside(shared))
        else:
            numbered = enumerate(items)
            async with asyncio.TaskGroup() as group:
                for _ in range(limit):
                    group.create_task(work(numbered))
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    results.sort(key=lambda pair: pair[0])
    return [result for _, result in results]


def _refuse_foreign_cancellation(item: object, error: asyncio.CancelledError) -> None:
    """Make an error of a CancelledError that nobody asked for.

    A task group takes it for a silent end, and the result would be missing.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
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
async def _reading(source: AsyncIterable[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Iterate over an asynchronous source, and close it at the end."""
    items = aiter(source)
    if hasattr(items, "aclose"):
        async with aclosing(cast("AsyncGenerator[T]", items)):
            yield items
    else:
        yield items


class _Room:
    """Places in the queue, given out in the order of asking."""

    def __init__(self, places: int) -> None:
        self._free = places  # above 0 only while nobody waits
        self._line: deque[asyncio.Future[None]] = deque()

    def try_take(self) -> bool:
        if self._free == 0:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        if self.try_take():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._line.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.give_back()  # granted and cancelled in the same step
            elif waiter in self._line:
                self._line.remove(waiter)
            raise

    def give_back(self) -> None:
        if not _wake(self._line, 1):
            self._free += 1

    def wake_all(self) -> None:
        _wake(self._line, len(self._line))


def _wake(waiters: deque[asyncio.Future[None]], count: int) -> int:
    """Wake the first ``count`` waiters; return how many there were."""
    woken = 0
    while waiters and woken < count:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            woken += 1
    return woken


async def _cancel_and_wait(
    tasks: Iterable[asyncio.Task[Any]],
) -> asyncio.CancelledError | None:
    """Cancel tasks and wait for them; return the cancellation of this wait, if one came."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    while waiting := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved: nobody will ask for it any more
    return cancelled


async def _forget_cancellation(worker: asyncio.Task[None]) -> None:
    """Make a worker whole again after the cancellation of the task that it ran."""
    while worker.cancelling():
        worker.uncancel()
    # A task that cancels its own handle and then returns leaves, before 3.13, a cancellation
    # behind that has not been delivered; the next task must not get it.
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
