"""Events of all patterns, and the listeners for logging, Prometheus and OpenTelemetry."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import logging
import re
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from dataclasses import dataclass
from pathlib import Path

import prometheus_client
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from concurrency_patterns.channel import Channel
from concurrency_patterns.circuit_breaker import CircuitBreaker
from concurrency_patterns.compose import compose
from concurrency_patterns.concurrency_limiter import ConcurrencyLimiter
from concurrency_patterns.errors import (
    ConcurrencyLimitExceeded,
    DeadlineExceeded,
    QueueFull,
    RateLimitExceeded,
)
from concurrency_patterns.fallback import Fallback, Hedge, StaleCache, constant
from concurrency_patterns.observe import (
    BackgroundListener,
    Event,
    LoggingListener,
    Measured,
    OpenTelemetryListener,
    PrometheusListener,
    observe,
)
from concurrency_patterns.retry import Fixed, Retry
from concurrency_patterns.testing import explore_cancellation, run_virtual
from concurrency_patterns.timeout import Timeout
from concurrency_patterns.token_bucket import TokenBucket, TokenBuckets
from concurrency_patterns.worker_pool import WorkerPool

HOUSE = Path(__file__).parent.parent
PACKAGE = HOUSE / "src" / "concurrency_patterns"
DASHBOARD = HOUSE / "conf" / "static" / "grafana-dashboard.json"


class Source:
    """The smallest thing that can be observed."""

    on_event = None

    def tell(self, kind, **data):
        if self.on_event is not None:
            self.on_event(kind, data)


class Recorded(list):
    """A listener that keeps the kinds and the data, rounded."""

    def __call__(self, event):
        data = {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in event.data.items()
        }
        self.append((event.kind, data))


async def fail():
    """Fail at once."""
    raise ConnectionError


async def sleep_and_fail():
    """Fail after a second."""
    await asyncio.sleep(1)
    raise ConnectionError


# What each pattern tells


async def test_a_channel_tells_what_it_drops_and_when_it_closes():
    """The dropped item comes with the event; closing twice is told once."""
    channel, told = Channel(1, overflow="drop_oldest"), Recorded()
    observe("items", channel, told)
    for item in "ab":
        await channel.send(item)
    channel.close()
    channel.close()

    assert told == [("channel.dropped", {"item": "a"}), ("channel.closed", {})]


async def test_a_channel_tells_what_it_rejects():
    """A send into a full channel that does not wait is told."""
    channel, told = Channel(1), Recorded()
    observe("items", channel, told)
    channel.send_nowait("a")
    with pytest.raises(QueueFull):
        channel.send_nowait("b")

    assert told == [("channel.rejected", {})]


async def test_the_listener_of_a_channel_sees_the_new_item_in_the_place_of_the_dropped_one():
    """When a drop is told, the exchange is complete, and the listener may use the channel."""
    channel = Channel(1, overflow="drop_oldest")
    taken = []
    observe("items", channel, lambda event: taken.append(channel.receive_nowait()))
    channel.send_nowait("a")
    channel.send_nowait("b")
    statistics = channel.statistics()

    assert taken == ["b"]
    assert (statistics.buffered, statistics.sent, statistics.dropped) == (0, 1, 1)


async def test_a_pool_tells_the_wait_and_the_run_of_each_task_apart():
    """The second task waits for the only worker as long as the first one runs."""
    pool, told = WorkerPool(1), Recorded()
    observe("pool", pool, told)
    async with pool:
        first = await pool.submit(asyncio.sleep, 2)
        second = await pool.submit(sleep_and_fail)
        third = await pool.submit(asyncio.sleep, 5)
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(1)
        third.cancel()

    assert told == [
        ("worker_pool.task_ended", {"outcome": "ok", "seconds": 2, "waited": 0}),
        ("worker_pool.task_ended", {"outcome": "error", "seconds": 1, "waited": 2}),
        ("worker_pool.task_ended", {"outcome": "cancelled", "seconds": 1, "waited": 3}),
    ]


async def test_the_wait_of_a_pool_includes_the_limiter():
    """A task that waits for a token has not begun to run."""
    pool, told = WorkerPool(2, limiter=TokenBucket(rate=1, capacity=1)), Recorded()
    observe("pool", pool, told)
    async with pool:
        async for _ in pool.map(asyncio.sleep, [0.5, 0.5]):
            pass

    assert [(data["waited"], data["seconds"]) for _, data in told] == [(0, 0.5), (1, 0.5)]


async def test_a_pool_tells_the_tasks_that_were_cancelled_in_the_queue():
    """Withdrawn by its handle, by the end of a map or by the pool: each is told once."""
    pool, told = WorkerPool(1), Recorded()
    observe("pool", pool, told)
    async with pool:
        await pool.submit(asyncio.sleep, 1)
        (await pool.submit(asyncio.sleep, 1)).cancel()
        results = pool.map(asyncio.sleep, [0.5, 0.5])
        await anext(results)
        await results.aclose()
        await pool.submit(asyncio.sleep, 100)
        await pool.submit(asyncio.sleep, 100)
        await asyncio.sleep(1)
        await pool.close(grace=0)
    statistics = pool.statistics()

    assert [data["outcome"] for _, data in told].count("ok") == statistics.succeeded == 2
    assert [data["outcome"] for _, data in told].count("cancelled") == statistics.cancelled == 4


async def test_a_pool_tells_what_it_rejects():
    """A task for which the queue has no room is told."""
    pool, told = WorkerPool(1, queue_size=1), Recorded()
    observe("pool", pool, told)
    async with pool:
        pool.submit_nowait(asyncio.sleep, 1)
        with pytest.raises(QueueFull):
            pool.submit_nowait(asyncio.sleep, 1)

    assert told[0] == ("worker_pool.rejected", {})


async def test_a_task_that_was_submitted_before_anybody_listened_is_not_told():
    """Nobody has looked at the clock when it was submitted."""
    pool, told = WorkerPool(1), Recorded()
    async with pool:
        await pool.submit(asyncio.sleep, 1)
        observe("pool", pool, told)

    assert told == []


async def test_a_token_bucket_tells_waits_and_rejections():
    """A call that is served at once is no event; the others are."""
    bucket, told = TokenBucket(rate=1, capacity=1), Recorded()
    observe("bucket", bucket, told)
    await bucket.acquire()
    await bucket.acquire()
    with pytest.raises(RateLimitExceeded):
        await bucket.acquire(timeout=0.5)
    bucket.try_acquire()

    assert told == [
        ("token_bucket.waited", {"seconds": 1, "n": 1}),
        ("token_bucket.rejected", {"retry_after": 1, "n": 1}),
        ("token_bucket.rejected", {"retry_after": 1, "n": 1}),
    ]


async def test_several_buckets_tell_what_was_asked_of_each():
    """The events of a common line carry the costs by name."""
    buckets, told = TokenBuckets(calls=TokenBucket(1, 1)), Recorded()
    observe("buckets", buckets, told)
    await buckets.acquire({"calls": 1})
    await buckets.acquire({"calls": 1})

    assert told == [("token_bucket.waited", {"seconds": 1, "n": {"calls": 1}})]


async def test_a_limiter_tells_waits_and_the_reason_of_each_rejection():
    """Line full, wait too long, limiter closed: each is told, with the slots in order."""
    limiter, told = ConcurrencyLimiter(1, max_queue=1, max_wait=2), Recorded()
    observe("limiter", limiter, told)

    async def use(seconds):
        async with limiter:
            await asyncio.sleep(seconds)

    async with asyncio.TaskGroup() as group:
        group.create_task(use(1))
        group.create_task(use(3))
        await asyncio.sleep(0)
        with pytest.raises(ConcurrencyLimitExceeded):
            await limiter.acquire()
        await asyncio.sleep(1.5)
        with pytest.raises(ConcurrencyLimitExceeded):
            await limiter.acquire()
        limiter.close()
        with pytest.raises(ConcurrencyLimitExceeded):
            await limiter.acquire()

    assert [data.get("reason", kind) for kind, data in told] == [
        "queue",
        "concurrency_limiter.waited",
        "wait",
        "closed",
    ]
    assert told[1][1] == {"seconds": 1, "weight": 1}


async def test_a_timeout_tells_which_calls_it_cut_short():
    """The event carries the time that the call was given."""
    timeout, told = Timeout(0.5), Recorded()
    observe("timeout", timeout, told)
    await timeout.call(asyncio.sleep, 0.1)
    with pytest.raises(DeadlineExceeded):
        await timeout.call(asyncio.sleep, 60)

    assert told == [("timeout.timed_out", {"seconds": 0.5})]


async def test_a_retry_tells_failures_recovery_and_why_it_gave_up():
    """Each attempt that is followed by another one is told, and the end of the call."""
    retry, told = Retry(on=ConnectionError, attempts=2, backoff=Fixed(0.1)), Recorded()
    observe("retry", retry, told)
    errors = [ConnectionError("1"), None, ConnectionError("2"), ConnectionError("3"), KeyError()]

    async def flaky():
        error = errors.pop(0)
        if error is not None:
            raise error

    one, _, two, three, _ = list(errors)
    for _ in range(3):
        await asyncio.gather(retry.call(flaky), return_exceptions=True)

    assert told == [
        ("retry.attempt_failed", {"number": 1, "error": one, "delay": 0.1}),
        ("retry.recovered", {"attempts": 2}),
        ("retry.attempt_failed", {"number": 1, "error": two, "delay": 0.1}),
        ("retry.gave_up", {"attempts": 2, "reason": "attempts", "error": three}),
    ]


async def test_a_retry_tells_that_it_gave_up_on_a_bad_result():
    """A result is no exception: the event carries none."""
    retry = Retry(on=OSError, attempts=2, backoff=Fixed(0), on_result=lambda result: True)
    told = Recorded()
    observe("retry", retry, told)
    await retry.call(asyncio.sleep, 0)

    assert told[-1] == ("retry.gave_up", {"attempts": 2, "reason": "attempts", "error": None})


async def test_measured_tells_how_each_call_ended():
    """A result, an error, a refusal inside and a cancellation are four outcomes."""
    measured, told = Measured(), Recorded()
    observe("service", measured, told)

    async def refuse():
        raise QueueFull

    await measured.call(asyncio.sleep, 1)
    for fn in (sleep_and_fail, refuse):
        await asyncio.gather(measured.call(fn), return_exceptions=True)
    task = asyncio.create_task(measured(asyncio.sleep)(60))
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait([task])

    outcomes = [(data["outcome"], data["seconds"]) for _, data in told]
    assert outcomes == [("ok", 1), ("error", 1), ("rejected", 0), ("cancelled", 0.5)]
    statistics = measured.statistics()
    assert (statistics.ok, statistics.error, statistics.rejected) == (1, 1, 1)
    assert statistics.seconds == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("errors", "outcome"),
    [
        ([QueueFull(), ExceptionGroup("", [QueueFull()])], "rejected"),
        ([asyncio.CancelledError()], "cancelled"),
        ([asyncio.CancelledError(), QueueFull()], "rejected"),
        ([asyncio.CancelledError(), QueueFull(), KeyError()], "error"),
    ],
)
async def test_measured_looks_into_groups(errors, outcome):
    """A group of refusals or cancellations is no error; one error in it is."""
    measured, told = Measured(), Recorded()
    observe("service", measured, told)

    async def fail_together():
        raise BaseExceptionGroup("", errors)

    with pytest.raises(BaseExceptionGroup):
        await measured.call(fail_together)

    assert told[0][1]["outcome"] == outcome


def test_no_cancellation_is_lost_or_counted_as_something_else():
    """T2: at whichever step a measured call is cancelled, each call has had one outcome."""
    made = []

    def setup():
        made.clear()
        return Measured()

    async def call(measured, fn):
        made.append(1)
        await measured.call(fn, 1)

    async def scenario(measured):
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(call(measured, asyncio.sleep))

    def all_have_ended(measured):
        ended = measured.statistics()
        return (ended.ok + ended.cancelled, ended.error, ended.rejected) == (len(made), 0, 0)

    assert explore_cancellation(setup, scenario, all_have_ended) > 5


async def test_measured_outside_and_inside_tells_waiting_and_running_apart():
    """The difference of two measurements is the wait in between."""
    outside, inside, told = Measured(), Measured(), []
    pipeline = compose(outside, ConcurrencyLimiter(1), inside)
    observe("service", pipeline, told.append)
    await asyncio.gather(*(pipeline.call(asyncio.sleep, 1) for _ in range(2)))
    seconds = {}
    for event in told:
        if event.kind == "observe.call_ended":
            seconds.setdefault(event.name, []).append(round(event.data["seconds"], 6))

    assert seconds == {"service": [1, 2], "service#2": [1, 1]}


def test_only_an_async_function_is_measured():
    """Decorating a plain function is refused."""
    with pytest.raises(TypeError, match=r"^fn must be an async function"):
        Measured()(len)


def kinds_in(module, families):
    """Return the kinds of events that a module names, such as ``"retry.gave_up"``."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {text for text in texts if re.fullmatch(rf"({'|'.join(families)})\.\w+", str(text))}


