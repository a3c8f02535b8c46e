"""See what the patterns do: their events to logging, Prometheus, OpenTelemetry, or your own.

Every policy tells what happens to whoever stands in its ``on_event``. :func:`observe` gives it a
name and hands each :class:`Event` to any number of listeners. A listener is any function of one
event; the classes here are listeners, too.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import logging
import queue
import re
import reprlib
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Self, TypeVar

from .errors import LocalRejection, check_count, check_positive, decorate, notify, tell

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import TypeAlias

__all__ = [
    "BackgroundListener",
    "Event",
    "LoggingListener",
    "Measured",
    "MeasuredStatistics",
    "Observation",
    "OpenTelemetryListener",
    "PrometheusListener",
    "observe",
]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a policy did or that happened to it.

    Attributes:
        kind: What happened, as ``"<module>.<what>"``, such as ``"retry.gave_up"``.
        name: The name that :func:`observe` was given.
        at: When, on the clock of the event loop; in seconds.
        data: The details; those that are durations are in seconds.
    """

    kind: str
    name: str
    at: float
    data: Mapping[str, Any]


if TYPE_CHECKING:
    Listener: TypeAlias = Callable[[Event], object]


def observe(name: str, policy: object, *listeners: Callable[[Event], object]) -> Observation:
    """Hand the events of a policy to listeners, until told to stop.

    A policy is known by its shape: it has an attribute ``on_event``. Of a composition each policy
    is observed. If several of them are of one class, the second, counted from the outside, is
    named ``name#2``, and so on.

    A listener is called in the place where the event happens, with the policy in a consistent
    state: it may use the policy, and it may end the observation. What it raises is logged once
    and breaks no call. What takes it long delays everybody; see :class:`BackgroundListener`.

    Args:
        name: What stands beside each event, and on each metric: the name of the service, never a
            user or a key, of which there are too many.
        policy: What to observe: any policy, channel or pool of this package, a composition, or
            whatever else has ``on_event`` or ``policies``.
        *listeners: Functions of one :class:`Event`; they must not be asynchronous.

    Returns:
        The observation. It ends with its ``detach()``, or at the end of a ``with`` block.

    Raises:
        TypeError: If nothing here can be observed, or ``name`` or a listener is of the wrong type.
        ValueError: If ``name`` is empty, or there is no listener.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    if not name:
        raise ValueError(f"name must not be empty, got {name!r}")
    if not listeners:
        raise ValueError("listeners must not be empty")
    for listener in listeners:
        call = getattr(listener, "__call__", None)  # noqa: B004 -- it may be async def
        if call is None or any(map(inspect.iscoroutinefunction, (listener, call))):
            raise TypeError(f"a listener must be a plain function of one event, got {listener!r}")
    observation = Observation(name, listeners)
    observation._attach(policy)
    return observation


class Observation:
    """Listeners that are attached to a policy; :func:`observe` makes it.

    Attributes:
        name: The name that was given.
        active: Whether it has not been detached.
    """

    def __init__(self, name: str, listeners: tuple[Listener, ...]) -> None:
        self.name = name
        self.active = True
        self._listeners = listeners
        self._taps: list[tuple[_Tap, str]] = []

    def detach(self) -> None:
        """Hand out no more events; a second time does nothing."""
        if not self.active:
            return
        self.active = False
        for tap, name in self._taps:
            tap.remove(self)
            self._tell_watchers("unwatch", name, tap.policy)
        self._taps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _attach(self, policy: object) -> None:
        seen: Counter[type] = Counter()
        for part in getattr(policy, "policies", [policy]):
            if not hasattr(part, "on_event") or any(tap.policy is part for tap, _ in self._taps):
                continue
            seen[type(part)] += 1
            number = seen[type(part)]
            name = self.name if number == 1 else f"{self.name}#{number}"
            tap = _tap_of(part)
            tap.add(self, name)
            self._taps.append((tap, name))
            self._tell_watchers("watch", name, part)
        if not self._taps:
            raise TypeError(f"policy must have on_event, got {policy!r}")

    def _tell_watchers(self, what: str, name: str, policy: object) -> None:
        """Show the policy to the listeners that also want to look at it: they have ``watch``."""
        for listener in self._listeners:
            if hasattr(listener, what):
                tell(getattr(listener, what), name, policy)


class _Tap:
    """What stands in the ``on_event`` of a policy, for all its observations."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._before = policy.on_event  # somebody else's listener goes on
        self._observations: tuple[tuple[Observation, str], ...] = ()  # replaced, never changed

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if self._before is not None:
            notify(self._before, kind, **data)
        at = _now()
        details = MappingProxyType(data)
        for observation, name in self._observations:
            event = Event(kind, name, at, details)
            for listener in observation._listeners:
                if observation.active:
                    tell(listener, event)

    def add(self, observation: Observation, name: str) -> None:
        with _changing:
            self._observations = (*self._observations, (observation, name))

    def remove(self, observation: Observation) -> None:
        with _changing:
            self._observations = tuple(
                pair for pair in self._observations if pair[0] is not observation
            )
            if not self._observations and self.policy.on_event is self:
                self.policy.on_event = self._before


