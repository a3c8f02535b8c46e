"""Producer–consumer over processes: a pool in which a dead worker costs one item."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import pickle
import reprlib
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import AsyncIterable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from .errors import PoolClosed, RemoteError, WorkerCrashed, check_count, check_loop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Self

__all__ = ["ProcessPool", "ProcessPoolStatistics"]

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

EXIT_GRACE = 5.0  # seconds for a worker without work to run its exit handlers; then it is killed


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
        restarts: How many workers have died or were killed, and were replaced.
    """

    workers: int
    busy: int
    waiting: int
    delivered: int
    redelivered: int
    poisoned: int
    restarts: int


class ProcessPool:
    """Run plain functions in worker processes, and survive the death of any of them.

    Python code that computes uses one core for each process. But when a worker process is killed
    (out of memory, a segmentation fault, ``os._exit``), ``multiprocessing.Pool`` waits for its
    answer for ever, and ``ProcessPoolExecutor`` fails every other call as well. Here the death
    of a worker costs the one item that it handled, and another worker takes its place.

    Use it with ``async with``. Leaving the block waits until everything submitted is handled;
    leaving it by an exception kills the workers. Functions, arguments and results travel by
    pickle: a function must be importable by its name, and a script that makes a pool needs
    ``if __name__ == "__main__":``.

    Args:
        workers: How many processes to keep.
        start_method: How a process is started, ``"spawn"`` or ``"forkserver"``. ``"fork"`` is
            refused, as it copies the locks that other threads hold, and every worker would hold
            the pipes of the others open.
        max_deliveries: How often an item may be handed to a worker in all. With 1, it is handled
            at most once; with more, a call that lost its worker is made again.

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
    ) -> None:
        check_count("workers", workers)
        check_count("max_deliveries", max_deliveries)
        if start_method not in {"spawn", "forkserver"}:
            raise ValueError(f"start_method must be 'spawn' or 'forkserver', got {start_method!r}")
        self._size = workers
        self._context: Any = multiprocessing.get_context(start_method)
        self._max_deliveries = max_deliveries
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keepers: set[asyncio.Task[None]] = set()  # each keeps one worker alive
        self._ready: set[_Worker] = set()
        self._idle: deque[_Worker] = deque()
        self._waiting: deque[_Job] = deque()
        self._unsettled: set[asyncio.Future[Any]] = set()
        self._delivered = self._redelivered = self._poisoned = self._restarts = 0

    async def __aenter__(self) -> Self:
        self._loop = check_loop(self, self._loop)
        if self._open or self._keepers:
            raise RuntimeError("this ProcessPool is running already")
        self._open = True
        self._hire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._open = False
        try:
            if kind is None:
                await self._drain()
        finally:
            self._refuse_what_is_left()
            for keeper in self._keepers:
                keeper.cancel()
            if self._keepers:
                await asyncio.wait(set(self._keepers))

    async def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a worker process and wait for what it returns.

        Cancelling this call takes the item out of the line, or kills the worker that handles it.
        So ``asyncio.timeout`` around it is a hard limit.

        Args:
            fn: A plain function that can be imported by its name.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Returns:
            What ``fn`` returns.

        Raises:
            WorkerCrashed: If the worker died while it ran ``fn``.
            RemoteError: If the result, or the exception that ``fn`` raised, cannot travel between
                processes. Any other exception comes as it was raised, with the traceback of the
                worker as a note.
            TypeError: If the arguments cannot be pickled, or ``fn`` is ``async``.
            PoolClosed: If the pool is not open.
        """
        return await self._enqueue(fn, args, kwargs, item=args)

    @overload
    def map(
        self,
        fn: Callable[[T], R],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = ...,
        buffer: int | None = ...,
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
        return_exceptions: bool,
    ) -> AsyncIterator[R | Exception]: ...

    async def map(
        self,
        fn: Callable[[T], R],
        source: Iterable[T] | AsyncIterable[T],
        *,
        ordered: bool = True,
        buffer: int | None = None,
        return_exceptions: bool = False,
    ) -> AsyncIterator[R | Exception]:
        """Call a function with each item of a source, in all workers, and yield the results.

        The source is read only as fast as the results are taken, so it may be endless.

        Args:
            fn: A plain function of one argument that can be imported by its name.
            source: The items; an iterable or an asynchronous one.
            ordered: Whether results come in the order of the items, or as they are finished.
            buffer: How many items, beyond one for each worker, may be read without their results
                having been taken; ``None`` means as many as there are workers.
            return_exceptions: Whether the exception of an item is yielded in the place of its
                result. Otherwise it is raised, and the items not yet finished are given up.

        Yields:
            What ``fn`` returned.

        Raises:
            WorkerCrashed: As for :meth:`submit`; any other exception of ``submit`` too.
        """
        if buffer is None:
            buffer = self._size
        check_count("buffer", buffer, least=0)
        room = asyncio.Semaphore(self._size + buffer)
        calls: set[asyncio.Future[R]] = set()
        answers: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()

        async def read() -> None:
            await room.acquire()
            try:
                async with aclosing(_each(source)) as items:
                    async for item in items:
                        call = self._enqueue(fn, (item,), {}, item=item)
                        calls.add(call)
                        if ordered:
                            answers.put_nowait(call)
                        else:
                            call.add_done_callback(answers.put_nowait)
                        await room.acquire()
            finally:
                if calls:
                    await asyncio.wait(calls)

        reader = asyncio.create_task(read(), name="process pool: reader")
        reader.add_done_callback(answers.put_nowait)  # behind all answers: the end
        try:
            while (answer := await answers.get()) is not reader:
                try:
                    result = await answer
                except Exception as error:
                    if not return_exceptions:
                        raise
                    result = error
                calls.discard(answer)
                yield result
                room.release()
            await reader
        finally:
            unfinished: list[asyncio.Future[Any]] = [*calls, reader]
            for left in unfinished:
                if not left.cancel() and not left.cancelled():
                    left.exception()  # nobody will ask for it any more
            await asyncio.wait([reader])  # until it has closed the source

    def statistics(self) -> ProcessPoolStatistics:
        """Return what the pool does and has seen."""
        return ProcessPoolStatistics(
            workers=len(self._ready),
            busy=sum(worker.job is not None for worker in self._ready),
            waiting=len(self._waiting),
            delivered=self._delivered,
            redelivered=self._redelivered,
            poisoned=self._poisoned,
            restarts=self._restarts,
        )

    def _enqueue(
        self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any], item: object
    ) -> asyncio.Future[R]:
        if not self._open:
            raise PoolClosed("submit and map need a pool that runs: use it inside of `async with`")
        loop = check_loop(self, self._loop)
        if not callable(fn) or inspect.iscoroutinefunction(fn):
            raise TypeError(f"fn must be a plain function, got {fn!r}")
        name = getattr(fn, "__qualname__", repr(fn))
        try:
            request = pickle.dumps((fn, args, kwargs), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            message = f"the call of {name} cannot be pickled for a worker process: {error}"
            raise TypeError(message) from error
        job = _Job(loop.create_future(), request, name, item)
        self._unsettled.add(job.future)
        job.future.add_done_callback(lambda _: self._on_done(job))
        self._waiting.append(job)
        self._hire()
        self._dispatch()
        return job.future

    def _on_done(self, job: _Job) -> None:
        self._unsettled.discard(job.future)
        if not job.future.cancelled():
            return
        if job in self._waiting:
            self._waiting.remove(job)
        elif job.worker is not None and job.worker.job is job:
            job.worker.kill()

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            if self._waiting[0].future.done():
                self._waiting.popleft()  # cancelled a moment ago
                continue
            worker = self._idle.popleft()
            if worker.is_alive():  # else it died without work; its keeper replaces it
                worker.give(self._waiting.popleft())
                self._delivered += 1

    def _hire(self) -> None:
        while len(self._keepers) < self._size:
            keeper = asyncio.create_task(self._keep(), name="process pool: keeper")
            self._keepers.add(keeper)
            keeper.add_done_callback(self._keepers.discard)

    async def _keep(self) -> None:
        """Keep one worker alive, as long as there is or may be work."""
        while self._open or self._waiting:
            worker = _Worker(self._on_message)
            exitcode = cause = None
            try:
                exitcode = await worker.live(self._context)
            except Exception as error:  # noqa: BLE001 -- no process to be had, for whatever reason
                cause = error
            finally:
                was_ready = worker in self._ready
                self._forget(worker)
            if was_ready:
                self._on_exit(worker, exitcode)
                self._restarts += self._open or bool(self._waiting)
            elif not self._on_failed_start(exitcode, cause):
                self._keepers.discard(worker.keeper)  # the next submission hires another one
                return

    def _forget(self, worker: _Worker) -> None:
        self._ready.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    def _on_message(self, worker: _Worker, kind: bytes, body: bytes) -> None:
        job, worker.job = worker.job, None
        self._ready.add(worker)
        self._idle.append(worker)
        self._dispatch()  # first: the worker shall not wait for us to unpickle
        if job is not None:
            _settle(job, kind, body)

    def _on_exit(self, worker: _Worker, exitcode: int | None) -> None:
        job = worker.job
        if job is None or job.future.done():
            return
        if job.deliveries < self._max_deliveries:
            self._redelivered += 1
            self._waiting.appendleft(job)
            self._dispatch()
        else:
            self._poisoned += 1
            end = _tell_end(exitcode)
            message = f"a worker process {end} while it ran {job.name} for {reprlib.repr(job.item)}"
            job.future.set_exception(WorkerCrashed(message, exitcode=exitcode, item=job.item))

    def _on_failed_start(self, exitcode: int | None, cause: Exception | None) -> bool:
        """Fail an item if no worker is left that could handle it; tell whether more wait."""
        if self._waiting and not self._ready:
            job = self._waiting.popleft()
            end = "could not be started" if cause else f"{_tell_end(exitcode)} while it started"
            message = (
                f"a worker process {end}, before it ran {job.name}; its standard error may tell "
                'why (a script that makes a pool needs `if __name__ == "__main__":`)'
            )
            error = WorkerCrashed(message, exitcode=exitcode, item=job.item)
            error.__cause__ = cause
            job.future.set_exception(error)
        return bool(self._waiting) and not self._ready

    async def _drain(self) -> None:
        if self._unsettled:
            await asyncio.wait(set(self._unsettled))
        for worker in list(self._ready):
            worker.dismiss()
        for keeper in self._keepers - {worker.keeper for worker in self._ready}:
            keeper.cancel()  # its worker is still starting and has nothing to lose
        if self._keepers:
            await asyncio.wait(set(self._keepers), timeout=EXIT_GRACE)

    def _refuse_what_is_left(self) -> None:
        self._waiting.clear()
        for future in list(self._unsettled):
            if not future.done():
                future.set_exception(PoolClosed("the pool was left before this was done"))


@dataclass(eq=False, slots=True)
class _Job:
    future: asyncio.Future[Any]
    request: bytes
    name: str
    item: object
    worker: _Worker | None = None
    deliveries: int = 0


# A message in either direction: its kind, the length of its body, its body.
HEADER = struct.Struct("!cQ")
READY, CALL, RESULT, ERROR = b"r", b"c", b"=", b"!"


def _frame(kind: bytes, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(body)) + body


class _Worker(asyncio.Protocol):
    """The parent's end of one worker process: its pipe, its life, the job it has.

    The pipe is a pair of sockets, as these are what every event loop can read and write without
    blocking: a message of any size neither stops the loop nor waits for the other side.
    """

    def __init__(self, on_message: Callable[[_Worker, bytes, bytes], None]) -> None:
        self.job: _Job | None = None
        self.keeper: Any = asyncio.current_task()
        self._on_message = on_message
        self._buffer = bytearray()
        self._gone = asyncio.get_running_loop().create_future()
        self._transport: Any = None

    async def live(self, context: Any) -> int | None:
        """Run the process until it ends; return its exit code."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._process = context.Process(
                    target=_serve, args=(theirs,), name="process pool worker", daemon=True
                )
                self._process.start()
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
                await self._gone
                self._process.join(timeout=0.1)  # its pipe is closed: it is all but gone
            finally:
                self.kill()
                self._process.join()
                exitcode: int | None = self._process.exitcode
                self._process.close()
        return exitcode

    def is_alive(self) -> bool:
        return not self._gone.done() and self._process.is_alive()

    def give(self, job: _Job) -> None:
        self.job = job
        job.worker = self
        job.deliveries += 1
        self._transport.write(_frame(CALL, job.request))

    def dismiss(self) -> None:
        """Let the process end by itself: nothing more will come through its pipe."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def kill(self) -> None:
        self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, size = HEADER.unpack_from(self._buffer)
            end = HEADER.size + size
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view:  # a slice of the array would be a second copy
                body = bytes(view[HEADER.size : end])
            del self._buffer[:end]
            self._on_message(self, kind, body)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._gone.done():
            self._gone.set_result(None)


def _settle(job: _Job, kind: bytes, body: bytes) -> None:
    """Give the answer of the worker to the one who waits for it."""
    if job.future.done():
        return
    if kind == ERROR:
        job.future.set_exception(_restore(body))
        return
    try:
        job.future.set_result(pickle.loads(body))  # noqa: S301 -- comes from our own process
    except Exception as error:  # noqa: BLE001 -- unpickling runs any code
        message = f"the result of {job.name} cannot be unpickled: {_summary(error)}"
        text = "".join(traceback.format_exception(error))
        job.future.set_exception(RemoteError(message, traceback=text))


def _restore(body: bytes) -> Exception:
    summary, text, pickled = pickle.loads(body)  # noqa: S301 -- comes from our own process
    error: Exception = RemoteError(summary, traceback=text)
    with suppress(Exception):  # unpickling runs any code
        original = pickle.loads(pickled)  # noqa: S301
        # A future refuses StopIteration; KeyboardInterrupt and the like would end the parent.
        if isinstance(original, Exception) and not isinstance(original, StopIteration):
            error = original
    error.add_note(f"raised in a worker process:\n{text}")
    return error


def _tell_end(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


async def _each(source: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
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


# What follows runs in the worker process.


def _serve(pipe: socket.socket) -> None:
    """Answer one call after the other until the parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    pipe.set_inheritable(False)  # a program that outlives this worker must not hold its pipe open
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=pipe.close)
    with suppress(EOFError, ConnectionError):
        pipe.sendall(_frame(READY))
        while True:
            _, size = HEADER.unpack(_receive(pipe, HEADER.size))
            kind, body = _answer(_receive(pipe, size))
            pipe.sendall(_frame(kind, body))


def _receive(pipe: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = pipe.recv_into(rest)
        if count == 0:
            raise EOFError
        rest = rest[count:]
    return data


def _answer(request: bytearray) -> tuple[bytes, bytes]:
    what = "the call cannot be unpickled"
    try:
        fn, args, kwargs = pickle.loads(request)  # noqa: S301 -- comes from our own process
        what = ""
        result = fn(*args, **kwargs)
        what = f"the result of {getattr(fn, '__qualname__', fn)} cannot be pickled"
        return RESULT, pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except BaseException as error:  # noqa: BLE001 -- SystemExit too is the answer of this one call
        return ERROR, _describe(error, what)
    finally:
        with suppress(Exception):
            sys.stdout.flush()  # a worker that is killed later shall not take it along


def _describe(error: BaseException, what: str) -> bytes:
    """Describe an exception in a form that always arrives."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # without our own frame
    text = "".join(traceback.format_exception(error))
    if what:
        error = RemoteError(f"{what}: {_summary(error)}", traceback=text)
    try:
        pickled = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 -- pickling runs any code
        pickled = b""
    return pickle.dumps((_summary(error), text, pickled))


def _summary(error: BaseException) -> str:
    line = traceback.format_exception_only(error)[0].strip()
    return line.removeprefix(f"{type(error).__module__}.")