def kinds_on(page):
    """Return the kinds in the table of a page, in which those of one module share a row."""
    kinds = set()
    for row in re.findall(r"^\| (`\w+\.\w+`.*?) \|", page.read_text("utf-8"), re.MULTILINE):
        module = None
        for words in re.findall(r"`([\w.]+)`", row):
            first, _, what = words.rpartition(".")
            module = first or module
            kinds.add(f"{module}.{what}")
    return kinds


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_page_names_all_kinds_of_events(language):
    """The table of the page has the kinds that the modules tell, and no others."""
    modules = [path.stem for path in PACKAGE.glob("*.py")]
    told = set().union(*(kinds_in(module, [*modules, "hedge"]) for module in modules))

    assert len(told) > 20
    assert kinds_on(HOUSE / "docs" / language / "observability.md") == told


async def test_without_a_listener_nobody_is_notified(monkeypatch):
    """A call that succeeds prepares no event, nor does one that is degraded."""

    def refuse(listener, kind, /, **data):
        raise AssertionError(kind)

    for name, module in list(sys.modules.items()):
        if name.startswith("concurrency_patterns.") and hasattr(module, "notify"):
            monkeypatch.setattr(module, "notify", refuse)
    policies = [
        Measured(),
        Retry(on=OSError),
        Timeout(60),
        CircuitBreaker(),
        ConcurrencyLimiter(1),
        TokenBucket(1, 1),
        Hedge(delay=0.5),
        StaleCache(0, 60),
        Fallback(constant(None)),
    ]
    for policy in policies:
        await policy.call(asyncio.sleep, 1)
    cache, fallback = policies[-2:]
    attempts = iter([None, ConnectionError(), ConnectionError()])

    async def fail_later():
        error = next(attempts)
        if error is not None:
            raise error

    for _ in range(2):
        await cache.call(fail_later)
    await fallback.call(fail_later)
    for policy in (StaleCache(1, 1), Fallback(fail)):
        with pytest.raises(ConnectionError):
            await policy.call(fail)