_changing = threading.Lock()


def _tap_of(policy: Any) -> _Tap:
    if not isinstance(policy.on_event, _Tap):
        policy.on_event = _Tap(policy)
    tap: _Tap = policy.on_event
    return tap


def _now() -> float:
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:  # a policy for plain functions, in a thread
        return time.monotonic()


@dataclass(frozen=True, slots=True)
class MeasuredStatistics:
    """What a :class:`Measured` has counted.

    Attributes:
        ok: Calls that returned.
        error: Calls that raised.
        rejected: Calls that a policy inside refused.
        cancelled: Calls that were cancelled.
        seconds: The time of all of them together.
    """

    ok: int
    error: int
    rejected: int
    cancelled: int
    seconds: float


class Measured:
    """Measure each call that passes through.

    The time of a call has two parts, waiting in our lines and the service's own, and their sum
    tells neither. This policy measures whatever is inside of it: put one outside of all policies
    and one directly around the function, and the difference is what the policies cost.

    Attributes:
        on_event: Called with the kind and the data of an event: ``observe.call_ended``
            (``outcome``: ``"ok"``, ``"error"``, ``"rejected"`` or ``"cancelled"``; ``seconds``;
            ``error``, or ``None``).
    """

    def __init__(self) -> None:
        self.on_event: Callable[[str, dict[str, Any]], object] | None = None
        self._outcomes = {"ok": 0, "error": 0, "rejected": 0, "cancelled": 0}
        self._seconds = 0.0

    def __repr__(self) -> str:
        return "Measured()"

    async def call(self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``fn`` and measure the time until it returns or raises."""
        clock = asyncio.get_running_loop().time
        start = clock()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            self._end(_outcome(error), clock() - start, error)
            raise
        self._end("ok", clock() - start, None)
        return result

    def __call__(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """Decorate an ``async def`` so that each of its calls is measured."""
        return decorate(self.call, fn)

    def statistics(self) -> MeasuredStatistics:
        """Return how the calls ended, and how long they took together."""
        return MeasuredStatistics(**self._outcomes, seconds=self._seconds)

    def _end(self, outcome: str, seconds: float, error: BaseException | None) -> None:
        self._outcomes[outcome] += 1
        self._seconds += seconds
        if self.on_event is not None:
            event = {"outcome": outcome, "seconds": seconds, "error": error}
            notify(self.on_event, "observe.call_ended", **event)


def _outcome(error: BaseException) -> str:
    """Tell how a call ended; of several errors in a group the worst counts."""
    if isinstance(error, BaseExceptionGroup):
        return min(map(_outcome, error.exceptions), key=("error", "rejected", "cancelled").index)
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "rejected" if isinstance(error, LocalRejection) else "error"


# The last words of the kinds that mean trouble, and of those that happen all the time.
_TROUBLE = {
    "crashed",
    "degraded",
    "dropped",
    "failed",
    "opened",
    "rejected",
    "up",  # gave_up
    "out",  # timed_out
}
_ROUTINE = {"ended", "started", "waited", "won"}


class LoggingListener:
    """Write events to a log, and do not drown it.

    An outage rejects a thousand calls a second, and a line for each of them hides the one line
    that tells why. Here each kind of event of each name may write so many lines a second; the
    others are counted, and one line tells their number when the second is over, or the program.

    Trouble (rejected, gave up, opened ...) is a warning, what happens with every call (waited,
    ended) is for debugging, and the rest is information. The event stands in ``record.event``.

    Args:
        logger: Where to write to; ``None`` for the logger named ``concurrency_patterns``.
        levels: Levels for kinds, where they shall be others.
        max_per_second: How many lines for each name and kind.

    Raises:
        ValueError: If ``max_per_second`` is below 1.
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        levels: Mapping[str, int] | None = None,
        max_per_second: int = 10,
    ) -> None:
        check_count("max_per_second", max_per_second)
        self._logger = logger or logging.getLogger("concurrency_patterns")
        self._levels = dict(levels or {})
        self._most = max_per_second
        self._lock = threading.Lock()
        self._seconds: dict[tuple[str, str], _Second] = {}
        _logging.add(self)

    def __call__(self, event: Event) -> None:
        """Write a line, or count it."""
        level = self._level(event.kind)
        if not self._logger.isEnabledFor(level):
            return
        with self._lock:
            second = self._seconds.setdefault((event.name, event.kind), _Second())
            held_back, write = second.step(event.at, self._most)
            if second.held_back == 1:
                self._tell_later(event, second)
        self._tell_held_back(event.name, event.kind, held_back)
        if write:
            details = " ".join(f"{key}={_short(value)}" for key, value in event.data.items())
            line = f"{event.name}: {event.kind} {details}".rstrip()
            self._logger.log(level, "%s", line, extra={"event": event})

    def flush(self) -> None:
        """Tell now how many lines were held back."""
        with self._lock:
            held_back = {key: second.take() for key, second in self._seconds.items()}
        for (name, kind), count in held_back.items():
            self._tell_held_back(name, kind, count)

    def unwatch(self, name: str, policy: object) -> None:
        """Tell what was held back; called when an observation ends."""
        self.flush()

    def _tell_later(self, event: Event, second: _Second) -> None:
        """After a storm nothing may come that could tell of it: set a timer, if there is a loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        loop.call_later(max(0.0, second.began + 1 - event.at), self._on_timer, event)

    def _on_timer(self, event: Event) -> None:
        with self._lock:
            held_back = self._seconds[event.name, event.kind].take()
        self._tell_held_back(event.name, event.kind, held_back)

    def _tell_held_back(self, name: str, kind: str, count: int) -> None:
        if count:
            self._logger.log(self._level(kind), "%s: %s: %d more held back", name, kind, count)

    def _level(self, kind: str) -> int:
        if kind in self._levels:
            return self._levels[kind]
        last = re.split(r"[._]", kind)[-1]
        if last in _TROUBLE:
            return logging.WARNING
        return logging.DEBUG if last in _ROUTINE else logging.INFO


# Those who may still have to tell something when the program ends.
_logging: weakref.WeakSet[LoggingListener] = weakref.WeakSet()


@atexit.register
def _tell_the_rest() -> None:
    for listener in _logging:
        listener.flush()


class _Second:
    """How many lines there were in a second, and how many more there would have been."""

    __slots__ = ("began", "held_back", "written")

    def __init__(self) -> None:
        self.began = -float("inf")
        self.written = 0
        self.held_back = 0

    def step(self, now: float, most: int) -> tuple[int, bool]:
        """Return the number held back that is to be told now, and whether to write a line."""
        held_back = 0
        if not self.began <= now < self.began + 1:  # also a clock that began anew
            held_back, self.began, self.written = self.take(), now, 0
        if self.written < most:
            self.written += 1
            return held_back, True
        self.held_back += 1
        return held_back, False

    def take(self) -> int:
        held_back, self.held_back = self.held_back, 0
        return held_back


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else reprlib.repr(value)


class BackgroundListener:
    """Call a listener in a thread of its own.

    A listener that writes to a slow disk or a network makes every call wait that has something
    to tell. Here events go into a bounded queue. When the thread does not keep up, events are
    dropped and counted, and no call waits.

    Args:
        listener: A function of one event.
        capacity: How many events may wait.

    Attributes:
        dropped: How many events were dropped because the queue was full.

    Raises:
        ValueError: If ``capacity`` is below 1.
    """

    def __init__(self, listener: Callable[[Event], object], *, capacity: int = 1000) -> None:
        check_count("capacity", capacity)
        self.dropped = 0
        self._listener = listener
        self._queue: queue.Queue[Event | None] = queue.Queue(capacity)
        self._closed = False  # takes no more events
        self._ending = False  # and the thread will see the end of the queue
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Put the event into the queue, or drop it."""
        if self._closed:
            self.dropped += 1
            return
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 5.0) -> bool:
        """Take no more events, and wait until those in the queue are handled.

        Args:
            timeout: The longest wait in seconds.

        Returns:
            Whether all of them were.
        """
        check_positive("timeout", timeout)
        end = time.monotonic() + timeout
        self._closed = True
        if not self._ending:
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                return False
            self._ending = True
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            tell(self._listener, event)


