"""The other half of ``process_pool``: what runs in each of its processes.

A call waits until its process has started, and most of that time goes into imports. So this half
imports nothing that it does not need, above all not asyncio.
"""

from __future__ import annotations

import marshal
import mmap
import multiprocessing
import os
import pickle
import reprlib
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__: list[str] = []

# A message in either direction: its kind, the length of its body, its body.
HEADER = struct.Struct("!cQ")
READY, FAILED, CALL, UNREAD, ERROR = b"r", b"f", b"c", b"u", b"!"
RESULT, MANY, PLAIN = b"=", b"*", b"#"  # one result, pickled; a list of such and plain ones; plain

# Plain results need no pickle of their own: nothing can go wrong with them, and nobody can change
# them. So they are sent together, and marshal, which is three times as fast, keeps them till then.
PLAIN_TYPES = frozenset({int, float, bool, str, type(None)})
QUICK = 2  # marshal's version that looks for no repetitions

# The journal begins with: when the last item was begun, the number of the batch, how many answers
# of it were sent before what is kept here, the number of the item that was begun (0: it still
# reads the batch), and how the results that follow are kept: as an array of numbers, or by marshal.
STATE = struct.Struct("=dQQQQ")
BATCH, SENT, BEGUN, FORMAT = range(1, 5)
JOURNAL_SIZE = 2**18
NUMBERS = {int: "q", float: "d"}
MARSHAL = 0


def frame(kind: bytes, body: bytes = b"") -> bytes:
    """Make a message."""
    return HEADER.pack(kind, len(body)) + body


def dump(value: object) -> bytes:
    """Pickle a value."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def summary(error: BaseException) -> str:
    """Tell an exception in a line."""
    line = traceback.format_exception_only(error)[0].strip()
    return line.removeprefix(f"{type(error).__module__}.")


# To import this file by its name would import the package around it, and asyncio, which takes
# longer than all the rest of a start.
START = """
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("process_worker", file)
worker = module_from_spec(spec)
spec.loader.exec_module(worker)
worker.serve(*args)
"""


def entry(*args: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what a new process has to call to get to ``serve``."""
    if not os.path.isfile(__file__):  # noqa: PTH113 -- in an archive, or a frozen program
        return serve, args
    return exec, (START, {"file": __file__, "args": args})


def name_of(fn: object) -> str:
    """Name a function in a message."""
    return getattr(fn, "__qualname__", None) or reprlib.repr(fn)


def serve(pipe: socket.socket, initializer: Callable[..., object] | None, args: Any) -> None:
    """Be a worker until the parent closes the pipe, or is gone."""
    multiprocessing.current_process().daemon = False  # a function may start processes, too
    server = _Server(pipe)
    with suppress(EOFError, ConnectionError):
        if initializer is not None:
            try:
                initializer(*args)
            except BaseException as error:  # noqa: BLE001 -- SystemExit too is a failure
                server.send(FAILED, _describe(error))
                return
        server.send(READY)
        while True:
            server.answer_one()


class _Server:
    """Answers one call after the other."""

    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._reader = pipe.makefile("rb", 2**16)
        self._journal = _Journal(_receive_memory(pipe))
        self._busy = self._ending = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
        signal.signal(signal.SIGTERM, self._on_sigterm)
        with suppress(Exception):  # a worker that is killed shall not take its output along
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or it has none
        threading.Thread(target=_end_with_parent, daemon=True).start()
        pipe.set_inheritable(False)  # a program that outlives this worker must not hold it open
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave)

    def answer_one(self) -> None:
        """Wait for a call, and answer it."""
        self._busy = False
        if self._ending:
            raise SystemExit(128 + signal.SIGTERM)
        _, size = HEADER.unpack(self._receive(HEADER.size))
        request = self._receive(size)
        self._busy = True
        self._journal.begin_batch()
        try:
            call = pickle.loads(request)  # noqa: S301 -- comes from our own process
        except BaseException as error:  # noqa: BLE001 -- unpickling runs any code
            self.send(UNREAD, _describe(error, UNREADABLE))
        else:
            del request
            self._handle(*call)

    def _handle(
        self,
        fn: Callable[..., Any],
        items: list[Any],
        kwargs: dict[str, Any] | None,
        apart: bool,
        limited: bool,
    ) -> None:
        """Answer each item; the time between two tiny ones is what this loop costs."""
        journal = self._journal
        begun_at, state = journal.begun_at, journal.state
        kept = list[Any]()
        for number, item in enumerate(items, 1):
            if limited:
                begun_at[0] = monotonic()
            state[BEGUN] = number
            try:
                if kwargs is None:
                    result = fn(_open(item) if apart else item)
                else:
                    result = fn(*item, **kwargs)
                if type(result) not in PLAIN_TYPES:
                    result = _pickle_result(fn, result)
            except BaseException as error:  # noqa: BLE001 -- SystemExit is an answer, too
                self._send_kept(kept)
                self.send(ERROR, _describe(error))
            else:
                kept.append(result)
                if number < len(items) and not self._ending and journal.keep(kept):
                    continue
                result = None  # not kept while the next item is handled
                self._send_kept(kept)
            if self._ending:
                return
            journal.turn_over(number)

    def _send_kept(self, kept: list[Any]) -> None:
        if not kept:
            return
        types = self._journal.types_of(kept)
        if bytes not in types:
            self.send(PLAIN, dump(kept))
        elif len(kept) == 1:
            self.send(RESULT, kept[0])
        else:
            self.send(MANY, dump(kept))
        kept.clear()

    def send(self, kind: bytes, body: bytes = b"") -> None:
        """Send a message to the parent."""
        self._pipe.sendall(frame(kind, body))

    def _receive(self, size: int) -> bytes:
        data: bytes = self._reader.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _on_sigterm(self, *_: object) -> None:
        self._ending = True  # after this item
        if not self._busy:
            raise SystemExit(128 + signal.SIGTERM)

    def _leave(self) -> None:
        self._ending = True  # the child of a fork has no part in what its parent does
        self._reader.close()
        self._pipe.close()