# Attaching and detaching


async def test_an_event_has_its_kind_its_name_its_time_and_its_data():
    """The time is the event loop's; the data cannot be changed by a listener."""
    source, told = Source(), []
    observe("a name", source, told.append)
    await asyncio.sleep(3)
    source.tell("source.happened", seconds=0.5)
    event = told[0]

    assert (event.kind, event.name) == ("source.happened", "a name")
    assert event.at == asyncio.get_running_loop().time()
    assert dict(event.data) == {"seconds": 0.5}
    with pytest.raises(TypeError):
        event.data["seconds"] = 1


def test_outside_of_a_loop_the_time_is_the_monotonic_clock():
    """A policy for plain functions has no event loop."""
    source, told = Source(), []
    observe("a name", source, told.append)
    before = time.monotonic()
    source.tell("source.happened")

    assert before <= told[0].at <= time.monotonic()


def test_a_detached_observation_leaves_nothing_behind():
    """After the last one the attribute is as it was before the first one."""
    source, told = Source(), Recorded()
    first = observe("one", source, told)
    with observe("two", source, told):
        source.tell("source.happened")
    first.detach()
    first.detach()
    source.tell("source.happened")

    assert told == [("source.happened", {})] * 2
    assert source.on_event is None


def test_a_listener_that_was_there_before_goes_on():
    """What somebody put into on_event is called during and after an observation."""
    source, before, told = Source(), [], Recorded()
    source.on_event = mine = lambda kind, data: before.append(kind)
    with observe("one", source, told):
        source.tell("source.happened")
    source.tell("source.happened")

    assert (len(before), len(told)) == (2, 1)
    assert source.on_event is mine