class _Measurement(NamedTuple):
    instrument: str
    value: float
    labels: dict[str, str]


def _measurements(event: Event) -> Iterator[_Measurement]:
    """Tell what an event adds to which instrument, by its shape: a new kind needs nothing here."""
    module, _, what = event.kind.partition(".")
    who = {"name": event.name, "policy": module}
    yield _Measurement("events", 1, {"name": event.name, "kind": event.kind})
    if what == "waited":
        yield _Measurement("wait", event.data["seconds"], who)
    elif what in {"task_ended", "call_ended"}:
        if "waited" in event.data:
            yield _Measurement("wait", event.data["waited"], who)
        ran = {**who, "outcome": event.data["outcome"]}
        yield _Measurement("run", event.data["seconds"], ran)
    elif what in {"rejected", "gave_up"}:
        reason = str(event.data.get("reason", what))
        yield _Measurement("refusals", 1, {**who, "reason": reason})


# What the fields of statistics are called that are a level, not a count: one that is there now.
_LEVELS = {
    "in_use": "in_use",
    "busy": "in_use",
    "waiting": "waiting",
    "queued": "waiting",
    "buffered": "waiting",
    "limit": "limit",
    "workers": "limit",
    "capacity": "limit",
}
_STATES = {"closed": 0, "half-open": 1, "open": 2}


