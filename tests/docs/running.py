"""Run a program of a page: here on the virtual clock, or as a script on the real one."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

from concurrency_patterns.testing import START, VirtualTimeLoop, virtual_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from programs import Program

LIMIT_HERE = 10.0  # seconds of computing: sleeping takes none
LIMIT_SCRIPT = 19.0
TRIES_ALONE = 2
# Handed over, not inherited: pytest changes it while scripts begin, and exec fails (EFAULT).
ENVIRONMENT = dict(os.environ)


class TookTooLong(KeyboardInterrupt):
    """The program did not end in time.

    A KeyboardInterrupt, because asyncio lets that through at once, whichever task it hits.
    """


@dataclass(frozen=True)
class Outcome:
    """What a program did."""

    printed: str
    error: str = ""
    simulated: float = 0.0
    stopped: bool = False

    @property
    def shown(self) -> str:
        """What an ``output`` block holds of it: whole lines."""
        return self.printed if self.printed.endswith("\n") else f"{self.printed}\n"


def run_here(program: Program, limit: float = LIMIT_HERE) -> Outcome:
    """Run a program in this process, in a fresh ``__main__``, on the virtual clock."""
    printed, complaints = io.StringIO(), io.StringIO()
    watch = Watch(limit)
    error = ""
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(complaints),
        warnings.catch_warnings(),
        fresh_logging(),
        fresh_main() as namespace,
        virtual_time(),
    ):
        warnings.simplefilter("error")
        try:
            code = compile(program.at_its_line, program.path, "exec", dont_inherit=True)
            with watch:
                exec(code, namespace)  # noqa: S102 -- running the page is what this is for
        except SystemExit as exit_:
            error = f"the program ends with exit status {exit_.code}" if exit_.code else ""
        except BaseException as raised:  # noqa: BLE001 -- whatever it is, it is the page's
            error = trimmed(raised, program.path)
        namespace.clear()
        gc.collect()  # an exception in a finalizer, a coroutine never awaited: now, not later
    return Outcome(printed.getvalue(), error or told_on_stderr(complaints), watch.simulated)


def told_on_stderr(complaints: io.StringIO) -> str:
    """Return what a program wrote where the page does not show it."""
    text = complaints.getvalue()
    return f"stderr, which the page does not show:\n{text}" if text else ""


def trimmed(error: BaseException, path: str) -> str:
    """Format a traceback with the frames of the page alone."""
    told = traceback.TracebackException.from_exception(error)
    queue = [told]
    while queue:
        part = queue.pop()
        part.stack[:] = [frame for frame in part.stack if frame.filename == path]
        queue += [cause for cause in (part.__cause__, part.__context__) if cause]
        queue += part.exceptions or []
    return "".join(told.format())


class Watch:
    """Adds up the seconds that the virtual clocks simulate, and ends what computes for too long.

    A loop that goes on for ever is ended between two of its steps, where nothing is half done.
    Only what stays inside of one step is interrupted wherever it is.
    """

    def __init__(self, limit: float) -> None:
        self.simulated = 0.0
        self.limit = limit
        self.alarms = 0
        self.stepped = False

    def __enter__(self) -> Self:
        step, close = VirtualTimeLoop.begin_step, VirtualTimeLoop.close

        def watched_step(loop: VirtualTimeLoop) -> bool:
            self.stepped = True
            if self.alarms:
                raise self.too_long()
            return step(loop)

        def watched_close(loop: VirtualTimeLoop) -> None:
            if not loop.is_closed():
                self.simulated += loop.now - START
            close(loop)

        self._patch = mock.patch.multiple(
            VirtualTimeLoop, begin_step=watched_step, close=watched_close
        )
        self._patch.start()
        self._handler = signal.signal(signal.SIGALRM, self.alarm)
        self._timer = signal.setitimer(signal.ITIMER_REAL, self.limit, 0.1)
        return self

    def alarm(self, *_: object) -> None:
        """Interrupt the program if its loop has made no step since the last alarm."""
        self.alarms += 1
        stands_still, self.stepped = not self.stepped, False
        if self.alarms > 1 and stands_still:
            raise self.too_long()

    def too_long(self) -> TookTooLong:
        """Return what ends the program."""
        return TookTooLong(f"stopped after {self.limit:g} s of computing: it does not end")

    def __exit__(self, *_: object) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # even if an alarm came just then
            signal.signal(signal.SIGALRM, self._handler)
            signal.setitimer(signal.ITIMER_REAL, *self._timer)  # pytest-timeout's
            self._patch.stop()


@contextlib.contextmanager
def fresh_main() -> Iterator[dict[str, Any]]:
    """Put an empty module in the place of ``__main__``: dataclasses and pickle look there."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    with mock.patch.object(sys, "unraisablehook", sys.__unraisablehook__):  # pytest has its own
        try:
            yield vars(sys.modules["__main__"])
        finally:
            sys.modules["__main__"] = before