def test_each_policy_of_a_composition_is_observed():
    """The second of a class gets a number; what tells nothing is passed over."""

    class Foreign:
        async def call(self, fn):
            return await fn()

    told = []
    shared = Timeout(5)
    pipeline = compose(shared, Foreign(), Retry(on=TimeoutError), Timeout(1), shared)
    observe("service", pipeline, told.append)
    for policy in pipeline.policies[:4]:
        if not isinstance(policy, Foreign):
            policy.on_event("policy.happened", {})

    assert [event.name for event in told] == ["service", "service", "service#2"]


def test_what_cannot_be_observed_is_refused():
    """Each bad argument is named."""
    source = Source()

    class Asynchronous:
        async def __call__(self, event):
            """Would never be awaited."""

    with pytest.raises(TypeError, match=r"^policy must have on_event"):
        observe("name", object(), print)
    with pytest.raises(ValueError, match=r"^name must not be empty"):
        observe("", source, print)
    with pytest.raises(ValueError, match=r"^listeners must not be empty"):
        observe("name", source)
    with pytest.raises(TypeError, match=r"^name must be a str, got 5"):
        observe(5, source, print)
    for listener in (None, Asynchronous(), Asynchronous().__call__):
        with pytest.raises(TypeError, match=r"^a listener must be a plain function"):
            observe("name", source, listener)
    assert source.on_event is None


def test_an_observed_policy_is_not_kept_alive():
    """Who forgets the observation and the policy has forgotten both."""
    source, listener = Source(), PrometheusListener(prometheus_client.CollectorRegistry())
    observe("short", source, listener)
    gone = weakref.ref(source)
    del source
    gc.collect()

    assert gone() is None


async def test_t33_a_listener_that_raises_breaks_no_call(caplog):
    """T33: the call goes on, the other listeners are told, and the log has one line."""
    retry, told = Retry(on=ConnectionError, attempts=3, backoff=Fixed(0)), Recorded()

    def broken(event):
        raise RuntimeError

    observe("service", retry, broken, told)
    with pytest.raises(ConnectionError):
        await retry.call(fail)

    assert len(told) == 3
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError]