class _Watched:
    """The policies whose levels are read when somebody asks for the metrics."""

    def __init__(self) -> None:
        self._policies: list[tuple[str, weakref.ref[Any]]] = []  # replaced, never changed

    def add(self, name: str, policy: object) -> None:
        with _changing:
            self._policies = [*self._alive(), (name, weakref.ref(policy))]

    def remove(self, name: str, policy: object) -> None:
        with _changing:
            self._policies = [
                (known, reference)
                for known, reference in self._alive()
                if known != name or reference() is not policy
            ]

    def _alive(self) -> list[tuple[str, weakref.ref[Any]]]:
        return [pair for pair in self._policies if pair[1]() is not None]

    def levels(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return each level by the values of its labels.

        Those of one name and policy are added; of several circuits the worst state is told.
        """
        found: dict[str, dict[tuple[str, ...], float]] = {key: {} for key in _GAUGES}
        for name, reference in self._policies:
            policy = reference()
            for field, value in _fields(policy):
                if field in _LEVELS and isinstance(value, int | float):
                    labels = name, _module(policy)
                    levels = found[_LEVELS[field]]
                    levels[labels] = levels.get(labels, 0) + value
                elif field == "state" and (state := str(getattr(value, "value", value))) in _STATES:
                    states = found["circuit_state"]
                    states[name,] = max(states.get((name,), 0), _STATES[state])
        return found


def _fields(policy: Any) -> Iterable[tuple[str, Any]]:
    try:
        statistics = policy.statistics()
    except Exception:  # noqa: BLE001 -- some need a running loop, and a scrape must not fail
        return []
    fields = getattr(type(statistics), "__dataclass_fields__", ())
    return [(field, getattr(statistics, field)) for field in fields]


def _module(policy: object) -> str:
    return type(policy).__module__.rpartition(".")[2]


# The unit and the meaning of each instrument, and its labels beside the name.
_HISTOGRAMS = {
    "wait": ("s", "Time spent waiting in line", ("policy",)),
    "run": ("s", "Time of the work itself", ("policy", "outcome")),
}
_COUNTERS = {
    "events": ("{event}", "Events of any kind", ("kind",)),
    "refusals": ("{refusal}", "Calls refused or given up", ("policy", "reason")),
}
_GAUGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "in_use": ("{slot}", "Slots or workers in use", ("policy",)),
    "waiting": ("{call}", "Calls, tasks or items that wait", ("policy",)),
    "limit": ("{slot}", "The most that can be in use, or wait in a channel", ("policy",)),
    "circuit_state": ("1", "State of the circuit: 0 closed, 1 half-open, 2 open", ()),
}
_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BAD_PREFIX = "prefix must be lower-case letters, digits and underscores, got {!r}"


class PrometheusListener:
    """Turn events into metrics that Prometheus can scrape.

    It needs the package ``prometheus-client``: install ``concurrency-patterns[prometheus]``. Each
    metric has a label ``name``, as given to :func:`observe`:

    * ``<prefix>_events_total``: events, by ``kind``.
    * ``<prefix>_wait_seconds``: a histogram of the waits in line, by ``policy``.
    * ``<prefix>_run_seconds``: a histogram of the work itself, by ``policy`` and ``outcome``.
    * ``<prefix>_refusals_total``: calls refused or given up, by ``policy`` and ``reason``.
    * ``<prefix>_in_use``, ``<prefix>_waiting``, ``<prefix>_limit``: by ``policy``.
    * ``<prefix>_circuit_state``: 0 closed, 1 half-open, 2 open; of several circuits the worst.

    The last four are read from ``statistics()`` at the moment of the scrape.

    Args:
        registry: A ``CollectorRegistry``; ``None`` for the default one of ``prometheus-client``.
            One listener to a registry and prefix; it may listen to any number of policies.
        prefix: What all names begin with.
        buckets: The upper limits of the histograms in seconds.

    Raises:
        ImportError: If ``prometheus-client`` is not installed.
        ValueError: If the registry has such metrics already, or ``prefix`` is not a name.
    """

    def __init__(
        self,
        registry: Any = None,
        *,
        prefix: str = "concurrency_patterns",
        buckets: Iterable[float] = _BUCKETS,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", prefix):
            raise ValueError(_BAD_PREFIX.format(prefix))
        try:
            import prometheus_client  # noqa: PLC0415 -- optional
            from prometheus_client import core  # noqa: PLC0415 -- optional
        except ImportError as error:
            raise _missing("prometheus-client", "prometheus") from error
        where = prometheus_client.REGISTRY if registry is None else registry
        self._gauge = core.GaugeMetricFamily
        self._prefix = prefix
        self._watched = _Watched()
        self._instruments: dict[str, Any] = {}
        for key, (_, text, labels) in _COUNTERS.items():
            self._instruments[key] = prometheus_client.Counter(
                f"{prefix}_{key}", text, ["name", *labels], registry=where
            )
        for key, (_, text, labels) in _HISTOGRAMS.items():
            self._instruments[key] = prometheus_client.Histogram(
                f"{prefix}_{key}_seconds",
                text,
                ["name", *labels],
                registry=where,
                buckets=tuple(buckets),
            )
        where.register(self)

    def __call__(self, event: Event) -> None:
        """Add the event to the metrics."""
        for name, value, labels in _measurements(event):
            metric = self._instruments[name].labels(**labels)
            if name in _COUNTERS:
                metric.inc(value)
            else:
                metric.observe(value)

    def watch(self, name: str, policy: object) -> None:
        """Read the levels of this policy at each scrape; called by :func:`observe`."""
        self._watched.add(name, policy)

    def unwatch(self, name: str, policy: object) -> None:
        """Leave this policy out; called when an observation ends."""
        self._watched.remove(name, policy)

    def collect(self) -> Iterator[Any]:
        """Yield the levels; called by the registry at each scrape."""
        for key, levels in self._watched.levels().items():
            _, text, labels = _GAUGES[key]
            family = self._gauge(f"{self._prefix}_{key}", text, labels=["name", *labels])
            for values, level in sorted(levels.items()):
                family.add_metric(values, level)
            yield family


class OpenTelemetryListener:
    """Turn events into metrics of OpenTelemetry, and into events of the current span.

    It needs the package ``opentelemetry-api``: install ``concurrency-patterns[opentelemetry]``.
    Where the metrics go is decided by the SDK that the program sets up. The instruments, each
    with an attribute ``concurrency_patterns.name``:

    * ``concurrency_patterns.events``: a counter, by ``concurrency_patterns.kind``.
    * ``concurrency_patterns.wait.duration``: a histogram in seconds, by ``.policy``.
    * ``concurrency_patterns.run.duration``: a histogram in seconds, by ``.policy`` and
      ``.outcome``.
    * ``concurrency_patterns.refusals``: a counter, by ``.policy`` and ``.reason``.
    * ``concurrency_patterns.in_use``, ``.waiting``, ``.limit``: by ``.policy``.
    * ``concurrency_patterns.circuit.state``: 0 closed, 1 half-open, 2 open; of several circuits
      the worst.

    The last four are read from ``statistics()`` when the metrics are collected.

    The names follow OpenTelemetry's semantic conventions: lower case, dotted, and the unit, ``s``
    or an annotation in braces, not in the name.

    Args:
        meter: A ``Meter``; ``None`` for that of the global provider.

    Raises:
        ImportError: If ``opentelemetry-api`` is not installed.
    """

    def __init__(self, meter: Any = None) -> None:
        try:
            from opentelemetry import metrics, trace  # noqa: PLC0415 -- optional
        except ImportError as error:
            raise _missing("opentelemetry-api", "opentelemetry") from error
        meter = metrics.get_meter(_NAMESPACE) if meter is None else meter
        self._observation = metrics.Observation
        self._current_span = trace.get_current_span
        self._watched = _Watched()
        self._record: dict[str, Callable[..., None]] = {}
        for key, (unit, text, _) in _COUNTERS.items():
            counter = meter.create_counter(f"{_NAMESPACE}.{key}", unit=unit, description=text)
            self._record[key] = counter.add
        for key, (unit, text, _) in _HISTOGRAMS.items():
            histogram = meter.create_histogram(
                f"{_NAMESPACE}.{key}.duration",
                unit=unit,
                description=text,
                explicit_bucket_boundaries_advisory=_BUCKETS,
            )
            self._record[key] = histogram.record
        for key, (unit, text, labels) in _GAUGES.items():
            # What can be added up has a policy; a state cannot.
            make = (
                meter.create_observable_up_down_counter if labels else meter.create_observable_gauge
            )
            read = functools.partial(self._levels, key)
            name = key.replace("circuit_", "circuit.")
            make(f"{_NAMESPACE}.{name}", callbacks=[read], unit=unit, description=text)

    def __call__(self, event: Event) -> None:
        """Add the event to the metrics and to the current span."""
        for name, value, labels in _measurements(event):
            self._record[name](value, _attributes(labels))
        span = self._current_span()
        if span.is_recording():
            simple = {key: value for key, value in event.data.items() if value is not None}
            details = {key: _plain(value) for key, value in simple.items()}
            span.add_event(event.kind, {f"{_NAMESPACE}.name": event.name, **_attributes(details)})

    def watch(self, name: str, policy: object) -> None:
        """Read the levels of this policy when asked for; called by :func:`observe`."""
        self._watched.add(name, policy)

    def unwatch(self, name: str, policy: object) -> None:
        """Leave this policy out; called when an observation ends."""
        self._watched.remove(name, policy)

    def _levels(self, key: str, _: object) -> list[Any]:
        labels = ("name", *_GAUGES[key][2])
        return [
            self._observation(level, _attributes(dict(zip(labels, values, strict=True))))
            for values, level in self._watched.levels()[key].items()
        ]


_NAMESPACE = "concurrency_patterns"


def _attributes(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_NAMESPACE}.{key}": value for key, value in labels.items()}


def _plain(value: object) -> str | bool | int | float:
    """Return what an attribute of a span may be."""
    return value if isinstance(value, str | bool | int | float) else reprlib.repr(value)


def _missing(package: str, extra: str) -> ImportError:
    return ImportError(
        f"{package} is not installed: pip install 'concurrency-patterns[{extra}]'", name=package
    )
