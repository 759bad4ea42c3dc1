"""One bounded, expiring cache that all processes of a machine share."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if sys.platform == "win32":
    raise ImportError(
        "shmcache needs POSIX shared memory, semaphores and record locks, which Windows does not have: run it on "
        "Linux, or in WSL 2"
    )

from shmcache.batch import Batch, Pending
from shmcache.cache import Cache, parse_size
from shmcache.codec import Serializer
from shmcache.engine.store import DEFAULT, is_compiled
from shmcache.errors import (
    CacheClosed,
    CacheNotFound,
    CorruptSegment,
    GeometryMismatch,
    IncompatibleSegment,
    KeyTooLarge,
    LockTimeout,
    SegmentTooLarge,
    SerializationError,
    SharedMemoryUnavailable,
    ShmcacheError,
    TooManyProcesses,
    ValueTooLarge,
)
from shmcache.version import __version__

if TYPE_CHECKING:
    from shmcache.memoize import CacheInfo
    from shmcache.stats import EntryInfo, ProcessStats, Stats

__all__ = [
    "DEFAULT",
    "Batch",
    "Cache",
    "CacheClosed",
    "CacheInfo",
    "CacheNotFound",
    "CorruptSegment",
    "EntryInfo",
    "GeometryMismatch",
    "IncompatibleSegment",
    "KeyTooLarge",
    "LockTimeout",
    "Pending",
    "ProcessStats",
    "SegmentTooLarge",
    "SerializationError",
    "Serializer",
    "SharedMemoryUnavailable",
    "ShmcacheError",
    "Stats",
    "TooManyProcesses",
    "ValueTooLarge",
    "__version__",
    "is_compiled",
    "parse_size",
]

_LATER = {
    "CacheInfo": "memoize",
    "EntryInfo": "stats",
    "ProcessStats": "stats",
    "Stats": "stats",
}
"""The names whose modules are imported with their first use, for most programs have none."""

if not TYPE_CHECKING:  # it sees them above, and would take any name for one of these

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"shmcache.{_LATER[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


if not is_compiled() and os.environ.get("SHMCACHE_PURE", "") in ("", "0"):
    import warnings

    warnings.warn(
        "shmcache runs uncompiled, many times slower: install a C compiler and Python's headers (Debian: gcc "
        "python3-dev) and reinstall (in a source checkout: `pip install -e .`), or set SHMCACHE_PURE=1 if this is "
        "what you want",
        RuntimeWarning,
        stacklevel=2,
    )
