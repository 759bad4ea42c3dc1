"""`Cache`, the public object: the engine's store, and everything about a cache that is not hot."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from shmcache import attachment as attachments
from shmcache import segment
from shmcache.attachment import Attachment
from shmcache.batch import Batch
from shmcache.codec import Codec, Serializer
from shmcache.engine import layout
from shmcache.engine.store import DEFAULT, Default, Store, ttl_to_ns
from shmcache.errors import CacheClosed, CacheNotFound, GeometryMismatch, SegmentTooLarge, SharedMemoryUnavailable
from shmcache.log import warn
from shmcache.segment import Wish

if TYPE_CHECKING:
    from shmcache.memoize import Memoized, P
    from shmcache.stats import EntryInfo, Stats

__all__ = ["Cache", "parse_size"]

Result = TypeVar("Result")

MOVE_PATIENCE = 0.6  # seconds; everybody who uses the cache notices within 0.25

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS[_letter] = _UNITS[_letter + "B"] = _UNITS[_letter + "IB"] = 1024**_power
_SIZE = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*([A-Za-z]*)\s*\Z")


def parse_size(size: int | str, name: str = "max_bytes") -> int:
    """A size in bytes from an int or a string like "64MB" (K, M, G, T are powers of 1,024, with or without B or iB)."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"{name} is an int of bytes or a string like '64MB', not {type(size).__name__} ({size!r})")
    if isinstance(size, str):
        match = _SIZE.match(size)
        unit = _UNITS.get(match[3].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{name}={size!r} is no size: expected a number and a unit, such as '64MB' or '1.5 GiB'")
        decimals = match[2] or ""
        scale: int = 10 ** len(decimals)
        size = int(match[1] + decimals) * unit // scale
    if not 0 < size < 1 << 63:
        raise ValueError(f"{name}={size!r}: expected more than 0 bytes and less than 8 EiB")
    return size


class Cache(Store):
    """A cache that all processes of this machine and user share by its name.

    `Cache(name)` attaches to the live cache of that name, or creates it. Arguments that are given must agree with a
    live cache, or GeometryMismatch is raised; those not given take its values, or the defaults.

    - `max_bytes`: the size of the whole segment, metadata included; an int, or a string like "256MB" (default 64 MB)
    - `max_entries`: the most entries it holds (default: one for each 512 bytes)
    - `default_ttl`: seconds an entry lives if `set` is given no `ttl`; None for no expiry (default: the creator's)
    - `eviction`: which entry goes when there is no room: "lru"
    - `shards`: independent parts with a lock each, at most 64 (default: one for each 4 MB and 2,048 entries, at most
      16, or more from 512 GiB on)
    - `serializer`: "msgpack", "pickle" (never read data that others can write with it), or an object with `dumps` and
      `loads`
    - `lock_timeout`: seconds to wait for a lock that a live process holds before LockTimeout is raised
    - `ephemeral`: remove the cache when the last process has detached or died
    - `clock`: a function that returns ns, instead of the system's monotonic clock; for tests

    The object may be used by all threads, survives a fork, and can be pickled to a child: both attach by name.
    """

    def __init__(
        self,
        name: str,
        *,
        max_bytes: int | str | None = None,
        max_entries: int | None = None,
        default_ttl: float | Default | None = DEFAULT,
        eviction: str | None = None,
        shards: int | None = None,
        serializer: str | Serializer = "msgpack",
        lock_timeout: float = 5.0,
        ephemeral: bool = False,
        clock: Callable[[], int] | None = None,
        _create: bool = True,
    ) -> None:
        codec = Codec(serializer)
        if isinstance(lock_timeout, bool) or not isinstance(lock_timeout, (int, float)):
            raise TypeError(f"lock_timeout is a number of seconds, not {type(lock_timeout).__name__}")
        if not 0 < lock_timeout <= 86_400:
            raise ValueError(f"lock_timeout={lock_timeout!r}: expected more than 0 seconds and at most a day")
        if not isinstance(ephemeral, bool):
            raise TypeError(f"ephemeral is True or False, not {ephemeral!r}")
        if clock is not None and not callable(clock):
            raise TypeError(f"clock is a function that returns ns, not {type(clock).__name__} ({clock!r})")
        super().__init__(codec, lock_timeout, clock)
        self._wish = Wish(
            name=name,
            create=_create,
            max_bytes=None if max_bytes is None else parse_size(max_bytes),
            max_entries=_count(max_entries, "max_entries", segment.MAX_ENTRIES),
            shards=_count(shards, "shards", layout.MAX_SHARDS),
            eviction=_policy(eviction),
            default_ttl_ns=None if isinstance(default_ttl, Default) else ttl_to_ns(default_ttl, "default_ttl"),
            ephemeral=ephemeral,
            timeout=lock_timeout,
        )
        self._serializer = serializer
        self._closed = False
        self._before = self._wish
        self._open(self._wish)

    @classmethod
    def attach(cls, name: str, **options: Any) -> Self:
        """Attach to a live cache; raises CacheNotFound where `Cache(name)` would create one. Takes the same options.

        If the cache is unlinked later, operations raise CacheNotFound as long as there is none; once another process
        has made it anew, whatever its geometry, they go on there.
        """
        return cls(name, **options, _create=False)

    @classmethod
    def from_env(cls, **defaults: Any) -> Self:
        """A cache as the environment says; `defaults`, the arguments of `Cache`, hold where a variable is not set.

        The variables are CACHE_NAME (else `name`, else "default"), CACHE_MAX_SIZE (`max_entries`), CACHE_TTL
        (`default_ttl`, in seconds) and CACHE_MAX_MEMORY_MB (`max_bytes`, in MB). An empty one counts as not set. A
        value that makes no cache, or not the live one, is an error that names the variable.
        """
        from shmcache.environment import open_cache  # seldom

        return open_cache(cls, defaults)

    # --- the attachment ---------------------------------------------------------------------------------------------
    def _open(self, wish: Wish) -> None:
        epoch = self._process_epoch()
        attachment = attachments.attach(wish, self)
        ttl = wish.default_ttl_ns
        self._adopt(attachment, attachment.default_ttl_ns if ttl is None else ttl, epoch)

    def _reattach(self, old: Attachment | None) -> None:
        with segment.mutex_of(self.name):
            if self._closed:
                raise self._closed_error()
            if self._attachment not in (old, None):
                return  # another thread has seen to it
            if old is None or self._attachment is None:
                self._open_as_before()
            else:
                self._move(old)
            self._leave_if_closed()
        attachments.detach_dropped()

    def _leave_if_closed(self) -> None:
        # `close` notes that it was called before it looks what to detach from, so one of us sees the other.
        attachment = self._attachment
        if self._closed and attachment is not None:
            self._abandon()
            attachments.release(attachment, self)

    def _move(self, old: Attachment) -> None:
        """From an attachment whose files are gone to a new one."""
        if not (old.was_reported or old.left_to_parent):
            warn("the files of cache %r were unlinked or closed while in use: attaching anew", self.name)
            old.was_reported = True
        self._before = self._wish_for(old)
        try:
            self._open_as_before()
        except (SegmentTooLarge, SharedMemoryUnavailable):
            # No room for two. Memory is given back when nobody has it any more, descriptors when this process has
            # closed them: let go, and wait for the other processes to do so.
            for cache in list(old.users.values()):
                cache._let_go(old)
            old.forget_memory()
            self._await_room()
        else:
            if self._attachment is not old:
                attachments.release(old, self)

    def _let_go(self, old: Attachment) -> None:
        if self._attachment is old:
            self._before = self._wish_for(old)
            self._abandon(adrift=True)
            attachments.release(old, self)

    def _open_as_before(self) -> None:
        """With the geometry it had; where somebody has made the cache anew with another one, with that."""
        try:
            self._open(self._before)
        except GeometryMismatch as mismatch:
            there = self._before._replace(create=False, max_bytes=None, max_entries=None, shards=None, eviction=None)
            try:
                self._open(there)
            except CacheNotFound:  # no longer
                self._open(self._before)
            else:
                warn("cache %r was made anew with another geometry, which is used now: %s", self.name, mismatch)

    def _await_room(self) -> None:
        deadline = time.monotonic() + MOVE_PATIENCE
        while True:
            try:
                self._open_as_before()
                return
            except (SegmentTooLarge, SharedMemoryUnavailable):
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    def _wish_for(self, attachment: Attachment) -> Wish:
        """A wish for a cache like this one."""
        geometry = attachment.geometry
        return self._wish._replace(
            max_bytes=geometry.max_bytes,
            max_entries=geometry.max_entries,
            shards=geometry.shards,
            eviction=geometry.eviction,
            default_ttl_ns=self._default_ttl_ns,
            ephemeral=attachment.ephemeral,
        )

    def close(self) -> None:
        """Detach. The cache lives on for other processes; this object can no longer be used."""
        if not self._closed:
            self._closed = True
            attachment = self._attachment
            self._abandon()
            if attachment is not None:
                attachments.release(attachment, self)

    def unlink(self) -> None:
        """Remove the cache from this machine, then close. Other processes that have it attached move to a new one."""
        attachment = self._attached()
        segment.unlink(self.name, self._wish.timeout)
        if attachment.is_current():
            raise PermissionError(
                f"cache {self.name!r} belongs to uid {os.fstat(attachment.segment_fd).st_uid}, and this process, which "
                f"has it from before it became uid {os.geteuid()}, may not unlink it: do so as that user"
            )
        self.close()

    def __enter__(self) -> Self:
        self._attached()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        geometry = self._attached().geometry
        options = {
            "max_bytes": geometry.max_bytes,
            "max_entries": geometry.max_entries,
            "shards": geometry.shards,
            "eviction": geometry.eviction,
            "default_ttl": self.default_ttl,
            "serializer": self._serializer,
            "lock_timeout": self._wish.timeout,
            "ephemeral": self._wish.ephemeral,
            "clock": self._clock,
            "_create": self._wish.create,
        }
        return functools.partial(type(self), self.name, **options), ()

    def __repr__(self) -> str:
        attachment = self._attachment  # as it was last seen: this neither waits nor moves, for it is for a log
        state = "closed" if self._closed else "moving to new files"
        if attachment is not None:
            state = f"{attachment.geometry.max_bytes} bytes, {attachment.geometry.max_entries} entries"
        return f"<{type(self).__name__} {self.name!r}: {state}>"

    @property
    def name(self) -> str:
        """The name that processes share it by."""
        return self._wish.name

    @property
    def max_bytes(self) -> int:
        """The size of the segment as asked for at creation, bytes."""
        return int(self._attached().geometry.max_bytes)

    @property
    def max_entries(self) -> int:
        """The most entries it holds."""
        return int(self._attached().geometry.max_entries)

    @property
    def default_ttl(self) -> float | None:
        """Seconds an entry lives if `set` is given no ttl; None for no expiry."""
        return self._default_ttl_ns / 1e9 if self._default_ttl_ns else None

    # --- more operations --------------------------------------------------------------------------------------------
    def get_or_set(self, key: object, factory: Callable[[], Result], ttl: object = DEFAULT) -> Result:
        """The value of `key`; if it is missing, `factory()` is stored first.

        If another process stores the key while `factory` runs, its value stays and is returned. `factory` is a plain
        function; for coroutine functions there is `memoize`.
        """
        if not callable(factory):
            raise TypeError(
                f"factory is a function that returns the value, not {type(factory).__name__} ({factory!r}): write "
                f"get_or_set(key, lambda: value)"
            )
        found: Any = self.get(key, DEFAULT)
        if found is not DEFAULT:
            return cast(Result, found)
        value: Any = factory()
        import inspect  # seldom

        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()  # or Python would warn that it was never awaited
            raise TypeError(
                f"get_or_set takes a plain function, and factory returned an awaitable ({type(value).__name__}): use "
                f"memoize for an `async def`, or await the result first"
            )
        return cast(Result, value if self.add(key, value, ttl) else self.get(key, value))

    def batch(self) -> Batch:
        """Collects operations of any kind in a `with` block, and performs them at its end, taking each lock once."""
        self._attached()
        return Batch(self)

    def memoize(
        self, ttl: object = DEFAULT, *, key: Callable[..., Any] | None = None, name: str | None = None
    ) -> Callable[[Callable[P, Result]], Memoized[P, Result]]:
        """A decorator that caches what a function, or a coroutine function, returns for its arguments.

        `ttl` is as for `set`. `key` makes the cache key from the arguments, where they are not keys themselves. `name`
        tells functions apart; without it that is module, qualified name, code, defaults and what the function closes
        over, and the same of `key`, so a changed function does not read what it stored before. What cannot be told
        apart, such as a closed-over list, is a TypeError that says so. Global variables of a module do not count, nor
        does what changes after the function was decorated. `fingerprint.py` has the whole rule. Processes that miss at
        the same time compute at the same time.

        The decorated function has `cache_info()`, `cache_clear()`, `cache_key(*args, **kwargs)` and `__wrapped__`.
        """
        from shmcache.memoize import memoize  # seldom

        if callable(ttl):
            raise TypeError("memoize takes arguments: write @cache.memoize() rather than @cache.memoize")
        # Raise now rather than at the first call.
        if not isinstance(ttl, Default):
            ttl_to_ns(ttl)
        if key is not None and not callable(key):
            raise TypeError(
                f"key is a function of the arguments that returns a key, or None, not {type(key).__name__} ({key!r})"
            )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name is a str or None, not {type(name).__name__} ({name!r})")
        return functools.partial(memoize, self, ttl, key, name)

    # --- iteration --------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Any]:
        return self.keys()

    def keys(self, prefix: str | bytes | None = None) -> Iterator[Any]:
        """The keys, in no order, without a lock; with `prefix`, the str (or bytes) keys that begin with it.

        An entry that is there all the while is seen once; one that comes or goes meanwhile may be missed.
        """
        if prefix is not None and not isinstance(prefix, (str, bytes)):
            raise TypeError(f"prefix is a str or bytes, not {type(prefix).__name__} ({prefix!r})")
        return (
            key
            for key, _ in self._walk(False)
            if prefix is None or (type(key) is type(prefix) and key[: len(prefix)] == prefix)
        )

    def items(self) -> Iterator[tuple[Any, Any]]:
        """The keys and values, as `keys` gives them."""
        yield from self._walk(True)

    def values(self) -> Iterator[Any]:
        """The values, as `keys` gives the keys."""
        for _, value in self._walk(True):
            yield value

    def _walk(self, values: bool) -> Iterator[tuple[Any, Any]]:
        position: int | None = 0
        while position is not None:
            entries, position = self._scan(position, 256, values)
            yield from entries

    # --- what it tells about itself ---------------------------------------------------------------------------------
    def stats(self) -> Stats:
        """Totals of all processes, sizes, and who is attached."""
        return self._steadily(self._collect)

    def _collect(self) -> Stats:
        from shmcache.stats import collect  # seldom

        attachment = self._attached()
        try:
            return collect(attachment)
        except (OSError, ValueError, IndexError):  # its files are closed, or its views dropped
            if self._attachment is attachment:
                raise
            raise CacheClosed("another thread has let go of this attachment meanwhile") from None

    def info(self, key: object) -> EntryInfo:
        """What is known about one entry, without counting a hit; raises KeyError if it is missing."""
        from shmcache.stats import EntryInfo  # seldom

        found = self._describe(key)
        if found is None:
            raise KeyError(key)
        version, left, key_bytes, value_bytes, shard = found
        return EntryInfo(key, left / 1e9 if left else None, version, key_bytes, value_bytes, shard)

    def check(self) -> list[str]:
        """Compare everything in the segment with everything else, shard by shard; the contradictions, [] for none."""
        return self._steadily(self._inspect_all, False)

    def repair(self) -> list[str]:
        """Make all that follows from the entries anew, dropping those that cannot be proved; what was dropped."""
        return self._steadily(self._inspect_all, True)


def _count(number: int | None, name: str, most: int) -> int | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} is an int, not {type(number).__name__} ({number!r})")
    if not 1 <= number <= most:
        raise ValueError(f"{name}={number!r}: expected 1 to {most:,}")
    return number


def _policy(eviction: str | None) -> str | None:
    if eviction is not None and eviction not in layout.POLICIES:
        raise ValueError(f"eviction={eviction!r}: expected one of {', '.join(map(repr, layout.POLICIES))}")
    return eviction
