"""Producer–consumer over processes: a pool in which a dead worker costs one item."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import inspect
import io
import marshal
import math
import mmap
import multiprocessing
import os
import pickle
import reprlib
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from .errors import (
    DeadlineExceeded,
    PoolClosed,
    RemoteError,
    WorkerCrashed,
    check_count,
    check_loop,
    check_positive,
    check_seconds,
    notify,
)
from .process_worker import (
    CALL,
    ERROR,
    FAILED,
    HEADER,
    JOURNAL_SIZE,
    MANY,
    MARSHAL,
    PLAIN,
    STATE,
    UNREAD,
    dump,
    entry,
    frame,
    name_of,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self, TypeAlias

    _Event: TypeAlias = tuple[str, dict[str, Any]]

__all__ = ["ProcessExecutor", "ProcessPool", "ProcessPoolStatistics"]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

EXIT_GRACE = 5.0  # seconds for a worker without work to run its exit handlers; then it is killed
SHORT_BATCH, LONG_BATCH, LARGEST_BATCH = 0.001, 0.004, 1000  # seconds, seconds, items
START_ATTEMPTS = 3  # in a row, for a worker that somebody kills while it starts
TROUBLE = (Exception, SystemExit)  # pickling and unpickling run any code
QUICK_BATCH = 0.02  # seconds; another batch may wait in the pipe behind one that is so short


@dataclass(frozen=True, slots=True)
class ProcessPoolStatistics:
    """What a process pool does and has seen.

    Attributes:
        workers: How many worker processes are ready.
        busy: How many of them handle an item.
        waiting: How many items wait for a worker.
        delivered: How often an item was handed to a worker.
        redelivered: How many of these deliveries repeat one that was lost with its worker.
        poisoned: How many items were given up because their last delivery killed its worker too.
        timed_out: How many items were given up because they took longer than their limit.
        restarts: How many workers have died or were killed, and were replaced.
        recycled: How many workers were replaced because they had handled enough items.
    """

    workers: int
    busy: int
    waiting: int
    delivered: int
    redelivered: int
    poisoned: int
    timed_out: int
    restarts: int
    recycled: int


class ProcessPool:
    """Run plain functions in worker processes, and survive the death of any of them.

    Python code that computes uses one core for each process. But when a worker process is killed
    (out of memory, a segmentation fault, ``os._exit``), ``multiprocessing.Pool`` waits for its
    answer for ever, and ``ProcessPoolExecutor`` fails every other call as well. Here the death
    of a worker costs the one item that it handled, and another worker takes its place.

    Use it with ``async with``. Leaving the block waits until everything submitted is handled;
    leaving it by an exception kills the workers. Functions, arguments and results travel by
    pickle: a function must be importable by its name, and a script that makes a pool needs
    ``if __name__ == "__main__":``. A process is started when there is an item for it. A worker
    that gets SIGTERM finishes its item first, one that gets SIGINT (Ctrl-C) goes on, as the parent
    decides; when the parent is gone, its workers end, too.

    Args:
        workers: How many processes to keep at most.
        start_method: How a process is started, ``"spawn"`` or ``"forkserver"``. ``"fork"`` is
            refused, as it copies the locks that other threads hold, and every worker would hold
            the pipes of the others open.
        max_deliveries: How often an item may be handed to a worker in all. With 1, it is handled
            at most once; with more, a call that lost its worker is made again.
        task_timeout: Seconds that a worker may take for one item; then it is killed, and another
            one takes its place. The time in the line does not count.
        max_tasks_per_worker: How many items a worker handles before a fresh one replaces it (a
            batch is finished first); ``None`` means without end. A cure for code that leaks.
        initializer: A function that each worker calls before its first item.
        initargs: Its arguments.

    Attributes:
        on_event: Called with ``process_pool.worker_crashed`` (``exitcode``),
            ``process_pool.redelivered`` (``item``) and ``process_pool.gave_up`` (``item``,
            ``deliveries``).

    Raises:
        ValueError: If an argument is out of range.

    Each worker has a pipe of its own, and the parent alone decides who gets which item: no lock
    is shared, so none can be taken to the grave. That a worker may die and be replaced is the
    supervision of Erlang (Armstrong 2003); ``max_deliveries`` bounds what message queues call a
    poison message.
    """

    def __init__(
        self,
        workers: int,
        *,
        start_method: Literal["spawn", "forkserver"] = "spawn",
        max_deliveries: int = 1,
        task_timeout: float | None = None,
        max_tasks_per_worker: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        check_count("workers", workers)
        check_count("max_deliveries", max_deliveries)
        if task_timeout is not None:
            check_positive("task_timeout", task_timeout)
        if max_tasks_per_worker is not None:
            check_count("max_tasks_per_worker", max_tasks_per_worker)
        if start_method not in {"spawn", "forkserver"}:
            raise ValueError(f"start_method must be 'spawn' or 'forkserver', got {start_method!r}")
        if initializer is not None:
            _check_function("initializer", initializer)
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._size = workers
        self._context: Any = multiprocessing.get_context(start_method)
        self._max_deliveries = max_deliveries
        self._task_timeout = task_timeout
        self._max_tasks = max_tasks_per_worker
        self._setup = (initializer, initargs)
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keepers: set[asyncio.Task[None]] = set()  # each keeps one worker alive
        self._ready: set[_Worker] = set()
        self._idle: deque[_Worker] = deque()
        self._waiting: deque[_Job] = deque()
        self._unsettled: set[asyncio.Future[Any]] = set()
        self._delivered = self._redelivered = self._poisoned = self._timed_out = 0
        self._restarts = self._recycled = 0

    async def __aenter__(self) -> Self:
        self._loop = check_loop(self, self._loop)
        if self._open or self._keepers:
            raise RuntimeError("this ProcessPool is running already")
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        await self.close(grace=None if kind is None else 0)

    async def close(self, *, grace: float | None = None) -> None:
        """Take no more items, finish those that were submitted, and end the workers.

        A program that is told to stop (SIGTERM, Ctrl-C) has some seconds to finish what it began.

        Args:
            grace: Seconds after which the workers are killed, and what is not finished fails with
                :exc:`~concurrency_patterns.errors.PoolClosed`; ``None`` means never.
        """
        if grace is not None:
            check_seconds("grace", grace)
        self._open = False
        try:
            if self._unsettled and grace != 0:
                await asyncio.wait(set(self._unsettled), timeout=grace)
            if not self._unsettled and grace != 0:
                await self._dismiss_all()
        finally:
            self._refuse_what_is_left()
            for keeper in self._keepers:
                keeper.cancel()
            if self._keepers:
                await asyncio.wait(set(self._keepers))

    async def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a worker process and wait for what it returns.

        Cancelling this call takes the item out of the line, or kills the worker that handles it.
        So ``asyncio.timeout`` around it is a hard limit, for waiting and running together.

        Args:
            fn: A plain function that can be imported by its name.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What ``fn`` returns.

        Raises:
            WorkerCrashed: If the worker died while it ran ``fn``, or the workers cannot start.
            DeadlineExceeded: If ``fn`` took longer than ``task_timeout``.
            RemoteError: If the result, or the exception that ``fn`` raised, cannot travel between
                processes. Any other exception comes as it was raised, with the traceback of the
                worker as a note.
            TypeError: If the arguments cannot be pickled, or ``fn`` is ``async``.
            PoolClosed: If the pool is not open.
        """
        _check_function("fn", fn)
        [outcome] = await self._enqueue(fn, [args], kwargs, self._task_timeout)
        if type(outcome) is _Failure:
            raise outcome.error
        result: R = outcome
        return result

    @overload
    def map(
        self,
        fn: Callable[[T], R],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        buffer: int | None = ...,
        chunksize: int | None = ...,
        timeout: float | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> AsyncIterator[R]: ...

    @overload
    def map(
        self,
        fn: Callable[[T], R],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        buffer: int | None = ...,
        chunksize: int | None = ...,
        timeout: float | None = ...,
        return_exceptions: bool,
    ) -> AsyncIterator[R | Exception]: ...

    def map(
        self,
        fn: Callable[[T], R],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = True,
        buffer: int | None = None,
        chunksize: int | None = 1,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> AsyncIterator[R | Exception]:
        """Call a function with each item of a source, in all workers, and yield the results.

        The source is read only as fast as the results are taken, so it may be endless.

        Args:
            fn: A plain function of one argument that can be imported by its name.
            source: The items; an iterable or an asynchronous one.
            ordered: Whether results come in the order of the items, or as they are finished.
            buffer: How many items (batches, if ``chunksize`` is not 1), beyond one for each
                worker, may be read without their results having been taken; ``None`` means three
                for each worker, so that one late result does not stop the others.
            chunksize: How many items travel together, and wait for each other; this pays off when
                an item takes less than a millisecond. ``None`` lets batches grow until one takes
                some milliseconds; an asynchronous source is then read one by one, as its items may
                be slow to come. In a batch, too, a dead worker, a time limit or an error costs one
                item only.
            timeout: Seconds that a worker may take for one item, in place of ``task_timeout``.
            return_exceptions: Whether the exception of an item is yielded in the place of its
                result. Otherwise it is raised, and the items not yet finished are given up.

        Yields:
            What ``fn`` returned.

        Raises:
            WorkerCrashed: As for :meth:`submit`; any other exception of ``submit`` too.
        """
        _check_function("fn", fn)
        self._check_open()
        if buffer is None:
            buffer = 3 * self._size
        check_count("buffer", buffer, least=0)
        if chunksize is not None:
            check_count("chunksize", chunksize)
        if timeout is not None:
            check_positive("timeout", timeout)
        limit = self._task_timeout if timeout is None else timeout
        pace = _Pace(chunksize or 1, fixed=chunksize is not None)
        begin = functools.partial(
            _Reading,
            source,
            pace,
            lambda batch: self._enqueue(fn, batch, None, limit, pace),
            most=self._size + buffer,
            ordered=ordered,
        )
        return self._results(begin, return_exceptions=return_exceptions)

    async def _results(
        self, begin: Callable[[], _Reading], *, return_exceptions: bool
    ) -> AsyncIterator[Any]:
        reading = begin()
        try:
            while (outcomes := await reading.take()) is not None:
                for outcome in outcomes:
                    if type(outcome) is not _Failure:
                        yield outcome
                    elif return_exceptions:
                        yield outcome.error
                    else:
                        raise outcome.error
        finally:
            await reading.close()

    def statistics(self) -> ProcessPoolStatistics:
        """Return what the pool does and has seen."""
        return ProcessPoolStatistics(
            workers=len(self._ready),
            busy=sum(worker.job is not None for worker in self._ready),
            waiting=sum(len(job.items) - len(job.outcomes) for job in self._waiting),
            delivered=self._delivered,
            redelivered=self._redelivered,
            poisoned=self._poisoned,
            timed_out=self._timed_out,
            restarts=self._restarts,
            recycled=self._recycled,
        )

    def _check_open(self) -> None:
        if not self._open:
            raise PoolClosed("submit and map need a pool that runs: use it inside of `async with`")

    def _enqueue(
        self,
        fn: Callable[..., Any],
        items: list[Any],
        kwargs: dict[str, Any] | None,
        limit: float | None,
        pace: _Pace | None = None,
    ) -> asyncio.Future[list[Any]]:
        self._check_open()
        check_loop(self, self._loop)
        job = _Job(asyncio.Future(), fn, items, kwargs, limit, pace)
        job.pack()
        self._unsettled.add(job.future)
        job.future.add_done_callback(lambda _: self._on_done(job))
        self._waiting.append(job)
        self._dispatch()
        if self._waiting and len(self._keepers) < self._size:
            self._hire()
        return job.future

    def _on_done(self, job: _Job) -> None:
        self._unsettled.discard(job.future)
        if not job.future.cancelled():
            return
        if job in self._waiting:
            self._waiting.remove(job)
        elif job.worker is not None and job in (job.worker.job, job.worker.ahead):
            job.worker.kill()

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            if self._waiting[0].future.done():
                self._waiting.popleft()  # cancelled a moment ago
                continue
            worker = self._idle.popleft()
            if worker.is_alive():  # else it died without work; its keeper replaces it
                self._give(worker)
        if self._waiting and self._waiting[0].quick():
            for worker in self._ready:
                if self._waiting and self._may_have_another(worker, self._waiting[0]):
                    self._give(worker)

    def _give(self, worker: _Worker) -> None:
        job = self._waiting.popleft()
        worker.give(job)
        self._delivered += len(job.items) - len(job.outcomes)

    def _may_have_another(self, worker: _Worker, job: _Job) -> bool:
        """Tell whether the worker may get a second quick batch, so that it need not wait for us."""
        return (
            worker.job is not None
            and worker.job.pace is job.pace
            and worker.ahead is None
            and not job.future.done()
            and not job.outcomes
            and (self._max_tasks is None or worker.handled < self._max_tasks)
        )

    def _hire(self) -> None:
        """Start a worker for each item that waits, as far as none is starting for it."""
        starting = len(self._keepers) - len(self._ready)
        for _ in range(min(len(self._waiting) - starting, self._size - len(self._keepers))):
            keeper = asyncio.create_task(self._keep(), name="process pool: keeper")
            self._keepers.add(keeper)
            keeper.add_done_callback(self._keepers.discard)

    async def _keep(self) -> None:
        """Keep one worker alive, as long as there is or may be work."""
        lost_starts = 0
        while self._open or self._waiting:
            worker = _Worker(self._on_message)
            exitcode = cause = None
            try:
                exitcode = await worker.live(self._context, self._setup)
            except Exception as error:  # noqa: BLE001 -- no process to be had, for whatever reason
                cause = error
            finally:
                was_ready = worker in self._ready
                self._ready.discard(worker)
                if worker in self._idle:
                    self._idle.remove(worker)
            lost_starts = 0 if was_ready else lost_starts + 1
            by_signal = exitcode is not None and exitcode < 0  # else it would end so again
            if lost_starts == START_ATTEMPTS or (lost_starts and not by_signal):
                self._keepers.discard(worker.keeper)  # the next submission hires another one
                if not self._keepers:
                    reason = _tell_start(worker.failure, cause, exitcode)
                    self._fail_all(reason, worker.failure or cause, exitcode)
                return
            again = self._open or bool(self._waiting) or worker.job is not None
            self._recycled += again and worker.dismissed
            self._restarts += again and not worker.dismissed
            events = self._on_exit(worker, exitcode)
            if not worker.dismissed and not worker.killed:
                events.insert(0, ("process_pool.worker_crashed", {"exitcode": exitcode}))
            self._dispatch()
            if self.on_event is not None:
                for kind, data in events:
                    notify(self.on_event, kind, **data)

    def _on_message(self, worker: _Worker, kind: bytes, body: bytes | bytearray) -> None:
        job = worker.job
        if kind == FAILED:
            worker.failure = _restore(body)
            return
        if job is None:  # it is ready
            self._ready.add(worker)
            self._free(worker)
            return
        if kind == UNREAD and job.kwargs is None and not job.apart:
            self._delivered -= len(job.items)
            job.pack(apart=True)  # now each item fails by itself
            self._waiting.appendleft(job)
            self._free(worker)
            return
        answers = pickle.loads(body) if kind in {MANY, PLAIN} else [body]  # noqa: S301 -- our own process
        if complete := len(job.outcomes) + len(answers) == len(job.items):
            if job.pace is not None:
                took = time.monotonic() - worker.begun_at
                job.pace.took(len(job.items) - worker.base, took)
            self._free(worker)  # first: the worker shall not wait for us to unpickle
        else:
            worker.given_at = time.monotonic()  # of the next item of the batch
        job.read(kind, answers)
        if complete and not job.future.done():
            job.future.set_result(job.outcomes)

    def _free(self, worker: _Worker) -> None:
        worker.take()
        if worker.job is not None:
            self._dispatch()
        elif self._max_tasks is not None and worker.handled >= self._max_tasks:
            worker.dismiss()
        else:
            self._idle.append(worker)
            self._dispatch()

    def _on_exit(self, worker: _Worker, exitcode: int | None) -> list[_Event]:
        """Hand out again what the worker had not begun, and judge the item that it had."""
        job, ahead = worker.job, worker.ahead
        if ahead is not None and not ahead.future.done():
            self._delivered -= len(ahead.items)
            self._waiting.appendleft(ahead)
        worker.ahead = None
        worker.take()
        if job is None or job.future.done():
            return []
        results, begun = worker.testament(job)
        job.read(MANY, results)
        if len(job.outcomes) > worker.base:
            job.losses = 0
        self._delivered -= len(job.items) - len(job.outcomes) - begun
        events = self._judge(job, worker, exitcode) if begun else []
        if len(job.outcomes) == len(job.items):
            job.future.set_result(job.outcomes)
            return events
        if job.kwargs is None:
            job.pack(apart=True)  # who knows what kills when it is unpickled
        self._waiting.appendleft(job)
        return events

    def _judge(self, job: _Job, worker: _Worker, exitcode: int | None) -> list[_Event]:
        """Give up the item that was lost with its worker, unless it may be delivered again."""
        item = job.items[len(job.outcomes)]
        job.losses += 1
        what = f"{job.name} for {reprlib.repr(item)}"
        if worker.overdue:
            self._timed_out += 1
            message = f"{what} took longer than {job.limit:g} s, and its worker was killed"
            job.give_up(DeadlineExceeded(message, seconds=job.limit))
            return []
        if job.losses < self._max_deliveries:
            self._redelivered += 1
            return [("process_pool.redelivered", {"item": item})]
        event = ("process_pool.gave_up", {"item": item, "deliveries": job.losses})
        self._poisoned += 1
        message = f"a worker process {_tell_end(exitcode)} while it ran {what}"
        job.give_up(WorkerCrashed(message, exitcode=exitcode, item=item))
        return [event]

    def _fail_all(self, reason: str, cause: Exception | None, exitcode: int | None) -> None:
        """Fail all items that wait: there is no worker, and none can be started."""
        for job in self._waiting:
            for item in job.items[len(job.outcomes) :]:
                message = f"{reason}, before it ran {job.name}"
                error = WorkerCrashed(message, exitcode=exitcode, item=item)
                error.__cause__ = cause
                job.give_up(error)
            if not job.future.done():
                job.future.set_result(job.outcomes)
        self._waiting.clear()

    async def _dismiss_all(self) -> None:
        for worker in self._ready:
            worker.dismiss()
        for keeper in self._keepers - {worker.keeper for worker in self._ready}:
            keeper.cancel()  # its worker is still starting and has nothing to lose
        if self._keepers:
            await asyncio.wait(set(self._keepers))

    def _refuse_what_is_left(self) -> None:
        self._waiting.clear()
        for future in list(self._unsettled):
            if not future.done():
                future.set_exception(PoolClosed("the pool was closed before this was done"))


class _Failure:
    """An exception in the place of a result."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Pace:
    """How many items travel together: so many that their journey costs little beside their work."""

    def __init__(self, size: int, *, fixed: bool) -> None:
        self.size = size
        self.fixed = fixed
        self.seconds = math.inf  # that the last batch took

    def took(self, items: int, seconds: float) -> None:
        self.seconds = seconds
        if self.fixed or items != self.size:
            return
        if seconds < SHORT_BATCH:
            self.size = min(2 * self.size, LARGEST_BATCH)
        elif seconds > LONG_BATCH:
            self.size = max(self.size // 2, 1)


@dataclass(eq=False, slots=True)
class _Job:
    """A batch of ``map``, or a call of ``submit``: with ``kwargs``, its one item the arguments."""

    future: asyncio.Future[list[Any]]
    fn: Callable[..., Any]
    items: list[Any]
    kwargs: dict[str, Any] | None
    limit: float | None
    pace: _Pace | None
    request: bytes = b""
    apart: bool = False
    outcomes: list[Any] = field(default_factory=list)
    worker: _Worker | None = None
    losses: int = 0

    @property
    def name(self) -> str:
        return name_of(self.fn)

    def quick(self) -> bool:
        """Tell whether it is a batch, of a kind that was short so far."""
        return len(self.items) > 1 and self.pace is not None and self.pace.seconds < QUICK_BATCH

    def pack(self, *, apart: bool = False) -> None:
        """Pickle what is still to be done; ``apart``, so that each item can fail by itself."""
        items = self.items[len(self.outcomes) :]
        self.apart = apart and self.kwargs is None
        try:
            if self.apart:
                items = [self._pack_item(item) for item in items]
            self.request = dump((self.fn, items, self.kwargs, self.apart, self.limit is not None))
        except Exception as error:
            if self.kwargs is None and not self.apart:
                self.pack(apart=True)
            else:
                raise TypeError(self._refusal(error)) from error

    def _pack_item(self, item: object) -> bytes | str:
        try:
            return dump(item)
        except TROUBLE as error:
            return self._refusal(error)

    def _refusal(self, error: BaseException) -> str:
        return f"the call of {self.name} cannot be pickled for a worker process: {error}"

    def read(self, kind: bytes, answers: list[Any]) -> None:
        """Make outcomes of answers: errors, plain results, and others, which are pickled."""
        if kind in {ERROR, UNREAD}:
            self.outcomes.append(_Failure(_restore(answers[0])))
            return
        if kind != PLAIN:
            answers = [self._load(a) if type(a) in {bytes, bytearray} else a for a in answers]
        self.outcomes += answers

    def _load(self, answer: bytes | bytearray) -> Any:
        try:
            return pickle.loads(answer)  # noqa: S301 -- comes from our own process
        except TROUBLE as error:
            message = f"the result of {self.name} cannot be unpickled: {summary(error)}"
            text = "".join(traceback.format_exception(error))
            return _Failure(RemoteError(message, traceback=text))

    def give_up(self, error: Exception) -> None:
        """Let the first item without an outcome fail."""
        self.outcomes.append(_Failure(error))
        self.losses = 0


class _Worker(asyncio.BufferedProtocol):
    """The parent's end of one worker process: its pipe, its life, the job it has.

    The pipe is a pair of sockets, as these are what every event loop can read and write without
    blocking: a message of any size neither stops the loop nor waits for the other side. What it
    receives goes straight to its place: ``asyncio.Protocol`` makes a small item 1.6 times dearer.
    """

    def __init__(self, on_message: Callable[[_Worker, bytes, bytes | bytearray], None]) -> None:
        self.job: _Job | None = None
        self.ahead: _Job | None = None  # waits in the pipe
        self.base = 0  # how many outcomes the job had before
        self.handled = 0  # items in all
        self._serial = 0  # of the job
        self.begun_at = self.given_at = 0.0  # the job; its item, as far as the parent can tell
        self.overdue = self.killed = self.dismissed = False
        self.failure: Exception | None = None
        self.keeper: Any = asyncio.current_task()
        self._on_message = on_message
        self._scratch = memoryview(bytearray(2**16))
        self._filled = 0
        self._kind = b""
        self._body = bytearray()  # of a message that does not fit into the scratch
        self._missing = memoryview(b"")
        self._gone: asyncio.Future[None] = asyncio.Future()
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._journal: mmap.mmap | None = None

    async def live(self, context: Any, setup: tuple[Any, ...]) -> int | None:
        """Run the process until it ends; return its exit code."""
        ours, theirs = socket.socketpair()
        self._pipe = ours
        with ours:
            with theirs:
                target, args = entry(theirs, *setup)
                self._process = context.Process(
                    target=target, args=args, name="process pool worker", daemon=True
                )
                self._process.start()
            try:
                self._share_journal(ours)
                await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
                await self._gone
                self._process.join(timeout=0.1)  # its pipe is closed: it is all but gone
            finally:
                self._stop_timer()
                self._kill()
                self._process.join()
                exitcode: int | None = self._process.exitcode
                self._process.close()
        return exitcode

    def _share_journal(self, pipe: socket.socket) -> None:
        if not hasattr(os, "memfd_create"):  # Linux has it; elsewhere each answer is sent at once
            pipe.send(b"-")
            return
        memory = os.memfd_create("journal of a process pool worker")
        os.ftruncate(memory, JOURNAL_SIZE)
        self._journal = mmap.mmap(memory, JOURNAL_SIZE)
        socket.send_fds(pipe, [b"j"], [memory])
        os.close(memory)

    def is_alive(self) -> bool:
        # What it had not begun is told by the journal; without one the process is asked.
        return not self._gone.done() and (self._journal is not None or self._process.is_alive())

    def give(self, job: _Job) -> None:
        job.worker = self
        self.handled += len(job.items) - len(job.outcomes)
        self._transport.write(frame(CALL, job.request))
        if self.job is None:
            self._begin(job)
        else:
            self.ahead = job

    def take(self) -> None:
        """The job is done, or lost; the one that waits in the pipe is next."""
        self._stop_timer()
        self.job = None
        if self.ahead is not None:
            job, self.ahead = self.ahead, None
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        self.job = job
        self.base = len(job.outcomes)
        self.begun_at = self.given_at = time.monotonic()
        self._serial += 1
        if job.limit is not None:
            self._call_later(job.limit, self._check_limit)

    def testament(self, job: _Job) -> tuple[list[Any], bool]:
        """Return the results it could not send any more, and whether it had begun another item."""
        if self._journal is None:
            return [], True
        _, serial, sent_before, begun, code = STATE.unpack_from(self._journal)
        if serial != self._serial:
            return [], False
        if begun == 0:  # it died while it read the batch: by which item?
            return [], job.apart or len(job.items) == 1
        sent = len(job.outcomes) - self.base
        results: list[Any] = []
        if (count := begun - 1 - sent_before) > 0:
            kept = self._journal[STATE.size :]
            if code == MARSHAL:
                stream = io.BytesIO(kept)
                results = [marshal.load(stream) for _ in range(count)]  # noqa: S302 -- ours
            else:
                results = [*struct.unpack_from(f"={count}{chr(code)}", kept)]
            results = results[sent - sent_before :]  # it had sent them, and then could not say so
        return results, begun > sent + len(results)

    def dismiss(self) -> None:
        """Let the process end by itself: nothing more will come through its pipe."""
        if self._transport is not None and not self._transport.is_closing():
            self.dismissed = True
            self._transport.write_eof()
            self._call_later(EXIT_GRACE, self.kill)

    def kill(self) -> None:
        self.killed = True
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def _check_limit(self) -> None:
        if self.job is None or self.job.limit is None:
            return
        since = 0.0 if self._journal is None else STATE.unpack_from(self._journal)[0]
        left = self.job.limit - (time.monotonic() - max(since, self.given_at))
        if left > 0:
            self._call_later(left, self._check_limit)
        else:
            self.overdue = self.killed = True
            self._process.kill()  # what it has sent before is still read

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, _: int) -> memoryview:
        return self._missing or self._scratch[self._filled :]

    def buffer_updated(self, count: int) -> None:
        if self._missing:
            self._missing = self._missing[count:]
            if not self._missing:
                self._on_message(self, self._kind, self._body)
            return
        self._filled += count
        while self._filled >= HEADER.size:
            self._kind, size = HEADER.unpack_from(self._scratch)
            end = HEADER.size + size
            if end > len(self._scratch):  # the rest is received in its place, not copied there
                start = self._scratch[HEADER.size : self._filled]
                self._body = bytearray(size)
                self._body[: len(start)] = start
                self._missing = memoryview(self._body)[len(start) :]
                self._filled = 0
            if end > self._filled:
                return
            body = bytes(self._scratch[HEADER.size : end])
            rest = bytes(self._scratch[end : self._filled])
            self._scratch[: len(rest)] = rest
            self._filled = len(rest)
            self._on_message(self, self._kind, body)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.killed or self.overdue:
            self._read_what_is_left()
        if not self._gone.done():
            self._gone.set_result(None)

    def _read_what_is_left(self) -> None:
        """Read what the worker had sent before it died, if a failed write has ended the reading."""
        with suppress(OSError):
            while count := self._pipe.recv_into(self.get_buffer(-1)):
                self.buffer_updated(count)


def _restore(body: bytes | bytearray) -> Exception:
    line, text, pickled = pickle.loads(body)  # noqa: S301 -- comes from our own process
    error: Exception = RemoteError(line, traceback=text)
    with suppress(*TROUBLE):
        original = pickle.loads(pickled)  # noqa: S301 -- comes from our own process
        # A coroutine cannot raise StopIteration; KeyboardInterrupt would end the parent.
        if isinstance(original, Exception) and not isinstance(original, StopIteration):
            error = original
    error.add_note(f"raised in a worker process:\n{text}")
    return error


def _check_function(name: str, value: object) -> None:
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise TypeError(f"{name} must be a plain function, got {value!r}")


def _tell_end(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def _tell_start(failure: Exception | None, cause: Exception | None, exitcode: int | None) -> str:
    if failure is not None:
        return f"the initializer of a worker process failed: {summary(failure)}"
    end = "could not be started" if cause else f"{_tell_end(exitcode)} while it started"
    return (
        f"a worker process {end} (its standard error may tell why; a script that makes a pool "
        'needs `if __name__ == "__main__":`)'
    )


class _Reading:
    """What one ``map`` has read of its source and has not yet given to its caller.

    A plain source is read by whoever takes the results; an asynchronous one by a task, as its
    items may be slow to come and must not hold back the results of earlier ones.
    """

    def __init__(
        self,
        source: Iterable[T] | AsyncIterable[T],
        pace: _Pace,
        call: Callable[[list[T]], asyncio.Future[list[Any]]],
        *,
        most: int,
        ordered: bool,
    ) -> None:
        self._call = call
        self._most = most
        self._ordered = ordered
        self._calls: set[asyncio.Future[list[Any]]] = set()
        self._answers: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        self._room = asyncio.Semaphore(most - 1)  # one more as soon as somebody takes
        self._batches = iter(list[list[Any]]())
        self._end: asyncio.Future[None]
        if isinstance(source, AsyncIterable):
            self._end = asyncio.create_task(self._read_on(_async_batches(source, pace)))
            self._end.add_done_callback(self._answers.put_nowait)  # it wakes the taker
        else:
            self._end = asyncio.Future()
            self._batches = _batches(source, pace)

    async def take(self) -> list[Any] | None:
        """Wait for the next outcomes; ``None`` after the last ones."""
        if is_async := isinstance(self._end, asyncio.Task):
            self._room.release()
        while True:
            if not is_async:
                self._read()
            if not self._calls and self._end.done():
                await self._end
                return None
            answer = await self._answers.get()
            if answer is not self._end:
                outcomes: list[Any] = await answer
                self._calls.discard(answer)
                return outcomes

    def _read(self) -> None:
        if self._end.done():
            return
        try:
            for batch in islice(self._batches, self._most - len(self._calls)):
                self._start(batch)
        except Exception as error:  # noqa: BLE001 -- it is raised behind the results
            self._end.set_exception(error)
        else:
            if len(self._calls) < self._most:
                self._end.set_result(None)

    async def _read_on(self, batches: AsyncGenerator[list[T], None]) -> None:
        async with aclosing(batches):
            await self._room.acquire()
            async for batch in batches:
                self._start(batch)
                await self._room.acquire()

    def _start(self, batch: list[Any]) -> None:
        call = self._call(batch)
        self._calls.add(call)
        if self._ordered:
            self._answers.put_nowait(call)
        else:
            call.add_done_callback(self._answers.put_nowait)

    async def close(self) -> None:
        """Give up what was not taken."""
        for call in self._calls:
            if not call.cancel() and not call.cancelled():
                call.exception()  # nobody will ask for it any more
        if not self._end.cancel():
            if not self._end.cancelled():
                self._end.exception()
        elif isinstance(self._end, asyncio.Task):
            await asyncio.wait([self._end])  # until it has closed the source
            if not self._end.cancelled():
                self._end.result()  # it may have failed to


def _batches(source: Iterable[T], pace: _Pace) -> Iterator[list[T]]:
    """Read a source in batches; if it fails, what it gave before comes first."""
    iterator = iter(source)
    batch: list[T] = []
    try:
        while True:
            batch.extend(islice(iterator, pace.size))  # keeps what came before an error
            if not batch:
                return
            yield batch
            batch = []
    except Exception:
        if batch:
            yield batch
        raise


async def _async_batches(source: AsyncIterable[T], pace: _Pace) -> AsyncGenerator[list[T], None]:
    """Do the same with an asynchronous source."""
    batch: list[T] = []
    size = pace.size if pace.fixed else 1
    closing: AbstractAsyncContextManager[Any] = (
        aclosing(source) if hasattr(source, "aclose") else nullcontext()
    )
    async with closing:
        try:
            async for item in source:
                batch.append(item)
                if len(batch) == size:
                    yield batch
                    batch = []
        except Exception:
            if batch:
                yield batch
            raise
        if batch:
            yield batch


class ProcessExecutor(concurrent.futures.Executor):
    """A :class:`ProcessPool` for code without an event loop.

    It is an executor as in :pep:`3148`, so it can stand where a ``ProcessPoolExecutor`` stood:
    ``submit``, ``map``, ``with``, ``shutdown``, ``as_completed``. But a dead worker costs one
    item, and cancelling a future that runs kills its worker. As for every executor, ``map`` reads
    its whole source at once; :meth:`ProcessPool.map` does not.

    Args:
        workers: How many processes to keep at most.
        **options: The other arguments of :class:`ProcessPool`.

    Attributes:
        pool: The pool, for its ``statistics()`` and ``on_event``; its listeners are called in the
            executor's own thread.
    """

    def __init__(self, workers: int, **options: Any) -> None:
        self.pool = ProcessPool(workers, **options)
        self._closed = False
        self._lock = threading.Lock()  # a call comes before the end, or not at all
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(started)), name="process executor", daemon=True
        )
        self._thread.start()
        self._loop = started.result()
        atexit.register(self.shutdown)

    async def _run(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        self._end = asyncio.Event()
        async with self.pool:
            started.set_result(asyncio.get_running_loop())
            await self._end.wait()

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Call a function in a worker process; return the future of its result."""
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot submit after shutdown")
            call = self.pool.submit(fn, *args, **kwargs)
            return asyncio.run_coroutine_threadsafe(call, self._loop)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, finish those that were submitted, and end the workers.

        Args:
            wait: Whether to wait until that is done.
            cancel_futures: Whether to cancel the calls that no worker has begun.
        """
        atexit.unregister(self.shutdown)
        with self._lock:
            if not self._closed:
                self._closed = True
                asyncio.run_coroutine_threadsafe(self._stop(cancel_futures), self._loop)
        if wait:
            self._thread.join()

    async def _stop(self, cancel: bool) -> None:
        for job in list(self.pool._waiting) if cancel else ():
            job.future.cancel()
        self._end.set()
