"""Measure candidates in turn, and compare them within each turn.

A machine is faster at one moment and slower at the next. So the candidates take turns (A B C,
A B C, ...), and each is divided by the baseline of its own round. What is reported is the median
of these ratios, with their quartiles.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import statistics
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from time import process_time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import TypeAlias

    # Does so many operations, and returns how many seconds they took.
    Measure: TypeAlias = Callable[[int], float]
    # Makes one, with all that it needs; asynchronous if that needs a running event loop.
    Maker: TypeAlias = Callable[[], Measure | Awaitable[Measure]]

OURS = "concurrency-patterns"
STANDARD_LIBRARY = ""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        name: The name in its library's API.
        make: Makes the measure.
        package: The package on which it depends.
        at_most: The target, if there is one: the ratio to the baseline.
        at_least: The lower end of the target.
    """

    name: str
    make: Maker
    package: str = STANDARD_LIBRARY
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Case:
    """One kind of work, done by several candidates; the first one is the baseline.

    Attributes:
        key: Its name within its module.
        zh: What is measured, in Chinese.
        en: What is measured, in English.
        candidates: Those who do it.
        unit: "cpu" or "wall" (seconds an operation), or "share" (no time, but a part of 1).
        least: The fewest operations in one round.
        most: The most.
        quick: How many operations a quick run does.
        slice: The seconds that one round of one candidate should take.
    """

    key: str
    zh: str
    en: str
    candidates: Sequence[Candidate]
    unit: str = "cpu"
    least: int = 96
    most: int = 1_000_000
    quick: int = 96
    slice: float = 0.02


class Unavailable(Exception):  # noqa: N818 -- says what it is, as NotImplemented does
    """This candidate cannot do this work; the message says why."""


@dataclass
class _Run:
    candidate: Candidate
    measure: Measure | None = None
    number: int = 0
    failed: str = ""
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def run_case(case: Case, rounds: int, *, quick: bool = False) -> dict[str, Any]:
    """Measure all candidates of a case, or only ours and those of the standard library."""
    gc.collect()
    gc.freeze()  # what earlier cases left behind must not make our collections slow
    chosen = [c for c in case.candidates if not quick or c.package in {OURS, STANDARD_LIBRARY}]
    runs = [_prepare(candidate, case, quick=quick) for candidate in chosen]
    for _ in range(rounds):
        for run in runs:
            _measure(run, case.unit)
        for run in runs:
            if not run.failed:
                run.ratios.append(run.values[-1] / runs[0].values[-1])
    return {
        "key": case.key,
        "zh": case.zh,
        "en": case.en,
        "unit": case.unit,
        "rounds": rounds,
        "candidates": [_report(run) for run in runs],
    }


def _prepare(candidate: Candidate, case: Case, *, quick: bool) -> _Run:
    run = _Run(candidate)
    try:
        made = candidate.make()
        run.measure = on_loop(made) if inspect.isawaitable(made) else made
        run.number = case.quick if quick else _calibrate(run.measure, case)
    except Exception as error:  # noqa: BLE001 -- one that fails must not end the others
        _fail(run, error)
    return run


def _calibrate(measure: Measure, case: Case) -> int:
    number = case.least
    if number == case.most:
        return number
    measure(number)  # warm
    while number < case.most and measure(number) < case.slice:
        number = min(2 * number, case.most)
    return number


def _measure(run: _Run, unit: str) -> None:
    if run.failed or run.measure is None:
        return
    gc.collect()
    gc.disable()
    try:
        value = run.measure(run.number)
        run.values.append(value if unit == "share" else value / run.number)
    except Exception as error:  # noqa: BLE001 -- one that fails must not end the others
        _fail(run, error)
    finally:
        gc.enable()


def _fail(run: _Run, error: Exception) -> None:
    if run.candidate.package in {OURS, STANDARD_LIBRARY} and not isinstance(error, Unavailable):
        raise error
    text = str(error).partition("\n")[0]
    if isinstance(error, Unavailable):
        run.failed = text
    elif isinstance(error, ImportError):
        run.failed = "not installed"
    else:  # a message may hold a path
        run.failed = type(error).__name__ if "/" in text else f"{type(error).__name__}: {text}"


def _report(run: _Run) -> dict[str, Any]:
    candidate = run.candidate
    report: dict[str, Any] = {"name": candidate.name}
    if candidate.package:
        report["package"] = candidate.package
    targets = {"at_least": candidate.at_least, "at_most": candidate.at_most}
    report |= {name: limit for name, limit in targets.items() if limit is not None}
    if run.failed:
        return {**report, "failed": run.failed}
    facts = getattr(run.measure, "facts", None)
    if facts:
        report["facts"] = facts
    low, middle, high = _quartiles(run.ratios)
    report["ratio"] = {"median": middle, "q1": low, "q3": high}
    report["value"] = _short(statistics.median(run.values))
    return report


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        values = values * 2
    return [_short(value) for value in statistics.quantiles(values, n=4, method="inclusive")]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def packages(cases: Sequence[Case]) -> dict[str, str]:
    """Return the versions of the packages that are measured, "" if one is not installed."""
    names = {candidate.package for case in cases for candidate in case.candidates}
    found = {}
    for name in sorted(names - {OURS, STANDARD_LIBRARY}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


# The helpers that make measures. All that is asynchronous runs on one event loop, since some
# objects serve only one.

_runner: asyncio.Runner | None = None


def on_loop(work: Awaitable[Any]) -> Any:
    """Await something on the event loop of the benchmarks."""
    global _runner  # noqa: PLW0603 -- one loop for all
    if _runner is None:
        _runner = asyncio.Runner()

    async def bounded() -> Any:
        async with asyncio.timeout(60):  # one that hangs is one that fails
            return await work

    return _runner.run(bounded())


def close_loop() -> None:
    """Close the event loop, and let go of what it has left; the next measure begins another one."""
    global _runner  # noqa: PLW0603 -- one loop for all
    if _runner is not None:
        _runner.close()
        _runner = None
    gc.unfreeze()


def timed(work: Callable[[int], Awaitable[float]]) -> Measure:
    """Measure by a coroutine function that returns the seconds."""
    return lambda number: on_loop(work(number))


def cpu(work: Callable[[int], Awaitable[object]]) -> Measure:
    """Measure the CPU time of a coroutine function that does so many operations."""

    async def run(number: int) -> float:
        start = process_time()
        await work(number)
        return process_time() - start

    return timed(run)


def awaits(operation: Callable[[], Awaitable[object]]) -> Measure:
    """Measure the CPU time of awaiting something again and again."""

    async def work(number: int) -> None:
        for _ in range(number):
            await operation()

    return cpu(work)


def calls(operation: Callable[[], object]) -> Measure:
    """Measure the CPU time of a plain call, without any event loop."""

    def run(number: int) -> float:
        start = process_time()
        for _ in range(number):
            operation()
        return process_time() - start

    return run


def blocks(block: Callable[[], AbstractAsyncContextManager[object]]) -> Measure:
    """Measure the CPU time of an empty ``async with``."""

    async def work(number: int) -> None:
        for _ in range(number):
            async with block():
                pass

    return cpu(work)


async def noop(item: object = None) -> object:
    """Do nothing; what most measures call."""
    return item


def plain_noop(item: object = None) -> object:
    """Do nothing, without being asynchronous."""
    return item


def generic(fn: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap an async function in a decorator that does nothing: the floor for all decorators."""

    @functools.wraps(fn)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await fn(*args, **kwargs)

    return wrapper
