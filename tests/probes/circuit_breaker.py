"""Circuit breaker: who is let through, and what counts.

Each is set to open after 3 failures, for 0.3 s, and to let one probe through where that can be set.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from concurrency_patterns import CircuitBreaker
from probes.harness import (
    HOUR,
    OURS,
    Candidate,
    Finding,
    Probe,
    Service,
    Unavailable,
    raised_by,
    reaches,
    shim,
    start,
    stop,
    wall_clock,
    word,
)

FAILURES = 3
OPEN_FOR = 0.3
LONG = 60.0
IGNORED = "ignored"
# What the libraries call the states.
NAMES = {"working": "closed", "opened": "open", "failing": "open"}


@dataclass(frozen=True)
class Subject:
    """A circuit breaker.

    Attributes:
        call: Calls a function through it.
        read: Reads its state.
    """

    call: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
    read: Callable[[], str]

    @property
    def state(self) -> str:
        """``closed``, ``open``, or what it calls half-open."""
        name = self.read().lower()
        return NAMES.get(name, name)


# Makes a breaker that opens for so many seconds.
Maker = Callable[[float], Awaitable[Subject]]


async def ours(open_for: float) -> Subject:
    """Ours."""
    breaker = CircuitBreaker(failures=FAILURES, open_for=open_for, probes=1)
    return Subject(breaker.call, lambda: breaker.state.value)


async def nopanic(open_for: float) -> Subject:
    """nopanic: opens at a failure rate, so here when 3 calls of 3 have failed."""
    from nopanic import circuit_breaker

    breaker = circuit_breaker(
        failure_threshold=1.0, min_calls=FAILURES, reset_timeout=open_for, half_open_max_calls=1
    )
    return Subject(lambda fn: breaker(shim(fn))(), lambda: breaker.state)


async def interlock(open_for: float) -> Subject:
    """interlock: opens at a failure rate, so here when 3 calls of 3 have failed."""
    from interlock import CircuitBreaker as Other
    from interlock import Config

    config = Config(
        failure_rate_threshold=1.0,
        minimum_number_of_calls=FAILURES,
        wait_duration_in_open=open_for,
        permitted_calls_in_half_open=1,
    )
    breaker = Other(name="probe", config=config)
    return Subject(breaker.call_async, lambda: str(breaker.state.value))


async def redress(open_for: float) -> Subject:
    """redress: a policy with nothing but a breaker; every exception counts."""
    from redress import AsyncPolicy, ErrorClass
    from redress import CircuitBreaker as Other

    breaker = Other(
        failure_threshold=FAILURES, recovery_timeout_s=open_for, trip_on=set(ErrorClass)
    )
    return Subject(AsyncPolicy(circuit_breaker=breaker).call, lambda: breaker.state.value)


async def hyx(open_for: float) -> Subject:
    """hyx as a decorator."""
    from hyx.circuitbreaker import consecutive_breaker

    breaker = consecutive_breaker(
        failure_threshold=FAILURES, recovery_time_secs=open_for, recovery_threshold=1
    )
    return Subject(lambda fn: breaker(shim(fn))(), lambda: breaker.state.name)


async def hyx_block(open_for: float) -> Subject:
    """hyx as a block."""
    from hyx.circuitbreaker import consecutive_breaker

    breaker = consecutive_breaker(
        failure_threshold=FAILURES, recovery_time_secs=open_for, recovery_threshold=1
    )

    async def call(fn: Callable[[], Awaitable[Any]]) -> Any:
        async with breaker:
            return await fn()

    return Subject(call, lambda: breaker.state.name)


async def circuitbreaker(open_for: float) -> Subject:
    """circuitbreaker as a decorator."""
    from circuitbreaker import CircuitBreaker as Other

    breaker = Other(failure_threshold=FAILURES, recovery_timeout=open_for)
    return Subject(lambda fn: breaker(shim(fn))(), lambda: breaker.state)


async def purgatory(open_for: float) -> Subject:
    """purgatory as a block."""
    from purgatory import AsyncCircuitBreakerFactory

    factory = AsyncCircuitBreakerFactory(default_threshold=FAILURES, default_ttl=open_for)

    async def call(fn: Callable[[], Awaitable[Any]]) -> Any:
        async with await factory.get_breaker("probe"):
            return await fn()

    breaker = await factory.get_breaker("probe")
    return Subject(call, lambda: breaker.context.state)


async def aiobreaker(open_for: float) -> Subject:
    """aiobreaker."""
    from aiobreaker import CircuitBreaker as Other

    breaker = Other(fail_max=FAILURES, timeout_duration=timedelta(seconds=open_for))
    return Subject(breaker.call_async, lambda: breaker.current_state.name)


async def pybreaker(open_for: float) -> Subject:
    """pybreaker, whose decorator takes an ``async def`` for a function that returns at once."""
    from pybreaker import CircuitBreaker as Other

    breaker = Other(fail_max=FAILURES, reset_timeout=open_for)
    service = Service(works=False)
    for _ in range(FAILURES):
        with contextlib.suppress(ConnectionError):
            await breaker(shim(service))()
    if breaker.current_state == "closed":
        raise Unavailable("does not guard async def")
    return Subject(lambda fn: breaker(shim(fn))(), lambda: breaker.current_state)


async def trip(breaker: Subject) -> None:
    """Open the circuit; what the call that opens it raises is another question."""
    for _ in range(FAILURES):
        with contextlib.suppress(Exception):
            await breaker.call(Service(works=False))
    if breaker.state != "open":
        raise AssertionError(f"it did not open: {breaker.state}")


async def half_open(make: Maker) -> Subject:
    """Make a breaker, open the circuit, and wait until it lets a probe through."""
    breaker = await make(OPEN_FOR)
    await trip(breaker)
    await asyncio.sleep(1.2 * OPEN_FOR)
    return breaker


async def crowd(make: Maker) -> Finding:
    """Send ten callers at once to a circuit that is half-open."""
    breaker, service = await half_open(make), Service(takes=0.1)
    await asyncio.gather(*(breaker.call(service) for _ in range(10)), return_exceptions=True)
    return Finding(str(service.called), service.called == 1)


async def cancelled_call(make: Maker) -> Finding:
    """Cancel calls while the circuit is closed."""
    breaker = await make(OPEN_FOR)
    await cancel(breaker, 10)
    if not await reaches(breaker.call):
        return word(IGNORED, "counts as a failure")
    breaker = await make(OPEN_FOR)
    for works in (False, False, None, False):
        if works is None:
            await cancel(breaker, 1)
        else:
            with contextlib.suppress(Exception):
                await breaker.call(Service(works=works))
    return word(IGNORED, "counts as a success" if await reaches(breaker.call) else IGNORED)


async def cancel(breaker: Subject, calls: int) -> None:
    """Begin calls and cancel them."""
    tasks = [start(hold(breaker, Service(takes=LONG))) for _ in range(calls)]
    await asyncio.sleep(0.01)
    await stop(*tasks)


async def hold(breaker: Subject, service: Callable[[], Awaitable[Any]]) -> Any:
    """Call, as a coroutine."""
    return await breaker.call(service)


async def cancelled_probe(make: Maker) -> Finding:
    """Cancel the probe; a failure after it tells where the circuit is."""
    breaker = await half_open(make)
    await cancel(breaker, 1)
    free = "its place is free again"
    if await reaches(breaker.call, Service(works=False)):
        closed = await reaches(breaker.call)
        return word(free, "closes the circuit" if closed else free)
    await asyncio.sleep(1.2 * OPEN_FOR)
    opened = await reaches(breaker.call)
    return word(free, "opens the circuit" if opened else "its place is lost")


class Late:
    """A call that begins while the circuit is closed and ends when it is told."""

    def __init__(self, *, works: bool) -> None:
        self._service = Service(works=works)
        self._gate = asyncio.Event()

    async def begin(self, breaker: Subject) -> None:
        """Call."""
        self._task = start(hold(breaker, self))
        await asyncio.sleep(0.01)

    async def __call__(self) -> str:
        """Wait to be told."""
        await self._gate.wait()
        return await self._service()

    async def end(self) -> None:
        """Let it end."""
        self._gate.set()
        await asyncio.gather(self._task, return_exceptions=True)


async def late_success_open(make: Maker) -> Finding:
    """Let a call of the closed era succeed after the circuit has opened."""
    breaker, late = await make(LONG), Late(works=True)
    await late.begin(breaker)
    await trip(breaker)
    await late.end()
    return word(IGNORED, "closes the circuit" if await reaches(breaker.call) else IGNORED)


async def late_in_half_open(make: Maker, *, works: bool) -> str:
    """Let a call of the closed era end while a probe is out, and read the state."""
    breaker, late, probe = await make(OPEN_FOR), Late(works=works), Late(works=True)
    await late.begin(breaker)
    await trip(breaker)
    await asyncio.sleep(1.2 * OPEN_FOR)
    await probe.begin(breaker)
    await late.end()
    state = breaker.state
    await probe.end()
    return state


async def late_failure_half_open(make: Maker) -> Finding:
    """It fails."""
    state = await late_in_half_open(make, works=False)
    return word(IGNORED, "opens the circuit" if state == "open" else IGNORED)


async def late_success_half_open(make: Maker) -> Finding:
    """It succeeds."""
    state = await late_in_half_open(make, works=True)
    return word(IGNORED, "closes the circuit" if state == "closed" else IGNORED)


async def hung_probe(make: Maker) -> Finding:
    """Send a probe that never ends, wait five times the open time, and send another caller."""
    breaker = await half_open(make)
    probe = start(hold(breaker, Service(takes=LONG)))
    await asyncio.sleep(5 * OPEN_FOR)
    admitted = await reaches(breaker.call)
    await stop(probe)
    return word("another is let through", "another is let through" if admitted else "nobody is")


async def traceback_depth(make: Maker) -> Finding:
    """Be refused 300 times, and look at the traceback of the first refusal and of the last."""
    breaker = await make(LONG)
    await trip(breaker)
    depths = []
    for _ in range(300):
        try:
            await breaker.call(Service())
        except Exception as error:  # noqa: BLE001 -- the refusal of any library
            depths.append(len(traceback.extract_tb(error.__traceback__)))
    return Finding(f"{depths[0]} → {depths[-1]}", depths[0] == depths[-1])


async def clock(make: Maker) -> Finding:
    """Set the wall clock an hour forward while it is open, and an hour back."""
    with wall_clock() as move:
        breaker = await make(LONG)
        await trip(breaker)
        move(HOUR)
        early = await reaches(breaker.call)
        move(0)
        breaker = await make(OPEN_FOR)
        await trip(breaker)
        move(-HOUR)
        await asyncio.sleep(1.2 * OPEN_FOR)
        late = not await reaches(breaker.call)
    return word("no matter", "closes early or stays open" if early or late else "no matter")


async def own_exception(make: Maker) -> Finding:
    """Look at what the call that opens the circuit raises."""
    breaker, service = await make(LONG), Service(works=False)
    for _ in range(FAILURES):
        seen = await raised_by(lambda: breaker.call(service), service)
    return word("the service's", seen)


CANDIDATES = [
    Candidate(OURS, ours, OURS),
    Candidate("aiobreaker", aiobreaker, "aiobreaker"),
    Candidate("circuitbreaker", circuitbreaker, "circuitbreaker"),
    Candidate("hyx", hyx, "hyx"),
    Candidate("hyx (async with)", hyx_block, "hyx"),
    Candidate("interlock-cb", interlock, "interlock-cb"),
    Candidate("nopanic", nopanic, "nopanic"),
    Candidate("purgatory", purgatory, "purgatory"),
    Candidate("pybreaker", pybreaker, "pybreaker"),
    Candidate("redress", redress, "redress"),
]
PROBES = [
    Probe(
        crowd,
        zh="半开时 10 个调用同时到达：有几个到了服务那里？",
        zh_rule="1 个，也就是设定的探测次数",
        en="Ten callers at once while half-open: how many reach the service?",
        en_rule="1, the number of probes",
    ),
    Probe(
        cancelled_call,
        zh="关闭时调用被取消：算什么？",
        zh_rule="不算失败也不算成功，放弃的是调用方",
        en="Calls are cancelled while closed: what do they count as?",
        en_rule="neither failure nor success; it was the caller who gave up",
    ),
    Probe(
        cancelled_probe,
        zh="探测被取消：然后呢？",
        zh_rule="名额让给下一个调用，熔断器仍是半开",
        en="The probe is cancelled: what then?",
        en_rule="its place goes to the next caller, and the circuit stays half-open",
    ),
    Probe(
        late_success_open,
        zh="关闭时开始的调用，打开之后才成功：有什么影响？",
        zh_rule="没有影响，它说的是从前的服务",
        en="A call that began while closed succeeds after the circuit has opened: what does it do?",
        en_rule="nothing; it tells of the service as it was",
    ),
    Probe(
        late_failure_half_open,
        zh="关闭时开始的调用，半开时才失败：有什么影响？",
        zh_rule="没有影响，它不是探测",
        en="A call that began while closed fails while half-open: what does it do?",
        en_rule="nothing; it is no probe",
    ),
    Probe(
        late_success_half_open,
        zh="关闭时开始的调用，半开时才成功：有什么影响？",
        zh_rule="没有影响，它不是探测",
        en="A call that began while closed succeeds while half-open: what does it do?",
        en_rule="nothing; it is no probe",
    ),
    Probe(
        hung_probe,
        zh="探测一直不结束，过了 5 倍的打开时间：还放行别的调用吗？",
        zh_rule="放行，否则它再也不会关闭",
        en="A probe never ends; after five times the open time, is anybody else let through?",
        en_rule="yes, or the circuit never closes again",
    ),
    Probe(
        traceback_depth,
        zh="拒绝 300 次：第一次和最后一次的回溯（traceback）各有几层？",
        zh_rule="一样多，否则内存会一直增长",
        en="300 refusals: how deep is the traceback of the first, and of the last?",
        en_rule="equally deep, or the memory grows",
    ),
    Probe(
        clock,
        zh="墙上时钟被拨快或拨慢一小时：打开时间变了吗？",
        zh_rule="没变，打开多久与墙上时钟无关",
        en="The wall clock is set an hour forward or back: does that change the open time?",
        en_rule="no; how long it is open has nothing to do with the time of day",
    ),
    Probe(
        own_exception,
        zh="使熔断器打开的那次调用，抛出的是谁的异常？",
        zh_rule="服务的，原来那一个",
        en="Whose exception does the call that opens the circuit raise?",
        en_rule="the service's own, the same instance",
    ),
]