def test_t33_a_listener_that_ends_the_observation_is_called_no_more():
    """T33: unsubscribing while being called works, and holds for those behind, too."""
    source, told = Source(), []

    def once(event):
        told.append(event)
        observation.detach()

    observation = observe("one", source, once, told.append)
    other = observe("two", source, told.append)
    source.tell("source.happened")
    source.tell("source.happened")

    assert [event.name for event in told] == ["one", "two", "two"]
    other.detach()
    assert source.on_event is None


async def test_t33_a_listener_may_use_the_policy():
    """T33: nothing is locked and nothing half done while a listener is called."""
    limiter = ConcurrencyLimiter(2)
    seen = []

    def use(event):
        seen.append((limiter.statistics().in_use, limiter.try_acquire()))

    observe("limiter", limiter, use)
    await asyncio.gather(*(limiter.call(asyncio.sleep, seconds) for seconds in (1, 2, 3)))

    assert seen == [(2, False)]
    assert limiter.statistics().in_use == 0


def test_no_cancellation_loses_anything_while_a_listener_raises():
    """In whichever step a task is cancelled, no slot is lost and nobody left in line."""

    def broken(event):
        raise RuntimeError

    def setup():
        policies = ConcurrencyLimiter(2), TokenBucket(1, 1)
        for policy in policies:
            observe("x", policy, broken)
        return policies

    async def scenario(policies):
        limiter, bucket = policies
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(limiter.call(bucket.acquire))

    def everything_is_back(policies):
        limiter, bucket = (policy.statistics() for policy in policies)
        return (limiter.in_use, limiter.waiting, bucket.waiting) == (0, 0, 0)

    assert explore_cancellation(setup, scenario, everything_is_back) > 10


def test_t33_a_listener_that_blocks_holds_up_nobody_in_the_background():
    """T33: while the listener stands still, events are queued, then dropped, and no call waits."""
    go, entered, told = threading.Event(), threading.Event(), []

    def stuck(event):
        entered.set()
        go.wait(20)
        told.append(event.data["number"])

    begin = time.monotonic()
    with BackgroundListener(stuck, capacity=2) as background:
        source = Source()
        observe("source", source, background)
        source.tell("source.happened", number=0)
        assert entered.wait(20)
        for number in range(1, 10):
            source.tell("source.happened", number=number)
        assert background.dropped == 7
        assert not background.close(timeout=0.05)
        go.set()
        source.tell("source.happened", number=10)

    assert time.monotonic() - begin < 4
    assert told == [0, 1, 2]
    assert background.dropped == 8


def test_a_listener_that_raises_in_the_background_is_called_again(caplog):
    """The thread outlives an error of the listener."""
    told = []

    def broken(event):
        told.append(event)
        raise RuntimeError

    with BackgroundListener(broken) as background:
        background(Event("kind", "name", 0, {}))
        background(Event("kind", "name", 0, {}))

    assert len(told) == 2
    assert len(caplog.records) == 1


def test_one_observation_serves_three_event_loops():
    """Nothing is bound to a loop."""
    bucket, told = TokenBucket(rate=1, capacity=1), Recorded()
    observe("bucket", bucket, told)

    async def take_two():
        await bucket.acquire(1)
        await bucket.acquire(1)

    for _ in range(3):
        run_virtual(take_two())

    assert len(told) >= 3


# Logging


@pytest.fixture
def log(caplog):
    """Return the lines that are logged, with their levels."""
    caplog.set_level(logging.DEBUG, "concurrency_patterns")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "concurrency_patterns"
    ]


def test_an_event_becomes_a_line_with_its_level(log, caplog):
    """Trouble warns, routine debugs, the rest informs, and levels can be set."""
    listen = LoggingListener(levels={"retry.recovered": logging.CRITICAL})
    data = {"reason": "queue", "seconds": 0.12345, "error": KeyError("x"), "item": "y" * 99}
    listen(Event("limiter.rejected", "db", 0, {"reason": "queue"}))
    listen(Event("retry.gave_up", "db", 0, {}))
    listen(Event("limiter.waited", "db", 0, data))
    listen(Event("circuit_breaker.closed", "db", 0, {}))
    listen(Event("retry.recovered", "db", 0, {}))

    waited = f"reason=queue seconds=0.123 error=KeyError('x') item={'y' * 99}"
    assert log() == [
        ("WARNING", "db: limiter.rejected reason=queue"),
        ("WARNING", "db: retry.gave_up"),
        ("DEBUG", f"db: limiter.waited {waited}"),
        ("INFO", "db: circuit_breaker.closed"),
        ("CRITICAL", "db: retry.recovered"),
    ]
    assert caplog.records[0].event.data == {"reason": "queue"}