@contextlib.contextmanager
def fresh_logging() -> Iterator[None]:
    """Give the program a logging that nobody has configured, and undo what it configures."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    loggers = [logger for logger in known if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = []
    logging.root.setLevel(logging.WARNING)
    try:
        with mock.patch.dict(logging.root.manager.loggerDict):
            yield
    finally:
        for logger, level, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def run_script(program: Program, limit: float = LIMIT_SCRIPT) -> Outcome:
    """Run a program as its reader would: as a file, in a fresh interpreter, on the real clock.

    The interpreter is isolated, in an empty folder: only what is installed can be imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "program.py")
        script.write_text(program.at_its_line, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-W", "error", str(script)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            printed, complaints = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            told = f"stopped after {limit:g} s: it does not end"
            return Outcome(printed, told, stopped=True)
        finally:
            with contextlib.suppress(ProcessLookupError):  # children that it left behind
                os.killpg(process.pid, signal.SIGKILL)
        complaints = trimmed_text(complaints.replace(str(script), program.path), program.path)
    if process.returncode:
        return Outcome(printed, complaints or f"exit status {process.returncode}")
    return Outcome(printed, told_on_stderr(io.StringIO(complaints)))


def trimmed_text(told: str, path: str) -> str:
    """Drop the frames that are not the page's from a printed traceback."""
    frame = rf'^  File "(?!{re.escape(path)}")[^"]*", line .*\n(?:    .*\n)*'
    return re.sub(frame, "", told, flags=re.MULTILINE)


class Scripts:
    """Run scripts ahead, several at a time: they mostly sleep."""

    def __init__(self, workers: int) -> None:
        self.again = 0
        self._workers = workers
        self._free = threading.Semaphore(workers)
        self._entrance = threading.Lock()  # kept shut while one runs alone
        self._pool = ThreadPoolExecutor(workers)
        self._started: dict[Program, Future[Outcome]] = {}

    def start(self, programs: Iterable[Program]) -> None:
        """Begin with these, in their order."""
        for program in programs:
            self._started[program] = self._pool.submit(self._run_among_others, program)

    def outcome(self, program: Program) -> Outcome:
        """Wait for a program; what fails beside others, on a busy machine, is tried again alone."""
        outcome = self._started[program].result()
        for _ in range(TRIES_ALONE):
            if outcome.stopped or (not outcome.error and outcome.shown == program.expected):
                break
            self.again += 1
            outcome = self._run_alone(program)
        return outcome

    def stop(self) -> None:
        """Start no more."""
        self._pool.shutdown(cancel_futures=True)

    def _run_among_others(self, program: Program) -> Outcome:
        with self._entrance:
            self._free.acquire()
        try:
            return run_script(program)
        finally:
            self._free.release()

    def _run_alone(self, program: Program) -> Outcome:
        with self._entrance, contextlib.ExitStack() as whole:
            for _ in range(self._workers):
                whole.enter_context(self._free)
            return run_script(program)
