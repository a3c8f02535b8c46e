"""Concurrency patterns for Python that hold under cancellation, failure and load."""

from .channel import Channel, produce_consume
from .circuit_breaker import CircuitBreaker, CircuitState, FailureRate
from .compose import Composition, OrderWarning, compose
from .concurrency_limiter import ConcurrencyLimiter
from .errors import (
    ChannelClosed,
    ChannelEmpty,
    CircuitOpen,
    ConcurrencyLimitExceeded,
    DeadlineExceeded,
    LocalRejection,
    PatternError,
    PoolClosed,
    QueueFull,
    RateLimitExceeded,
    RemoteError,
    WorkerCrashed,
)
from .fallback import Alternative, Fallback, Outcome, constant
from .process_pool import ProcessPool
from .retry import (
    DecorrelatedJitter,
    EqualJitter,
    Exponential,
    Fixed,
    FullJitter,
    Retry,
    RetryBudget,
    retry_report,
)
from .timeout import (
    CancelOutcome,
    Timeout,
    bounded_cleanup,
    cancel_and_wait,
    deadline,
    move_on_after,
    remaining,
)
from .token_bucket import TokenBucket, TokenBuckets
from .worker_pool import TaskHandle, WorkerPool, bounded_map

__all__ = [
    "Alternative",
    "CancelOutcome",
    "Channel",
    "ChannelClosed",
    "ChannelEmpty",
    "CircuitBreaker",
    "CircuitOpen",
    "CircuitState",
    "Composition",
    "ConcurrencyLimitExceeded",
    "ConcurrencyLimiter",
    "DeadlineExceeded",
    "DecorrelatedJitter",
    "EqualJitter",
    "Exponential",
    "FailureRate",
    "Fallback",
    "Fixed",
    "FullJitter",
    "LocalRejection",
    "OrderWarning",
    "Outcome",
    "PatternError",
    "PoolClosed",
    "ProcessPool",
    "QueueFull",
    "RateLimitExceeded",
    "RemoteError",
    "Retry",
    "RetryBudget",
    "TaskHandle",
    "Timeout",
    "TokenBucket",
    "TokenBuckets",
    "WorkerCrashed",
    "WorkerPool",
    "bounded_cleanup",
    "bounded_map",
    "cancel_and_wait",
    "compose",
    "constant",
    "deadline",
    "move_on_after",
    "produce_consume",
    "remaining",
    "retry_report",
]