async def test_a_storm_is_held_back_and_its_size_is_told(log):
    """Ten lines a second, then one that tells how many there would have been."""
    source = Source()
    observe("db", source, LoggingListener(max_per_second=2))
    for _ in range(1000):
        source.tell("limiter.rejected")
    source.tell("circuit_breaker.opened")
    await asyncio.sleep(1.5)

    assert log() == [
        ("WARNING", "db: limiter.rejected"),
        ("WARNING", "db: limiter.rejected"),
        ("WARNING", "db: circuit_breaker.opened"),
        ("WARNING", "db: limiter.rejected: 998 more held back"),
    ]


def test_without_a_loop_the_next_line_or_the_end_tells_what_was_held_back(log):
    """No timer can tell it there."""
    source = Source()
    listener = LoggingListener(max_per_second=1)
    for at in (0, 0.1, 0.2, 1.1, 1.2):
        listener(Event("limiter.rejected", "db", at, {}))
    with observe("other", source, listener):
        pass
    listener.flush()

    assert [line for _, line in log()] == [
        "db: limiter.rejected",
        "db: limiter.rejected: 2 more held back",
        "db: limiter.rejected",
        "db: limiter.rejected: 1 more held back",
    ]


def test_at_the_end_of_the_program_the_rest_is_told():
    """A storm in the last second is not forgotten."""
    program = (
        "import logging, sys\n"
        "from concurrency_patterns.observe import Event, LoggingListener\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "listener = LoggingListener(max_per_second=1)\n"
        "for _ in range(9):\n"
        "    listener(Event('limiter.rejected', 'db', 0, {}))\n"
    )
    lines = subprocess.check_output([sys.executable, "-c", program], text=True).splitlines()

    assert lines == [
        "db: limiter.rejected",
        "db: limiter.rejected: 8 more held back",
    ]


def test_a_level_that_is_off_costs_no_line_of_the_limit(caplog):
    """What is not logged is not counted as held back."""
    caplog.set_level(logging.WARNING)
    listener = LoggingListener(max_per_second=1)
    for _ in range(5):
        listener(Event("limiter.waited", "db", 0, {"seconds": 1}))
    listener.flush()

    assert caplog.records == []


@pytest.mark.parametrize("most", [0, -1])
def test_a_log_without_lines_is_refused(most):
    """At least one line a second."""
    with pytest.raises(ValueError, match=r"^max_per_second must be at least 1"):
        LoggingListener(max_per_second=most)


# Prometheus


async def use_everything(listener):
    """Let each kind of metric happen, on two services."""
    limiter = ConcurrencyLimiter(1, max_queue=1)
    breaker = CircuitBreaker(failures=2, open_for=5)
    retry = Retry(on=ConnectionError, attempts=2, backoff=Fixed(0.1))
    observe("payments", compose(retry, breaker), listener)
    observe("db", limiter, listener)
    pool = WorkerPool(2)
    observe("jobs", pool, listener)
    with pytest.raises(ConnectionError):
        await compose(retry, breaker).call(fail)
    calls = (limiter.call(asyncio.sleep, 1) for _ in range(3))
    await asyncio.gather(*calls, return_exceptions=True)
    async with pool:
        await pool.submit(asyncio.sleep, 0.5)
    return limiter, breaker, retry, pool


EXPECTED = {
    'concurrency_patterns_events_total{kind="retry.attempt_failed",name="payments"}': 1,
    'concurrency_patterns_events_total{kind="worker_pool.task_ended",name="jobs"}': 1,
    'concurrency_patterns_wait_seconds_sum{name="db",policy="concurrency_limiter"}': 1,
    'concurrency_patterns_wait_seconds_count{name="jobs",policy="worker_pool"}': 1,
    'concurrency_patterns_run_seconds_sum{name="jobs",outcome="ok",policy="worker_pool"}': 0.5,
    'concurrency_patterns_refusals_total{name="db",policy="concurrency_limiter",reason="queue"}': 1,
    'concurrency_patterns_refusals_total{name="payments",policy="retry",reason="attempts"}': 1,
    'concurrency_patterns_in_use{name="db",policy="concurrency_limiter"}': 1,
    'concurrency_patterns_waiting{name="db",policy="concurrency_limiter"}': 0,
    'concurrency_patterns_limit{name="db",policy="concurrency_limiter"}': 1,
}


