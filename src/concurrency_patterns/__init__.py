"""Concurrency patterns for Python that hold under cancellation, failure and load."""

from .channel import Channel, produce_consume
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
from .token_bucket import TokenBucket
from .worker_pool import TaskHandle, WorkerPool, bounded_map

__all__ = [
    "Channel",
    "ChannelClosed",
    "ChannelEmpty",
    "CircuitOpen",
    "ConcurrencyLimitExceeded",
    "ConcurrencyLimiter",
    "DeadlineExceeded",
    "LocalRejection",
    "PatternError",
    "PoolClosed",
    "QueueFull",
    "RateLimitExceeded",
    "RemoteError",
    "TaskHandle",
    "TokenBucket",
    "WorkerCrashed",
    "WorkerPool",
    "bounded_map",
    "produce_consume",
]