class _Journal:
    """Memory that a worker writes and that outlives it: what it has done and could not send yet."""

    def __init__(self, memory: int | None) -> None:
        self._outlives = memory is not None
        self._bytes = mmap.mmap(-1 if memory is None else memory, JOURNAL_SIZE)
        if memory is not None:
            os.close(memory)
        view = memoryview(self._bytes)
        self.begun_at, self.state = view[:8].cast("d"), view[: STATE.size].cast("Q")
        results: Any = view[STATE.size :]
        self._arrays = {kind: results.cast(code) for kind, code in NUMBERS.items()}
        self._kind: type | None = None  # of the numbers that this page is for
        self._array: Any = None

    # A worker may die between any two of these steps, and what it leaves must be true. A new batch
    # counts from the moment at which its number is written, which comes last. To write how many
    # answers were sent voids all that is kept on a page, so it comes before the page changes.

    def begin_batch(self) -> None:
        """Begin a new batch, of which no item is begun yet."""
        self.begun_at[0] = monotonic()
        self.state[BEGUN] = self.state[SENT] = 0
        self._begin_page()
        self.state[BATCH] += 1

    def turn_over(self, sent: int) -> None:
        """Begin a new page, when so many answers of the batch have been sent."""
        self.begun_at[0] = monotonic()
        self.state[SENT] = sent
        self._begin_page()

    def _begin_page(self) -> None:
        self._bytes.seek(STATE.size)
        if self._kind is None:
            self.state[FORMAT] = MARSHAL
        else:
            self.state[FORMAT] = ord(NUMBERS[self._kind])
            self._array = self._arrays[self._kind]

    def keep(self, results: list[Any]) -> bool:
        """Write the last of the results, if it is like the others and there is room."""
        if not self._outlives:
            return False
        result = results[-1]
        try:
            if type(result) is self._kind:
                self._array[len(results) - 1] = result
                return True
            if self._kind is None:
                self._bytes.write(marshal.dumps(result, QUICK))
                return True
        except (ValueError, IndexError):  # the page is full, or the number too large
            pass
        self._kind = None
        return False

    def types_of(self, results: list[Any]) -> set[type]:
        """Return what types the results are of; the next page is for numbers if these are."""
        if self._kind is not None:
            return {self._kind, type(results[-1])}  # the last one was not kept
        types = set(map(type, results))
        if types == {float} or (types == {int} and max(map(abs, results)) < 2**63):
            [self._kind] = types
        return types


def _receive_memory(pipe: socket.socket) -> int | None:
    if not hasattr(socket, "recv_fds"):
        pipe.recv(1)
        return None
    _, memories, *_ = socket.recv_fds(pipe, 1, 1)
    return memories[0] if memories else None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


UNREADABLE = "the call cannot be unpickled"


class _TravelError(Exception):
    """What was to travel could not; its cause tells why."""


def _open(item: bytes | str) -> Any:
    if isinstance(item, str):
        raise TypeError(item)  # the parent could not pickle it
    try:
        return pickle.loads(item)  # noqa: S301 -- comes from our own process
    except BaseException as error:
        raise _TravelError(UNREADABLE) from error


def _pickle_result(fn: Callable[..., Any], result: object) -> bytes:
    try:
        return dump(result)
    except BaseException as error:
        raise _TravelError(f"the result of {name_of(fn)} cannot be pickled") from error


def _describe(error: BaseException, what: str = "") -> bytes:
    """Describe an exception in a form that always arrives."""
    if isinstance(error, _TravelError) and error.__cause__ is not None:
        error, what = error.__cause__, str(error)
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # without our own frame
    text = "".join(traceback.format_exception(error))
    pickled = b""
    if not what:
        with suppress(BaseException):  # pickling runs any code
            pickled = dump(error)
    return dump((f"{what}: {summary(error)}" if what else summary(error), text, pickled))