def scrape(port):
    """Read a metrics endpoint as Prometheus does."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        lines = response.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_a_real_scrape_of_a_real_endpoint_has_all_metrics():
    """What Prometheus would read over HTTP is what has happened."""
    registry = prometheus_client.CollectorRegistry()
    listener = PrometheusListener(registry)
    limiter, breaker, *others = run_virtual(use_everything(listener))

    async def hold():
        await limiter.acquire()
        return scrape(server.server_port)

    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    try:
        found = asyncio.run(hold())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

    assert {key: float(found[key]) for key in EXPECTED} == pytest.approx(EXPECTED)
    assert others
    assert breaker.statistics().failed == 2


def circuit_state(registry, name="payments"):
    """Return the metric of the circuits of this name."""
    return registry.get_sample_value("concurrency_patterns_circuit_state", {"name": name})


async def test_the_state_of_a_circuit_is_a_number():
    """Closed from the beginning, then what it is at the moment of the scrape."""
    registry = prometheus_client.CollectorRegistry()
    breaker = CircuitBreaker(failures=1, open_for=5, probes=1)
    states = []

    def read(event=None):
        states.append(circuit_state(registry))

    observe("payments", breaker, PrometheusListener(registry), read)
    read()
    await asyncio.gather(breaker.call(fail), return_exceptions=True)
    await asyncio.sleep(5)
    await breaker.call(asyncio.sleep, 0)

    assert states == [0, 2, 1, 0]


async def test_the_state_of_a_circuit_needs_no_event():
    """A circuit that was open before, and one whose open time is over, are shown as they are."""
    registry = prometheus_client.CollectorRegistry()
    breaker = CircuitBreaker(failures=1, open_for=5)
    await asyncio.gather(breaker.call(fail), return_exceptions=True)
    with observe("payments", breaker, PrometheusListener(registry)):
        assert circuit_state(registry) == 2
        await asyncio.sleep(5)
        assert circuit_state(registry) == 1

    assert circuit_state(registry) is None


async def test_of_several_circuits_of_one_name_the_worst_is_shown():
    """The recovery of one does not hide that another one is open."""
    registry = prometheus_client.CollectorRegistry()
    listener = PrometheusListener(registry)
    breakers = [CircuitBreaker(failures=1, open_for=open_for, probes=1) for open_for in (5, 60)]
    for breaker in breakers:
        observe("payments", breaker, listener)
    await asyncio.gather(*(each.call(fail) for each in breakers), return_exceptions=True)
    await asyncio.sleep(5)
    await breakers[0].call(asyncio.sleep, 0)

    assert circuit_state(registry) == 2


async def test_opentelemetry_reads_the_state_of_a_circuit_when_it_collects():
    """By time alone from open to half-open; what is no more observed is not there any more."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    breaker = CircuitBreaker(failures=1, open_for=5)
    await asyncio.gather(breaker.call(fail), return_exceptions=True)
    with observe("payments", breaker, OpenTelemetryListener(provider.get_meter("test"))):
        await asyncio.sleep(5)
        state = value_of(points(reader)["concurrency_patterns.circuit.state"], name="payments")
    later = reader.get_metrics_data()
    provider.shutdown()

    assert (state, later) == (1, None)


def test_what_is_gone_is_not_kept_in_the_metrics():
    """Breakers that come and go, as those of a registry with eviction, do not pile up."""
    listener = PrometheusListener(prometheus_client.CollectorRegistry())
    for _ in range(1000):
        observe("hosts", CircuitBreaker(), listener)
        gc.collect(0)

    assert len(listener._watched._policies) < 100


def test_levels_of_one_name_are_added_and_go_with_the_policy():
    """Two limiters of one service are one service; what is detached or gone is left out."""
    registry = prometheus_client.CollectorRegistry()
    listener = PrometheusListener(registry)
    labels = {"name": "db", "policy": "concurrency_limiter"}
    one, two = ConcurrencyLimiter(3), ConcurrencyLimiter(4)
    observe("db", one, listener)
    observation = observe("db", two, listener)

    assert registry.get_sample_value("concurrency_patterns_limit", labels) == 7
    observation.detach()
    assert registry.get_sample_value("concurrency_patterns_limit", labels) == 3
    del one
    gc.collect()
    assert registry.get_sample_value("concurrency_patterns_limit", labels) is None


def test_a_policy_of_somebody_else_does_not_break_a_scrape():
    """A field that is called as a level is left out if it is no number, or no known state."""

    @dataclass
    class Statistics:
        limit: object
        state: object

    class Foreign(Source):
        def __init__(self, *fields):
            self.statistics = lambda: Statistics(*fields)

    registry = prometheus_client.CollectorRegistry()
    listener = PrometheusListener(registry)
    policies = Foreign(None, []), Foreign(4, "open"), Foreign("much", "half-baked")
    for policy in policies:
        observe("payments", policy, listener)

    assert circuit_state(registry) == 2
    assert b'_limit{name="payments",policy="test_observe"} 4' in (
        prometheus_client.generate_latest(registry)
    )


def test_a_policy_that_cannot_be_read_without_its_loop_is_left_out_of_a_scrape():
    """A scrape comes from another thread, and must not fail."""
    registry, bucket = prometheus_client.CollectorRegistry(), TokenBucket(1, 1)
    observe("bucket", bucket, PrometheusListener(registry))

    assert b"concurrency_patterns_waiting" in prometheus_client.generate_latest(registry)


