"""Every exception shmcache raises.

Each class derives from `ShmcacheError` and from the builtin closest in meaning, so callers may catch either.
A message says what happened, what was expected and what to do.
"""

from __future__ import annotations

__all__ = [
    "CacheClosed",
    "CacheNotFound",
    "CorruptSegment",
    "GeometryMismatch",
    "IncompatibleSegment",
    "KeyTooLarge",
    "LockTimeout",
    "SegmentTooLarge",
    "SerializationError",
    "SharedMemoryUnavailable",
    "ShmcacheError",
    "TooManyProcesses",
    "ValueTooLarge",
]


class ShmcacheError(Exception):
    """The base of every error that shmcache raises."""


class CacheClosed(ShmcacheError, ValueError):
    """The cache object was used after `close()`."""


class CacheNotFound(ShmcacheError, KeyError):
    """No cache of that name exists on this machine for this user."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message, quotes and all.
        return str(self.args[0]) if self.args else ""


class GeometryMismatch(ShmcacheError, ValueError):
    """A live cache of that name has another size, slot count, shard count or eviction policy."""


class IncompatibleSegment(ShmcacheError, ValueError):
    """The shared memory of that name is not a cache this build can read."""


class CorruptSegment(ShmcacheError, ValueError):
    """The contents of the segment contradict themselves."""


def contradiction() -> CorruptSegment:
    """The error of an operation that met contents which cannot be."""
    return CorruptSegment(
        "the contents of the cache contradict themselves: `cache.check()` says where, "
        "`cache.repair()` keeps what can be proved"
    )


class SegmentTooLarge(ShmcacheError, MemoryError):
    """/dev/shm, or a memory limit, has less room than the cache asks for."""


class SharedMemoryUnavailable(ShmcacheError, OSError):
    """The system refused a file of the cache: /dev/shm cannot be written, or a limit of open files is reached."""


class ValueTooLarge(ShmcacheError, ValueError):
    """The entry would not fit even an empty shard of the cache."""


class KeyTooLarge(ShmcacheError, ValueError):
    """The encoded key is longer than the 65,535 bytes a slot can describe."""


class LockTimeout(ShmcacheError, TimeoutError):
    """A live process held the lock of a shard for longer than `lock_timeout`."""


class TooManyProcesses(ShmcacheError, OSError):
    """Every place of the cache's process table is taken."""


class SerializationError(ShmcacheError, TypeError, ValueError):
    """A key or a value cannot be turned into bytes, or stored bytes cannot be turned back."""
