"""Ask every library the same question, and write down what it did.

A probe is a small program with one question and one rule. Ours is asked on the virtual clock by
the tests, and beside its peers on the real clock by ``tox run -e probe``. There each answer comes
from a fresh process, so that no library sees what another one left behind, and what hangs can be
ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence

T = TypeVar("T")

OURS = "concurrency-patterns"
STANDARD_LIBRARY = ""
HANGS = "hangs"
LIMIT = 30.0  # seconds for one probe, which takes less than ten
HOUR = 3600.0


@dataclass(frozen=True)
class Finding:
    """What a library did.

    Attributes:
        observed: What was seen, in words of which the page has a translation, or a figure.
        right: Whether that is what the rule asks for; ``None`` if the library does not offer it.
    """

    observed: str
    right: bool | None


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        ask: Asks it, given what the candidate makes.
        zh: What is done, in Chinese.
        en: What is done, in English.
        zh_rule: What is right, in Chinese.
        en_rule: What is right, in English.
    """

    ask: Callable[[Any], Awaitable[Finding]]
    zh: str
    zh_rule: str
    en: str
    en_rule: str

    @property
    def key(self) -> str:
        """Its name within its table."""
        return self.ask.__name__


@dataclass(frozen=True)
class Candidate:
    """One library.

    Attributes:
        name: As the page calls it.
        make: What the probes are handed.
        package: The package that has to be installed.
    """

    name: str
    make: Any
    package: str


class Unavailable(Exception):  # noqa: N818 -- says what it is, as NotImplemented does
    """This library does not offer what the probe needs; the message says what is missing."""


async def observe(probe: Probe, candidate: Candidate) -> Finding:
    """Ask one candidate."""
    try:
        async with asyncio.timeout(LIMIT) as limit:
            return await probe.ask(candidate.make)
    except Unavailable as error:
        return Finding(str(error), None)
    except TimeoutError:
        if not limit.expired():
            raise
        return Finding(HANGS, False)


def ask_process(command: Sequence[str], limit: float = 2 * LIMIT) -> Finding:
    """Run a command that prints a finding; end it, with all that it started, when it hangs."""
    # Files, not pipes: a pipe is open as long as the workers that the command has left behind.
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            return Finding(HANGS, False)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        lines = out.read().splitlines()
        if not lines or child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command[1:])}\n{errors.read()}")
        return Finding(**json.loads(lines[-1]))


def python() -> str:
    """Name the Python that runs."""
    return ".".join(map(str, sys.version_info[:3]))


def packages(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Return the versions of the peers' packages, "" if one is not installed."""
    found = {}
    for name in sorted({candidate.package for candidate in candidates} - {OURS, STANDARD_LIBRARY}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


# What several tables need.


def word(right: str, seen: str) -> Finding:
    """Judge by a word."""
    return Finding(seen, seen == right)


def seconds(value: float, at_most: float) -> Finding:
    """Judge a time; it is told to the tenth, which is as good as the clock."""
    return Finding(f"{value:.1f} s", value <= at_most)


def count(value: int, at_most: int) -> Finding:
    """Judge a number."""
    return Finding(f"{value:,}", value <= at_most)


def most_in_a_second(times: Sequence[float]) -> int:
    """Return how many of these moments lie within one second, at most."""
    return max(sum(0 <= other - time < 1 for other in times) for time in times)


async def stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end; how they end is not the question."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Begin something that goes on beside."""
    return asyncio.get_running_loop().create_task(work)


class Service:
    """What is called: works or not, as it is told, and counts what reaches it."""

    def __init__(self, *, works: bool = True, takes: float = 0.0) -> None:
        self.works, self.takes = works, takes
        self.called = 0
        self.error: OSError = ConnectionError("down")

    async def __call__(self) -> str:
        """Answer or fail."""
        self.called += 1
        if self.takes:
            await asyncio.sleep(self.takes)
        if not self.works:
            raise self.error
        return "answer"


async def reaches(call: Callable[..., Awaitable[object]], service: Service | None = None) -> bool:
    """Tell whether a call gets through to the service."""
    service = service or Service()
    before = service.called
    try:
        await call(service)
    except (TypeError, AttributeError):  # no refusal, but a fault of the probe
        raise
    except Exception:  # noqa: BLE001, S110 -- the refusal of any library
        pass
    return service.called > before


async def raised_by(call: Callable[[], Awaitable[object]], service: Service) -> str:
    """Call, and tell whose exception is raised."""
    try:
        await call()
    except Exception as error:  # noqa: BLE001 -- whatever it is
        return "the service's" if error is service.error else type(error).__name__
    raise AssertionError("it raised nothing")


def shim(fn: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Make an ``async def`` of it, which is what a decorator looks for."""

    async def called() -> Any:
        return await fn()

    return called


@contextlib.contextmanager
def wall_clock() -> Iterator[Callable[[float], None]]:
    """Set the wall clock by so many seconds, for what is imported inside.

    That is the clock of the machine, which people and time servers set; it is no measure of how
    much time has passed.
    """
    offset = 0.0
    real, kind = time.time, datetime.datetime

    def move(seconds: float) -> None:
        nonlocal offset
        offset = seconds

    class Moved(kind):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Moved:
            return cls.fromtimestamp(real() + offset, tz)

        @classmethod
        def utcnow(cls) -> Moved:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    with (
        mock.patch("time.time", side_effect=lambda: real() + offset),
        mock.patch("datetime.datetime", Moved),
    ):
        yield move