@pytest.mark.parametrize("prefix", ["", "1a", "a-b", "Ab"])
def test_a_prefix_that_is_no_name_is_refused(prefix):
    """Prometheus allows no other characters."""
    with pytest.raises(ValueError, match=r"^prefix must be"):
        PrometheusListener(prometheus_client.CollectorRegistry(), prefix=prefix)


def test_a_second_listener_on_one_registry_needs_another_prefix():
    """Metrics of the same name would be mixed up."""
    registry = prometheus_client.CollectorRegistry()
    PrometheusListener(registry)
    PrometheusListener(registry, prefix="other")
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusListener(registry)


@pytest.mark.parametrize(
    ("listener", "package", "extra"),
    [
        (PrometheusListener, "prometheus_client", "prometheus"),
        (OpenTelemetryListener, "opentelemetry", "opentelemetry"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_installs_it(
    monkeypatch, listener, package, extra
):
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'concurrency-patterns\[{extra}\]'"):
        listener()


# OpenTelemetry


def points(reader):
    """Return the metrics of a reader by name, and the values of their points."""
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = metric
    return found


def value_of(metric, **attributes):
    """Return the value, or the sum, of the point with these attributes."""
    wanted = {f"concurrency_patterns.{key}": value for key, value in attributes.items()}
    (point,) = [point for point in metric.data.data_points if dict(point.attributes) == wanted]
    return point.sum if hasattr(point, "sum") else point.value


def test_a_real_reader_of_the_sdk_gets_all_metrics():
    """What the SDK would export is what has happened."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    listener = OpenTelemetryListener(provider.get_meter("test"))

    async def use_and_read():
        return await use_everything(listener), points(reader)

    policies, found = run_virtual(use_and_read())
    provider.shutdown()

    ours = "concurrency_patterns"
    assert value_of(found[f"{ours}.events"], name="jobs", kind="worker_pool.task_ended") == 1
    waits = found[f"{ours}.wait.duration"]
    assert value_of(waits, name="db", policy="concurrency_limiter") == pytest.approx(1)
    runs = found[f"{ours}.run.duration"]
    assert value_of(runs, name="jobs", policy="worker_pool", outcome="ok") == pytest.approx(0.5)
    refusals = found[f"{ours}.refusals"]
    assert value_of(refusals, name="payments", policy="retry", reason="attempts") == 1
    assert value_of(found[f"{ours}.limit"], name="db", policy="concurrency_limiter") == 1
    assert value_of(found[f"{ours}.circuit.state"], name="payments") == 2
    assert policies


def test_instruments_are_named_by_the_conventions_of_opentelemetry():
    """Lower case and dotted, durations in "s", everything else with an annotation or 1."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    policies = run_virtual(use_everything(OpenTelemetryListener(provider.get_meter("test"))))
    found = points(reader)
    provider.shutdown()

    assert policies
    assert len(found) == 8
    for name, metric in found.items():
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)
        assert (metric.unit == "s") == name.endswith(".duration")
        assert re.fullmatch(r"s|1|\{[a-z]+\}", metric.unit)


async def test_events_stand_on_the_span_of_the_call():
    """A trace shows the retries of the call that it follows."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    retry = Retry(on=ConnectionError, attempts=2, backoff=Fixed(0.1))
    observe("payments", retry, OpenTelemetryListener())
    with provider.get_tracer("test").start_as_current_span("pay"):
        await asyncio.gather(retry.call(fail), return_exceptions=True)
    (span,) = exporter.get_finished_spans()
    provider.shutdown()

    assert [event.name for event in span.events] == ["retry.attempt_failed", "retry.gave_up"]
    assert span.events[0].attributes == {
        "concurrency_patterns.name": "payments",
        "concurrency_patterns.number": 1,
        "concurrency_patterns.error": "ConnectionError()",
        "concurrency_patterns.delay": 0.1,
    }


# The dashboard


def test_each_metric_on_the_dashboard_exists():
    """Every query of the Grafana dashboard asks for what the listener offers, by its labels."""
    registry = prometheus_client.CollectorRegistry()
    policies = run_virtual(use_everything(PrometheusListener(registry)))
    offered = {}
    for family in registry.collect():
        for sample in family.samples:
            offered.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"concurrency_patterns_\w+", query)}

    assert policies
    assert len(queries) >= 8
    assert asked <= set(offered)
    for query in queries:
        (metric, *_) = re.findall(r"concurrency_patterns_\w+", query)
        selected = re.findall(r"(\w+)\s*(?:=~|=|!=)\"", query)
        grouped = [
            label.strip()
            for labels in re.findall(r"by \(([^)]*)\)", query)
            for label in labels.split(",")
        ]
        assert {*selected, *grouped} <= offered[metric]
